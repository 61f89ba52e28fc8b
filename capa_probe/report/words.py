"""What a report says in words: the summary on top, and the cautions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from capa_probe.analysis import layer_ranges
from capa_probe.examples import Example
from capa_probe.figures.style import ROLE_NAMES, count
from capa_probe.findings import Findings
from capa_probe.measures import TAU
from capa_probe.report.costs import Cost, points

#: Fewer samples than this say little about a model.
FEW_SAMPLES = 20
#: Offset dimensions beyond this many are counted only.
_MOST_OFFSETS = 4


@dataclass(frozen=True)
class Tile:
    """A number at the top of the report."""

    label: str
    value: str
    note: str


def model_name(manifest: Mapping[str, Any]) -> str:
    """The model's name; of a folder, its last part."""
    name = str(manifest.get("model", "unknown model"))
    return Path(name).name or name if Path(name).is_absolute() or Path(name).is_dir() else name


def facts(manifest: Mapping[str, Any], findings: Findings | None) -> list[str]:
    """What was profiled: the model, and on how much."""
    said = [
        str(manifest["family"]),
        f"{manifest['n_layers']} decoder layers",
        f"width {manifest['d_model']:,}",
        str(manifest.get("dtype", "")),
        _samples(int(manifest["n_samples"]), findings),
        str(manifest.get("created", ""))[:10],
    ]
    return [each for each in said if each]


def tiles(manifest: Mapping[str, Any], findings: Findings | None, costs: Sequence[Cost] = ()) -> list[Tile]:
    """The numbers at the top."""
    shown = []
    if findings is not None and findings.by_layer is not None:
        shown += _of_sinks(findings.by_layer)
    if findings is not None and findings.layers is not None:
        shown.append(_of_layers(findings.layers))
    return [*shown, _cost(costs)]


def _of_sinks(by_layer: pd.DataFrame) -> list[Tile]:
    n_sinks = int(by_layer["n_sinks"].sum())
    if not n_sinks:
        return [Tile("attention sinks", "0", "in no layer")]
    share = percent(n_sinks / by_layer["n_visual"].sum())
    where = _layers(by_layer.loc[by_layer["n_sinks"] > 0, "layer"])
    n_dump, n_anchor, n_other = (int(by_layer[f"n_{role}"].sum()) for role in ROLE_NAMES)
    names = f"Probability Dumps ({n_dump:,}) / Structural Anchors ({n_anchor:,})"
    return [
        Tile("attention sinks", f"{n_sinks:,}", f"{where}; {share} of visual tokens, counted in each layer"),
        Tile(
            "roles of the sinks",
            f"{percent(n_dump / n_sinks)} / {percent(n_anchor / n_sinks)}",
            f"{names}; undetermined: {n_other:,}" if n_other else names,
        ),
    ]


def _of_layers(layers: pd.DataFrame) -> Tile:
    redundant = layers.loc[layers["redundant"], "layer"]
    note = _layers(redundant)
    if len(redundant):
        only = layers.loc[layers["visual_only"], "layer"]
        alone = f"for visual tokens only: {layer_ranges(only)}"
        note += f"; {alone if layers['n_text'].all() else 'no text tokens to compare with'}"
    return Tile("layers with a redundant FFN", f"{len(redundant)} of {len(layers)}", note)


def warnings(manifest: Mapping[str, Any], findings: Findings | None) -> list[str]:
    """The gravest cautions in a few words each; :func:`cautions` has them in full."""
    said = []
    n = int(manifest["n_samples"])
    if n < FEW_SAMPLES:
        said.append("a single sample" if n == 1 else f"few samples: {n}")
    if findings is None:
        return [*said, "nothing could be analysed"]
    if findings.by_layer is None:
        said.append("sinks not known")
    elif findings.tau < TAU and math.sqrt(width := int(manifest["d_model"])) <= TAU:
        said.append(
            f"sink threshold τ = {TAU:g} cannot be reached (sink strength φ is at most {math.sqrt(width):.3g} at width "
            f"{width}); τ = {findings.tau:g} is used instead"
        )
    if (
        findings.bimodality is not None
        and findings.by_layer is not None
        and findings.by_layer["n_sinks"].any()
    ):
        verdict = findings.bimodality.loc[findings.bimodality["layer"] < 0, "verdict"].iloc[0]
        if verdict == "too few":
            said.append("too few sinks to tell dumps from anchors")
        elif verdict != "bimodal":
            said.append(f"weak bimodality: dumps and anchors may be one kind ({verdict})")
    if findings.layers is None:
        said.append("redundant layers not known")
    return said


def _cost(costs: Sequence[Cost]) -> Tile:
    """What keeping a quarter of the visual tokens costs."""
    label = "pruned to 25 % of visual tokens"
    if not costs:
        return Tile(label, "not known", "give a run of confirm or depth as well")
    worst, best = (of(costs, key=lambda cost: cost.change) for of in (min, max))
    value, said = f"{points(best.change)} points", [best]
    if points(worst.change) != points(best.change):
        value, said = f"{points(worst.change)} to {value}", [worst, best]
    numbers = [
        f"{points(cost.change)} [{points(cost.low)}, {points(cost.high)}] before layer {cost.layer}"
        for cost in said
    ]
    of = [f"of {cost.measure}" for cost in said]
    asked = [count(cost.n, "question") for cost in said]
    if len(set(zip(of, asked, strict=True))) == 1:
        note = f"{of[0]}: {' and '.join(numbers)}; tokens kept by contribution, {asked[0]}, 95 % intervals"
    else:  # measured on other questions, or by another measure
        each = (f"{parts[0]} ({', '.join(parts[1:])})" for parts in zip(numbers, of, asked, strict=True))
        note = f"{' and '.join(each)}; tokens kept by contribution, 95 % intervals"
    return Tile(label, value, note)


def verdict(findings: Findings | None) -> list[str]:
    """One sentence on sinks and one on redundancy."""
    if findings is None:
        return []
    said = []
    if findings.by_layer is not None:
        said.append(_on_sinks(findings.by_layer, findings.tau, offsets(findings)))
    if findings.layers is not None:
        said.append(_on_redundancy(findings.layers, findings.eta))
    return said


def cautions(manifest: Mapping[str, Any], remarks: Sequence[str]) -> list[str]:
    """What a reader must know before believing the rest."""
    said = list(remarks)
    n = int(manifest["n_samples"])
    if n < FEW_SAMPLES:
        samples = "A single sample was" if n == 1 else f"Only {n} samples were"
        said.append(f"{samples} profiled: take the numbers as a first look, not as properties of the model.")
    skipped = manifest.get("skipped") or []
    if skipped and not any("left out" in remark for remark in remarks):
        samples = "1 sample was" if len(skipped) == 1 else f"{len(skipped):,} samples were"
        said.append(f"{samples} left out (listed under Settings).")
    return said


def is_right(example: Example) -> bool | None:
    """Whether the model gave an accepted answer, case, spaces and a final stop aside; None if none is known."""
    if not example.answers:
        return None
    given, *accepted = (
        " ".join(text.split()).casefold().rstrip(".") for text in (example.generated, *example.answers)
    )
    return given in accepted


def number(value: float) -> str:
    """Three digits, never an exponent where a reader can do without."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    text = f"{value:.3g}"
    return f"{value:,.0f}" if "e" in text and abs(value) >= 1 else text


def _layers(layers: pd.Series[int]) -> str:
    ranges = layer_ranges(layers)
    return ranges if layers.empty else f"layer{'' if len(layers) == 1 else 's'} {ranges}"


def _samples(n: int, findings: Findings | None) -> str:
    said = count(n, "sample")
    if findings is None or findings.layers is None:
        return said
    first = findings.layers.iloc[0]
    return f"{said} with {int(first['n_visual']):,} visual and {int(first['n_text']):,} text tokens"


def offset_dims(findings: Findings | None) -> list[list[int]]:
    """For each layer, the dimensions that were left out as offsets, which make no sinks."""
    if findings is None or findings.sinks is None:
        return []
    found, used = (findings.sinks.attrs.get(name) or [] for name in ("offsets", "dims_per_layer"))
    return [
        [int(dim) for dim in dims if layer >= len(used) or dim not in used[layer]]
        for layer, dims in enumerate(found)
    ]


def offsets(findings: Findings | None) -> str:
    """Dimensions that are large on too many visual tokens to tell sinks, and where; "" where there are none."""
    layers: dict[int, list[int]] = {}
    for layer, dims in enumerate(offset_dims(findings)):
        for dim in dims:
            layers.setdefault(dim, []).append(layer)
    said = [f"dimension {dim} in {_layers(pd.Series(where))}" for dim, where in sorted(layers.items())]
    more = len(said) - _MOST_OFFSETS
    return ", ".join(said[:_MOST_OFFSETS] + ([f"{more} more"] if more > 0 else []))


def _on_sinks(by_layer: pd.DataFrame, tau: float, offsets: str) -> str:
    n_sinks = int(by_layer["n_sinks"].sum())
    if not n_sinks:
        but = f", offsets aside ({offsets}, large on many tokens at once)" if offsets else ""
        return f"No visual token is an attention sink: none has a sink strength φ above τ = {tau:g}{but}."
    here = by_layer[by_layer["n_sinks"] > 0]
    said = f"{_layers(here['layer']).capitalize()} ha{'s' if len(here) == 1 else 've'} attention sinks"
    if here["attention_share"].notna().any():
        top = here.sort_values("attention_share", na_position="first").iloc[-1]
        where = f" In layer {int(top['layer'])}, where they get most, they" if len(here) > 1 else " They"
        said += (
            f".{where} are {percent(top['share_sinks'])} of the visual tokens and get "
            f"{percent(top['attention_share'])} of the attention that visual tokens get"
        )
    dumps = int(by_layer["n_dump"].sum())
    anchors = int(by_layer["n_anchor"].sum())
    parts = f"{percent(dumps / n_sinks)} of the sinks are Probability Dumps, {percent(anchors / n_sinks)}"
    return f"{said}. {parts} Structural Anchors."


def _on_redundancy(layers: pd.DataFrame, eta: float) -> str:
    redundant = layers.loc[layers["redundant"], "layer"]
    if redundant.empty:
        return f"In no layer does the FFN leave the direction of visual tokens as it was (cosine above η = {eta:g})."
    said = (
        f"In {len(redundant)} of {len(layers)} layers ({layer_ranges(redundant)}) the FFN leaves the direction of "
        f"visual tokens nearly as it was (cosine above η = {eta:g})"
    )
    only = layers.loc[layers["visual_only"], "layer"]
    if layers["text_cosine"].isna().any():
        return f"{said}; of text tokens nothing is known."
    if only.empty:
        return f"{said}; in each of them it does so to text tokens too."
    if len(only) == len(redundant):
        return f"{said}, but not that of text tokens."
    return f"{said}; in {_layers(only)} not that of text tokens."


def percent(share: float) -> str:
    """A share in per cent, two digits where it is small; 0 % is none and 100 % all, not nearly so."""
    if not math.isfinite(share):
        return "–"
    value = 100 * share
    if 99.5 <= value < 100:
        return ">99 %"
    if 0 < value < 0.01:
        return "<0.01 %"
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{value:.2g} %"

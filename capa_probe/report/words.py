"""What a report says in words: the summary on top, the cautions, and the strip of layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from capa_probe.analysis import layer_ranges
from capa_probe.examples import Example
from capa_probe.findings import Findings
from capa_probe.measures import TAU
from capa_probe.report.costs import Cost, points

#: Fewer samples than this say little about a model.
FEW_SAMPLES = 20
#: Height of the highest bar of the strip, in units of its drawing.
BAR_HEIGHT = 44.0


@dataclass(frozen=True)
class Tile:
    """A number at the top of the report."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Bar:
    """Part of a layer's bar in the strip: a role, and where it is drawn."""

    role: str
    top: float
    height: float


@dataclass(frozen=True)
class Cell:
    """One layer in the strip.

    Attributes:
        layer: from 0.
        ffn: "only" (redundant for visual tokens only), "both" (for text too), "no", or "" where not known.
        sinks: how many; None where not known.
        bars: its sinks by role, one upon the other.
        title: the numbers in words.
    """

    layer: int
    ffn: str
    sinks: int | None
    bars: tuple[Bar, ...]
    title: str


def model_name(manifest: Mapping[str, Any]) -> str:
    """The model's name; of a folder, its last part."""
    name = str(manifest.get("model", "unknown model"))
    return Path(name).name or name if Path(name).is_absolute() or Path(name).is_dir() else name


def tiles(manifest: Mapping[str, Any], findings: Findings | None, costs: Sequence[Cost] = ()) -> list[Tile]:
    """The numbers at the top."""
    n_layers = int(manifest["n_layers"])
    shown = [Tile("samples", f"{int(manifest['n_samples']):,}", _tokens(findings))]
    if findings is None:
        return [*shown, _cost(costs)]
    by_layer = findings.by_layer
    if by_layer is not None:
        n_sinks = int(by_layer["n_sinks"].sum())
        with_sinks = int((by_layer["n_sinks"] > 0).sum())
        found = f"in {with_sinks} of {n_layers} layers, one count per layer" if n_sinks else "in no layer"
        shown.append(Tile("attention sinks", f"{n_sinks:,}", found))
        if n_sinks:
            dumps, anchors = (int(by_layer[f"n_{role}"].sum()) for role in ("dump", "anchor"))
            note = f"of the sinks: {dumps:,}, and {anchors:,} anchors"
            shown.append(Tile("Probability Dumps", percent(dumps / n_sinks), note))
    if findings.layers is not None:
        redundant = findings.layers.loc[findings.layers["redundant"], "layer"]
        only = findings.layers.loc[findings.layers["visual_only"], "layer"]
        shown += [
            Tile("redundant FFN", f"{len(redundant)} of {n_layers}", _layers(redundant)),
            Tile("for visual tokens only", f"{len(only)}", _layers(only))
            if findings.layers["n_text"].all()
            else Tile("for visual tokens only", "–", "no text tokens"),
        ]
    return [*shown, _cost(costs)]


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
        most = f"φ is at most {math.sqrt(width):.3g} at width {width}"
        said.append(f"τ = {TAU:g} cannot be reached ({most}); τ = {findings.tau:g} is used instead")
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
    label = "keeping 25 % of visual tokens"
    if not costs:
        return Tile(label, "not known", "give a run of confirm or depth as well")
    worst, best = (of(costs, key=lambda cost: cost.change) for of in (min, max))
    value, layers = points(best.change), f"before layer {best.layer}"
    if points(worst.change) != value:
        value = f"{points(worst.change)} to {value}"
        layers = f"before layer {worst.layer} and {best.layer}"
    return Tile(label, value, f"points of {best.measure}, {layers}; {best.n:,} questions")


def verdict(findings: Findings | None) -> list[str]:
    """One sentence on sinks and one on redundancy."""
    if findings is None:
        return []
    said = []
    if findings.by_layer is not None:
        said.append(_on_sinks(findings.by_layer, findings.tau))
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


def strip(manifest: Mapping[str, Any], findings: Findings | None) -> list[Cell]:
    """One cell per layer; none where nothing is known."""
    if findings is None or (findings.layers is None and findings.by_layer is None):
        return []
    ffn = _by_layer(findings.layers)
    sinks = _by_layer(findings.by_layer)
    most = max((int(row["n_sinks"]) for row in sinks.values()), default=0)
    cells = []
    for layer in range(int(manifest["n_layers"])):
        state, number, said = "", None, [f"layer {layer}"]
        counts: dict[str, int] = {}
        if layer in ffn:
            row = ffn[layer]
            state = "only" if row["visual_only"] else "both" if row["redundant"] else "no"
            if row["redundant"] and not row["n_text"]:
                state = ""
            text = f"{row['text_cosine']:.4f} text" if row["n_text"] else "no text tokens"
            said.append(f"FFN cosine {row['visual_cosine']:.4f} visual, {text}")
        if layer in sinks:
            row = sinks[layer]
            number = int(row["n_sinks"])
            said.append(f"{number:,} sink{'' if number == 1 else 's'}")
            counts = {role: int(row[f"n_{role}"]) for role in ("dump", "anchor", "undetermined")}
        cells.append(Cell(layer, state, number, tuple(_stacked(counts, most)), "; ".join(said)))
    return cells


def _stacked(counts: Mapping[str, int], most: int) -> Iterator[Bar]:
    top = BAR_HEIGHT
    for role, number in counts.items():
        if number:
            height = BAR_HEIGHT * number / most
            top -= height
            yield Bar(role, top, height)


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


def _by_layer(table: pd.DataFrame | None) -> dict[int, Mapping[Any, Any]]:
    return {} if table is None else {int(row["layer"]): row for row in table.to_dict("records")}


def _layers(layers: pd.Series[int]) -> str:
    ranges = layer_ranges(layers)
    return ranges if layers.empty else f"layer{'' if len(layers) == 1 else 's'} {ranges}"


def _tokens(findings: Findings | None) -> str:
    if findings is None or findings.layers is None:
        return ""
    first = findings.layers.iloc[0]
    return f"{int(first['n_visual']):,} visual, {int(first['n_text']):,} text tokens"


def _on_sinks(by_layer: pd.DataFrame, tau: float) -> str:
    n_sinks = int(by_layer["n_sinks"].sum())
    if not n_sinks:
        return f"No visual token is an attention sink: none has a sink strength above τ = {tau:g}."
    here = by_layer[by_layer["n_sinks"] > 0]
    said = f"{_layers(here['layer']).capitalize()} ha{'s' if len(here) == 1 else 've'} attention sinks"
    if here["attention_share"].notna().any():
        top = here.sort_values("attention_share", na_position="first").iloc[-1]
        said += (
            f"; at most in layer {int(top['layer'])}, where {percent(top['share_sinks'])} of the visual tokens take "
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

"""The comparison as a tidy table: what each run says of its model, in the same words for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from capa_probe.analysis import layer_ranges
from capa_probe.benchmark.claims import judge
from capa_probe.benchmark.summary import ALL
from capa_probe.comparison.runs import CONFIRM, DEPTH, SHORT, ModelRuns

#: Shares of the visual tokens, and what chose them.
KEEPS = (0.5, 0.25, 0.1)
SCORES = ("contribution", "attention", "random")
ROLES = ("dump", "anchor", "undetermined")
CLAIMS = "claims"
_SAME = 1e-9


@dataclass(frozen=True)
class Entry:
    """One number, or one verdict, of one model.

    Attributes:
        row: what was measured.
        text: as it is shown.
        part: of what: a score, a layer; "" where there is only one.
        value: the number itself; NaN where it is none.
        low: lower end of its 95 % interval; NaN where there is none.
        high: upper end.
        verdict: on a claim; "" elsewhere.
    """

    row: str
    text: str
    part: str = ""
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    verdict: str = ""


COLUMNS = ("section", "row", "part", "model", "family", "text", "value", "low", "high", "verdict")


def compare(models: Sequence[ModelRuns]) -> pd.DataFrame:
    """What the runs say of each model.

    Args:
        models: as :func:`capa_probe.comparison.read_runs` returns them.

    Returns:
        One row per section, row, part and model: an :class:`Entry`, its section and whose it is. What a model has no
        run for has no row.
    """
    entries = [
        {"section": section, "model": model.name, "family": model.facts["family"], **asdict(entry)}
        for section, of in _SECTIONS.items()
        for model in models
        for entry in of(model)
    ]
    return pd.DataFrame(entries, columns=list(COLUMNS))


def _model(model: ModelRuns) -> Iterator[Entry]:
    facts = model.facts
    yield Entry("layers x width", f"{facts['n_layers']} x {facts['d_model']}")
    if model.profile is not None:
        layers = model.profile.layers
        first = layers[(layers["kind"] == "visual") & (layers["layer"] == 0) & (layers["step"] == 0)]
        fewest, most = int(first["n_tokens"].min()), int(first["n_tokens"].max())
        text = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
        yield Entry("visual tokens of an image or prompt", text, value=float(first["n_tokens"].mean()))
        n = int(model.profile.manifest["n_samples"])
        yield Entry("prompts profiled", f"{n:,}", value=n)
    if "stages" in model.manifests.get(CONFIRM, {}):
        for stage, layer in model.manifests[CONFIRM]["stages"].items():
            yield Entry("pruned before layer", str(layer), stage, layer)
    for kind in (CONFIRM, DEPTH):
        if kind in model.manifests:
            n, data = int(model.manifests[kind]["n_samples"]), model.manifests[kind]["data_fingerprint"]
            yield Entry(f"questions answered ({kind}), fingerprint", f"{n:,}, {data[:SHORT]}", value=n)


def _depth(model: ModelRuns) -> Iterator[Entry]:
    table = model.tables.get("depth", pd.DataFrame())
    if table.empty:
        return
    (row,) = _records(table[table["task"] == ALL])
    what = "accuracy" if row["measure"] == "correct" else "agreement with itself"
    yield _with_interval(f"{what} of the model itself", row, "whole")
    yield Entry(f"{what} without the image", f"{row['blank']:.3f}", value=row["blank"])
    last = int(row["last_layer"])
    yield Entry(
        "last layer before which removing all visual tokens costs something",
        "none" if last < 0 else str(last),
        value=math.nan if last < 0 else last,
    )
    for name, label in (
        ("gone_2", "cost of removing all visual tokens before layer 2"),
        ("gone_third", "cost of removing all visual tokens before a third of the depth"),
        ("random_25", "cost of keeping a random 25 % from layer 2 on"),
    ):
        if not math.isnan(row[name]):
            yield _with_interval(label, row, name)


def _ffn(model: ModelRuns) -> Iterator[Entry]:
    table = None if model.findings is None else model.findings.layers
    if table is None:
        table = model.tables.get("ffn_redundancy_layers")
    if table is None:
        return
    eta = model.manifests[CONFIRM]["settings"]["eta"] if model.findings is None else model.findings.eta
    yield Entry("threshold eta", f"{eta:g}", value=eta)
    for column, label in (
        ("redundant", "layers whose FFN is redundant for visual tokens"),
        ("visual_only", "layers whose FFN is redundant for visual tokens only"),
    ):
        layers = table.loc[table[column], "layer"]
        text = f"{len(layers)} of {len(table)}" + (f": {layer_ranges(layers)}" if len(layers) else "")
        yield Entry(label, text, value=len(layers))


def _sinks(model: ModelRuns) -> Iterator[Entry]:
    found = model.findings
    if found is None or found.totals is None or found.by_layer is None:
        return
    yield Entry("threshold tau", f"{found.tau:g}", value=found.tau)
    totals = {row["role"]: row for row in _records(found.totals)}
    n_visual = int(found.by_layer["n_visual"].sum())
    for role in ROLES:
        n = int(totals[role]["n_sinks"])
        yield Entry("sinks, of all visual tokens in all layers", f"{n:,} ({n / n_visual:.3%})", role, n)
    for role in ROLES[:2]:
        share = float(totals[role]["attention_share"])
        yield Entry("share of the attention to visual tokens that they take", f"{share:.2%}", role, share)
    for role in ROLES:
        places = found.by_layer.loc[found.by_layer[f"n_{role}"] > 0, "layer"]
        yield Entry("layers with sinks", layer_ranges(places) if len(places) else "none", role, len(places))


def _kept(model: ModelRuns) -> Iterator[Entry]:
    table = model.tables.get("budget", pd.DataFrame())
    if table.empty:
        return
    own = table[(table["task"] == ALL) & table["score"].isin(SCORES)]
    for itself in _records(own[own["keep"] == 1].head(1)):  # whatever would choose
        yield _with_interval("accuracy, all kept", itself, "correct")
    for stage, of in own.groupby("stage", sort=False):
        for keep in KEEPS:
            at = {row["score"]: row for row in _records(of[(of["keep"] - keep).abs() < _SAME])}
            for score in (score for score in SCORES if score in at):
                value, low, high = (float(at[score][f"correct{end}"]) for end in ("", "_low", "_high"))
                row = f"accuracy, {keep:.0%} kept, {stage}"
                yield Entry(row, f"{value:.3f}", score, value, low, high)


def _flops(model: ModelRuns) -> Iterator[Entry]:
    table = model.tables.get("together", pd.DataFrame())
    if table.empty:
        return
    own = table[(table["task"] == ALL) & (table["method"] == "capa")]
    for row in _records(own):
        for column, label in (("flops_share", "whole forward"), ("flops_share_as_published", "as published")):
            share = float(row[column])
            yield Entry(f"FLOPs of CAPA, {row['stage']}", f"{share:.1%}", label, share)


def _claims(model: ModelRuns) -> Iterator[Entry]:
    stages = model.manifests.get(CONFIRM, {}).get("stages", {})
    places = {f"layer {layer}": stage for stage, layer in stages.items()}
    for row in _records(judge(model.tables)):
        where, verdict = row["where"], row["verdict"]
        if where.startswith("layers "):  # experiment 4, on whichever are redundant
            where = "redundant layers"
        deciding = row["difference"], row["low"], row["high"]
        yield Entry(row["claim"], row["numbers"], places.get(where, where), *deciding, verdict)


def _with_interval(label: str, row: dict[str, Any], name: str) -> Entry:
    value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return Entry(label, f"{value:.3f} [{low:.3f}, {high:.3f}]", "", value, low, high)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


_SECTIONS: dict[str, Callable[[ModelRuns], Iterator[Entry]]] = {
    "model": _model,
    "depth": _depth,
    "FFN": _ffn,
    "sinks": _sinks,
    "tokens kept": _kept,
    "FLOPs": _flops,
    CLAIMS: _claims,
}

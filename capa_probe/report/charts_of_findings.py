"""Plots of what was found: how redundant the FFNs are, where the sinks lie, and what they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from capa_probe.figures.style import ROLE_NAMES
from capa_probe.findings import Findings
from capa_probe.report.chart import KINDS, Chart, Line, band, floats, known, samples
from capa_probe.report.runs import ShownRun


def ffn_cosine(runs: Sequence[ShownRun]) -> Chart:
    """Mean FFN cosine by layer of visual and of text tokens, with the threshold and the redundant layers."""
    lines, marks = [], []
    shaded: tuple[int, ...] = ()
    for number, run in enumerate(runs):
        table = None if run.findings is None else run.findings.layers
        if run.findings is None or table is None:
            continue
        for kind, label in KINDS.items():
            values = floats(table[f"{kind}_cosine"])
            ends = [floats(table[f"{kind}_{end}"]) if kind == "visual" else () for end in ("p05", "p95")]
            if known(values):
                ends = ends if all(known(end) for end in ends) else [(), ()]
                lines.append(Line(number, label, kind, values, *ends))
        marks.append((number, run.findings.eta, f"η = {run.findings.eta:g}"))
        shaded = tuple(int(layer) for layer in table.loc[table["redundant"], "layer"])
    where = "Shaded: redundant layers." if shaded and len(runs) == 1 else ""
    caption = (
        "Cosine between the residual stream that enters the FFN block and the one that leaves it, "
        "cos(x, x + FFN(norm(x))); mean over all visual and over all text tokens of "
        f"{samples(runs)} at prefill{band(runs, '5th to 95th percentile of single visual tokens')}. A layer whose "
        "visual tokens lie above η counts as redundant; where the text tokens do too, that says nothing particular "
        f"about visual tokens. The axis is logarithmic in 1 − cosine. {where}"
    ).strip()
    missing = "" if lines else " ".join(dict.fromkeys(_why(run, "Redundant layers") for run in runs))
    return Chart(
        "ffn_cosine",
        "FFN cosine",
        "cos(x, x + FFN(x))",
        "cosine",
        caption,
        tuple(lines),
        tuple(dict.fromkeys(marks)),
        shaded if len(runs) == 1 else (),
        missing,
    )


def sinks(runs: Sequence[ShownRun]) -> list[Chart]:
    """How many visual tokens are sinks, by role, and what these take; where there are none, only that is said."""
    counts = _of_sinks(runs, _counts)
    why = " ".join(dict.fromkeys(_why(run, "Sinks") for run in runs)) or "No visual token is a sink."
    caption = (
        f"Sinks in per cent of the visual tokens of {samples(runs)}, by role. Layers 0 and 1 never have any."
    )
    none = [
        run.name
        for run in runs
        if run.findings is not None and run.findings.sinks is not None and run.findings.sinks.empty
    ]
    if counts and none:
        caption += f" None in {', '.join(none)}."
    unit = "% of visual tokens"
    found = [
        Chart("sinks", "Attention sinks", unit, "linear", caption, counts, missing="" if counts else why)
    ]
    if not counts:
        return found
    caption = (
        "What sinks have of the attention that all visual tokens get from the last prompt token, and of their summed "
        f"contribution; mean over {samples(runs)}."
    )
    heading, unit = "Attention and contribution that sinks take", "% of visual tokens' sum"
    return [*found, Chart("sink_shares", heading, unit, "linear", caption, _of_sinks(runs, _taken))]


_Lines = Iterator[tuple[str, str, tuple[float, ...]]]


def _counts(found: Findings) -> _Lines:
    table = found.by_layer
    assert table is not None
    for role, name in ROLE_NAMES.items():
        if table[f"n_{role}"].any():
            yield f"{name}s", role, floats(100 * table[f"n_{role}"] / table["n_visual"])


def _taken(found: Findings) -> _Lines:
    table = found.by_layer
    assert table is not None
    for name in ("attention", "contribution"):
        if table["n_sinks"].any():
            yield f"share of {name}", name, floats(100 * table[f"{name}_share"])


def _of_sinks(runs: Sequence[ShownRun], of: Callable[[Findings], _Lines]) -> tuple[Line, ...]:
    return tuple(
        Line(number, label, look, values)
        for number, run in enumerate(runs)
        if run.findings is not None and run.findings.by_layer is not None
        for label, look, values in of(run.findings)
    )


def _why(run: ShownRun, what: str) -> str:
    said = [remark for remark in run.remarks if remark.startswith((what, f"No {what.lower()}"))]
    return " ".join(said or run.remarks) or f"{what} were not looked for."

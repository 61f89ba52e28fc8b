"""What the linked plots show: numbers by layer, one line for each run and kind of token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from capa_probe.figures.style import ROLE_NAMES, count
from capa_probe.findings import Findings
from capa_probe.report.runs import ShownRun

#: How an axis runs: "cosine" is logarithmic in 1 - x.
Axis = Literal["linear", "log", "cosine"]
_KINDS = {"visual": "visual tokens", "text": "text tokens"}


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        run: number of the run that it is of.
        label: what it is, without the run's name.
        look: names its colour and dash in the style sheet.
        values: one per layer, NaN where there is none.
        low, high: ends of a band around it, which is shown where there is a single run; empty for none.
    """

    run: int
    label: str
    look: str
    values: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Chart:
    """One plot over the decoder's layers.

    Attributes:
        name: its id.
        heading: above it.
        unit: of its numbers, at the axis.
        axis: how the vertical axis runs.
        caption: what it shows, of how many samples.
        lines: in the order of the legend.
        marks: runs, values and labels of thresholds.
        shaded: layers that are marked, where there is a single run.
        missing: why there is nothing to show; "" where there is something.
    """

    name: str
    heading: str
    unit: str
    axis: Axis
    caption: str
    lines: tuple[Line, ...]
    marks: tuple[tuple[int, float, str], ...] = ()
    shaded: tuple[int, ...] = field(default=())
    missing: str = ""


def charts(runs: Sequence[ShownRun]) -> list[Chart]:
    """All plots; one for which no run has numbers says why."""
    means = [_means(run) for run in runs]
    samples = _samples(runs)
    no_sinks = " ".join(dict.fromkeys(_why(run, "Sinks") for run in runs))
    return [
        _ffn_cosine(runs, samples),
        _roles(runs, samples, no_sinks),
        _taken(runs, samples, no_sinks),
        _to_visual(runs, samples),
        _measure(
            means,
            "contribution",
            "Attention contribution of a token",
            "L2 norm (units of the residual stream)",
            "log",
            "Median over a sample's tokens of what one token adds to the attention output of the last prompt token, "
            f"averaged over {samples}; band: 5th to 95th percentile.",
        ),
        _strength(runs, means, samples),
        _measure(
            means,
            "value_norm",
            "Norm of value vectors",
            "L2 norm (units of activations)",
            "log",
            f"Median over a sample's tokens, mean over key-value heads, averaged over {samples}; band: 5th to 95th "
            "percentile.",
        ),
        _update(means, "attn", "attention", samples),
        _update(means, "ffn", "the FFN", samples),
        _measure(
            means,
            "attn_cosine",
            "What attention turns",
            "cos(x, x + attention(x))",
            "cosine",
            "Cosine between the residual stream before and after the attention block, median over a sample's tokens, "
            f"averaged over {samples}; band: 5th to 95th percentile.",
        ),
    ]


def _means(run: ShownRun) -> dict[str, pd.DataFrame]:
    """Kind of token to statistics by layer, averaged over samples: a sample counts once, however long it is."""
    table = run.prof.layers
    table = table[table["step"] == 0].drop(columns=["sample", "step", "n_tokens"])
    return {
        str(kind): part.drop(columns="kind").groupby("layer").mean().reindex(range(run.n_layers))
        for kind, part in table.groupby("kind")
    }


def _measure(
    means: Sequence[dict[str, pd.DataFrame]],
    name: str,
    heading: str,
    unit: str,
    axis: Axis,
    caption: str,
    marks: tuple[tuple[int, float, str], ...] = (),
    more: Sequence[tuple[str, str, str]] = (),
) -> Chart:
    """A measured column by layer, for visual and for text tokens; ``more``: columns, labels and looks."""
    lines = []
    for run, by_kind in enumerate(means):
        for kind, table in by_kind.items():
            low, middle, high = (_floats(table[f"{name}_{end}"]) for end in ("p05", "p50", "p95"))
            if _known(middle):
                lines.append(Line(run, _KINDS[kind], kind, middle, low, high))
            for column, label, look in more:
                values = _floats(table[f"{column}_p50"])
                if _known(values):
                    lines.append(Line(run, f"{_KINDS[kind]}, {label}", f"{kind}-{look}", values))
    order = {kind: place for place, kind in enumerate(_KINDS)}
    lines.sort(key=lambda line: (line.run, order[line.look.split("-")[0]], "-" in line.look))
    missing = "" if lines else f"The profile lacks what this needs: {name} was not measured."
    return Chart(name, heading, unit, axis, caption, tuple(lines), marks, missing=missing)


def _ffn_cosine(runs: Sequence[ShownRun], samples: str) -> Chart:
    lines, marks = [], []
    shaded: tuple[int, ...] = ()
    for number, run in enumerate(runs):
        table = None if run.findings is None else run.findings.layers
        if run.findings is None or table is None:
            continue
        for kind, label in _KINDS.items():
            values = _floats(table[f"{kind}_cosine"])
            ends = [_floats(table[f"{kind}_{end}"]) if kind == "visual" else () for end in ("p05", "p95")]
            if _known(values):
                ends = ends if all(_known(end) for end in ends) else [(), ()]
                lines.append(Line(number, label, kind, values, *ends))
        marks.append((number, run.findings.eta, f"η = {run.findings.eta:g}"))
        shaded = tuple(int(layer) for layer in table.loc[table["redundant"], "layer"])
    where = "Shaded: redundant layers." if shaded and len(runs) == 1 else ""
    caption = (
        "Cosine between the residual stream that enters the FFN block and the one that leaves it, "
        "cos(x, x + FFN(norm(x))); mean over all visual and over all text tokens of "
        f"{samples} at prefill; band: 5th to 95th percentile of single visual tokens. A layer whose visual tokens lie "
        "above η counts as redundant; where the text tokens do too, that says nothing particular about visual tokens. "
        f"The axis is logarithmic in 1 − cosine. {where}"
    ).strip()
    missing = "" if lines else " ".join(dict.fromkeys(_why(run, "Redundant layers") for run in runs))
    return Chart(
        "ffn_cosine",
        "What the FFN turns",
        "cos(x, x + FFN(x))",
        "cosine",
        caption,
        tuple(lines),
        tuple(dict.fromkeys(marks)),
        shaded if len(runs) == 1 else (),
        missing,
    )


def _roles(runs: Sequence[ShownRun], samples: str, why: str) -> Chart:
    def of(found: Findings) -> Iterator[tuple[str, str, tuple[float, ...]]]:
        table = found.by_layer
        assert table is not None
        for role, name in ROLE_NAMES.items():
            if table[f"n_{role}"].any():
                yield f"{name}s", role, _floats(100 * table[f"n_{role}"] / table["n_visual"])

    lines = _of_sinks(runs, of)
    caption = f"Sinks in per cent of the visual tokens of {samples}, by role. Layers 0 and 1 have none by definition."
    missing = "" if lines else why or "No visual token is a sink."
    return Chart("sinks", "Attention sinks", "% of visual tokens", "linear", caption, lines, missing=missing)


def _taken(runs: Sequence[ShownRun], samples: str, why: str) -> Chart:
    def of(found: Findings) -> Iterator[tuple[str, str, tuple[float, ...]]]:
        table = found.by_layer
        assert table is not None
        for name in ("attention", "contribution"):
            if table["n_sinks"].any():
                yield f"of their {name}", name, _floats(100 * table[f"{name}_share"])

    lines = _of_sinks(runs, of)
    caption = (
        "What sinks have of the attention that all visual tokens get from the last prompt token, and of their summed "
        f"contribution; mean over {samples}."
    )
    missing = "" if lines else why or "No visual token is a sink."
    return Chart(
        "sink_shares", "What sinks take", "% of visual tokens' sum", "linear", caption, lines, missing=missing
    )


def _of_sinks(
    runs: Sequence[ShownRun], of: Callable[[Findings], Iterator[tuple[str, str, tuple[float, ...]]]]
) -> tuple[Line, ...]:
    return tuple(
        Line(number, label, look, values)
        for number, run in enumerate(runs)
        if run.findings is not None and run.findings.by_layer is not None
        for label, look, values in of(run.findings)
    )


def _to_visual(runs: Sequence[ShownRun], samples: str) -> Chart:
    lines = []
    for number, run in enumerate(runs):
        table = run.prof.layers[run.prof.layers["step"] == 0]
        for name in ("attention", "contribution"):
            sums = table.assign(total=table[f"{name}_mean"].astype(float) * table["n_tokens"]).pivot_table(
                index=["sample", "layer"], columns="kind", values="total", aggfunc="sum", dropna=False
            )
            if not {"visual", "text"} <= set(sums) or not sums["visual"].abs().sum():
                continue
            share = 100 * sums["visual"] / (sums["visual"] + sums["text"])
            values = _floats(share.groupby("layer").mean().reindex(range(run.n_layers)))
            lines.append(Line(number, f"of the {name}", name, values))
    caption = (
        "Share of the attention of the last prompt token that goes to visual tokens, and their share of the summed "
        f"contribution of all tokens; mean over {samples}."
    )
    missing = "" if lines else "The profile lacks what this needs: attention of visual and text tokens."
    return Chart(
        "visual_share",
        "What visual tokens get",
        "% of all tokens",
        "linear",
        caption,
        tuple(lines),
        missing=missing,
    )


def _strength(runs: Sequence[ShownRun], means: Sequence[dict[str, pd.DataFrame]], samples: str) -> Chart:
    marks = [
        (number, run.findings.tau, f"τ = {run.findings.tau:g}")
        for number, run in enumerate(runs)
        if run.findings is not None and math.isfinite(run.findings.tau)
    ]
    caption = (
        "φ: the largest entry of the residual stream that enters a layer, in units of its root mean square; "
        f"median over a sample's tokens, averaged over {samples}; band: 5th to 95th percentile. A visual token above "
        "τ is a sink, unless so many are above it in the same dimension that this is an offset."
    )
    return _measure(
        means, "sink_strength", "Sink strength", "φ (no unit)", "log", caption, tuple(dict.fromkeys(marks))
    )


def _update(means: Sequence[dict[str, pd.DataFrame]], name: str, words: str, samples: str) -> Chart:
    stream = "resid_pre_norm" if name == "attn" else "resid_mid_norm"
    return _measure(
        means,
        f"{name}_update_norm",
        f"Added by {words}",
        "L2 norm (units of activations)",
        "log",
        f"What {words} adds to the residual stream, median over a sample's tokens, averaged over {samples}; band: 5th "
        "to 95th percentile. Dotted: the stream that it is added to.",
        more=((stream, "stream", "stream"),),
    )


def _samples(runs: Sequence[ShownRun]) -> str:
    numbers = [int(run.prof.manifest["n_samples"]) for run in runs]
    if len(runs) == 1:
        return count(numbers[0], "sample")
    return "the samples (" + ", ".join(
        f"{run.name}: {n:,}" for run, n in zip(runs, numbers, strict=True)
    ) + ")"  # fmt: skip


def _why(run: ShownRun, what: str) -> str:
    said = [remark for remark in run.remarks if remark.startswith((what, f"No {what.lower()}"))]
    return " ".join(said or run.remarks) or f"{what} were not looked for."


def _floats(column: Any) -> tuple[float, ...]:
    return tuple(np.asarray(column, dtype=float).tolist())


def _known(values: Sequence[float]) -> bool:
    return any(not math.isnan(value) for value in values)

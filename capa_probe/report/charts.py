"""What the linked plots show: numbers by layer, one line for each run and kind of token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from capa_probe.report import charts_of_findings
from capa_probe.report.chart import KINDS, Axis, Chart, Line, band, floats, known, samples
from capa_probe.report.runs import ShownRun
from capa_probe.report.words import offsets

_Means = Sequence[dict[str, pd.DataFrame]]


def charts(runs: Sequence[ShownRun]) -> list[Chart]:
    """All plots; one for which no run has numbers says why."""
    means = [_means(run) for run in runs]
    tokens = f"averaged over {samples(runs)}{band(runs)}"
    return [
        charts_of_findings.ffn_cosine(runs),
        *charts_of_findings.sinks(runs),
        _to_visual(runs),
        _measure(
            means,
            "contribution",
            "Attention contribution",
            "L2 norm (units of the residual stream)",
            "log",
            "What one token adds to the attention output of the last prompt token: median over a sample's tokens, "
            f"{tokens}.",
        ),
        _strength(runs, means, tokens),
        _measure(
            means,
            "value_norm",
            "Value norm",
            "L2 norm (units of activations)",
            "log",
            "L2 norm of a token's value vectors, mean over key-value heads: median over a sample's tokens, "
            f"{tokens}.",
        ),
        _update(means, "attn", "Attention update", "the attention block", tokens),
        _update(means, "ffn", "FFN update", "the FFN block", tokens),
        _measure(
            means,
            "attn_cosine",
            "Attention cosine",
            "cos(x, x + attention(x))",
            "cosine",
            "Cosine between the residual stream before and after the attention block: median over a sample's tokens, "
            f"{tokens}. The axis is logarithmic in 1 − cosine.",
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
    means: _Means,
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
            low, middle, high = (floats(table[f"{name}_{end}"]) for end in ("p05", "p50", "p95"))
            if known(middle):
                lines.append(Line(run, KINDS[kind], kind, middle, low, high))
            for column, label, look in more:
                values = floats(table[f"{column}_p50"])
                if known(values):
                    lines.append(Line(run, f"{KINDS[kind]}, {label}", f"{kind}-{look}", values))
    order = {kind: place for place, kind in enumerate(KINDS)}
    lines.sort(key=lambda line: (line.run, order[line.look.split("-")[0]], "-" in line.look))
    missing = "" if lines else f"The profile lacks what this needs: {name} was not measured."
    if lines and axis == "log" and not any(value > 0 for line in lines for value in line.values):
        lines, missing = [], "All values are 0."
    return Chart(name, heading, unit, axis, caption, tuple(lines), marks, missing=missing)


def _to_visual(runs: Sequence[ShownRun]) -> Chart:
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
            values = floats(share.groupby("layer").mean().reindex(range(run.n_layers)))
            lines.append(Line(number, f"share of {name}", name, values))
    caption = (
        "Share of the attention of the last prompt token that goes to visual tokens, and their share of the summed "
        f"contribution of all tokens; mean over {samples(runs)}."
    )
    missing = "" if lines else "The profile lacks what this needs: attention of visual and text tokens."
    return Chart(
        "visual_share",
        "Attention and contribution of visual tokens",
        "% of all tokens",
        "linear",
        caption,
        tuple(lines),
        missing=missing,
    )


def _strength(runs: Sequence[ShownRun], means: _Means, tokens: str) -> Chart:
    marks = [
        (number, run.findings.tau, f"τ = {run.findings.tau:g}")
        for number, run in enumerate(runs)
        if run.findings is not None and math.isfinite(run.findings.tau)
    ]
    caption = (
        "φ: the largest entry of the residual stream that enters a layer, in units of its root mean square: median "
        f"over a sample's tokens, {tokens}. A visual token above τ is a sink, unless so many are above it in the same "
        "dimension that this is an offset."
    )
    named = [(run, offsets(run.findings)) for run in runs]
    said = [f"{run.name}: {words}" if len(runs) > 1 else words for run, words in named if words]
    if said:
        caption += f" Offsets here: {'; '.join(said)}. Tokens above τ in no other dimension are no sinks."
    return _measure(
        means, "sink_strength", "Sink strength", "φ (no unit)", "log", caption, tuple(dict.fromkeys(marks))
    )


def _update(means: _Means, name: str, heading: str, block: str, tokens: str) -> Chart:
    stream = "resid_pre_norm" if name == "attn" else "resid_mid_norm"
    return _measure(
        means,
        f"{name}_update_norm",
        heading,
        "L2 norm (units of activations)",
        "log",
        f"L2 norm of what {block} adds to the residual stream: median over a sample's tokens, {tokens}. Dotted: norm "
        "of the stream that it is added to.",
        more=((stream, "stream", "stream"),),
    )

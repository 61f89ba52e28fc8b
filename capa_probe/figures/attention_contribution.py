"""Attention against contribution of visual tokens, layer by layer, with the sinks by role."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from capa_probe.analysis.reading import FIRST_LAYER
from capa_probe.errors import CapaProbeError
from capa_probe.figures.style import FAINT, QUIET, ROLE_NAMES, ROLES, NotebookFigure, count, headline, styled

COLUMNS = ("sample", "layer", "position", "kind", "attention", "contribution")
MAX_PANELS, MAX_COLUMNS = 8, 4
#: Points drawn per panel and role; numbers are taken from all tokens.
MAX_POINTS = 3000
_KEYS = ["sample", "layer", "position"]
_OTHER = "non-sink"
_AXES = ("attention", "contribution")


@styled
def attention_contribution(
    tokens_df: pd.DataFrame, sinks: pd.DataFrame, layers: Sequence[int] | None = None
) -> Figure:
    """Attention from the last prompt token against contribution to it, one point per visual token, log-log.

    Args:
        tokens_df: token rows of a profile (``prof.tokens``, or as few as the columns sample, layer, position, kind,
            attention, contribution of visual tokens); text tokens and decode steps are passed over.
        sinks: what ``classify_sinks(prof)`` returned; it may be empty.
        layers: which layers to show; None shows all up to eight, otherwise eight evenly spread.

    Raises:
        CapaProbeError: columns are missing, or there are no visual tokens in a layer.
    """
    missing = [name for name in COLUMNS if name not in tokens_df]
    if missing:
        raise CapaProbeError(
            f"The token rows lack the columns {', '.join(missing)}; give those of a profile."
        )
    tokens = tokens_df[tokens_df["kind"] == "visual"]
    if "step" in tokens:
        tokens = tokens[tokens["step"] == 0]
    shown = panel_layers(sorted(tokens["layer"].unique())) if layers is None else list(layers)
    empty = sorted(set(shown) - set(tokens["layer"]))
    if empty or not shown:
        where = f" of layer {', '.join(map(str, empty))}" if empty else ""
        raise CapaProbeError(
            f"There are no rows of visual tokens{where} to draw; give layers of a profile that keeps its visual rows."
        )
    tokens = tokens[tokens["layer"].isin(shown)]
    tokens = tokens[list(dict.fromkeys([*_KEYS, *_AXES]))].merge(
        sinks[[*_KEYS, "role"]].astype({"role": object}), on=_KEYS, how="left"
    )
    tokens["role"] = tokens["role"].fillna(_OTHER)
    floors = {axis: _floor(tokens[axis]) for axis in _AXES}

    n_rows = math.ceil(len(shown) / MAX_COLUMNS)
    columns = math.ceil(len(shown) / n_rows)
    figure = NotebookFigure(
        figsize=(max(2.55 * columns + 0.9, 7.8), (2.9 if n_rows == 1 else 2.5) * n_rows + 1.75)
    )
    grid = figure.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, layer in zip(grid.flat, shown, strict=False):
        _panel(axes, int(layer), tokens[tokens["layer"] == layer], floors)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
        grid[-2, list(grid.flat).index(axes) % columns].tick_params(labelbottom=True)
    for axis in (grid[0, 0].xaxis, grid[0, 0].yaxis):
        axis.set_major_locator(LogLocator(numticks=6))
        axis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=50))
        axis.set_minor_formatter(NullFormatter())

    width, height = figure.get_size_inches()
    top = headline(figure, "Attention to visual tokens and what they contribute", _subtitle(tokens, sinks))
    _legend(figure, tokens, top)
    figure.supxlabel(
        "attention from the last prompt token (probability, mean over heads)", fontsize=10, y=0.1 / height
    )
    figure.supylabel(
        "contribution to its attention output\n(L2 norm, residual-stream units)", fontsize=10, x=0.1 / width,
        y=(0.6 + (height - 1.75) / 2) / height,
    )  # fmt: skip
    figure.subplots_adjust(
        left=1.05 / width,
        right=1 - 0.12 / width,
        top=1 - (top + 0.78) / height,
        bottom=0.6 / height,
        wspace=0.1,
        hspace=0.36,
    )
    return figure


def panel_layers(layers: Sequence[int]) -> list[int]:
    """All layers up to eight, otherwise eight evenly spread, first and last among them."""
    if len(layers) <= MAX_PANELS:
        return [int(layer) for layer in layers]
    return [int(layers[i]) for i in np.linspace(0, len(layers) - 1, MAX_PANELS).round().astype(int)]


def rank_correlation(tokens: pd.DataFrame) -> float:
    """Spearman's correlation of attention and contribution; NaN where one of them is constant."""
    ranks = tokens[list(_AXES)].dropna().rank()
    if len(ranks) < 2 or (ranks.nunique() == 1).any():
        return math.nan
    return float(ranks["attention"].corr(ranks["contribution"]))


def _panel(axes: Any, layer: int, tokens: pd.DataFrame, floors: dict[str, float]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    rho = rank_correlation(tokens)
    axes.set_title(f"Layer {layer}", loc="left", fontweight="bold", pad=15)
    axes.set_title("ρ undefined" if math.isnan(rho) else f"ρ = {rho:.2f}", loc="right", pad=15)
    for role in (_OTHER, *ROLES):
        rows = tokens[tokens["role"] == role]
        if rows.empty:
            continue
        # Evenly from the whole table: no chance in it, and every sample has its share.
        drawn = rows.iloc[np.linspace(0, len(rows) - 1, min(len(rows), MAX_POINTS)).astype(int)]
        x, y = (drawn[axis].clip(lower=floors[axis]).to_numpy() for axis in _AXES)
        if role == _OTHER:
            style: dict[str, Any] = {
                "color": FAINT,
                "s": 7 if len(drawn) > 500 else 14,
                "alpha": 0.4,
                "linewidth": 0,
            }
        else:
            colour, marker = ROLES[role]
            style = {"color": colour, "marker": marker, "s": 26, "alpha": 0.9, "edgecolor": "white"}
            style["linewidth"] = 0.4
        sns.scatterplot(
            x=x, y=y, ax=axes, legend=False, rasterized=True, zorder=2 + (role != _OTHER), **style
        )
    numbers = tokens["role"].value_counts()
    found = [f"{numbers[role]:,} {role}" for role in ROLES if role in numbers]
    none = "no sinks" if layer >= FIRST_LAYER else f"sinks count from layer {FIRST_LAYER} on"
    axes.annotate(
        ", ".join(found) or none,
        (0, 1),
        (0, 4),
        "axes fraction",
        "offset points",
        color=QUIET,
        fontsize=8,
    )


def _subtitle(tokens: pd.DataFrame, sinks: pd.DataFrame) -> str:
    tau = sinks.attrs.get("tau")
    threshold = "" if tau is None else f" at τ = {tau:g}"
    n_sinks = int((tokens["role"] != _OTHER).sum())
    found = (
        f"{count(n_sinks, 'sink')}{threshold} in the layers shown"
        if n_sinks
        else f"No sinks{threshold} in the layers shown"
    )
    first = tokens["layer"] == tokens["layer"].iloc[0]
    size = (
        f"{count(tokens['sample'].nunique(), 'sample')}, {count(int(first.sum()), 'visual token')} per layer"
    )
    largest = max(tokens[["layer", "role"]].value_counts())
    thinned = f" (at most {MAX_POINTS:,} drawn of each kind)" if largest > MAX_POINTS else ""
    lines = [f"{found}; {size}{thinned}; ρ: Spearman's rank correlation"]
    zeros = int((tokens[list(_AXES)] <= 0).any(axis=1).sum())
    if zeros:
        lines.append(f"{count(zeros, 'token')} with a value of 0 drawn at the edge, left or bottom")
    return "\n".join(lines)


def _legend(figure: Figure, tokens: pd.DataFrame, top: float) -> None:
    plain = (
        "other visual token"
        if tokens["role"].isin(["anchor", "dump", "undetermined"]).any()
        else "visual token"
    )
    handles = [Line2D([], [], marker="o", linestyle="", color=FAINT, markersize=4, label=plain)]
    for role in ("anchor", "dump", "undetermined"):
        if (tokens["role"] == role).any():
            colour, marker = ROLES[role]
            handles.append(
                Line2D(
                    [], [], marker=marker, linestyle="", color=colour, markersize=6, label=ROLE_NAMES[role]
                )
            )
    width, height = figure.get_size_inches()
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.06 / width, 1 - (top + 0.03) / height),
        ncols=len(handles),
        borderaxespad=0,
        columnspacing=1.6,
        handletextpad=0.2,
    )


def _floor(values: pd.Series[float]) -> float:
    """Where zeros are drawn: a third of the smallest positive value, which a log axis can show."""
    positive = values[values > 0]
    return float(positive.min()) / 3 if len(positive) else 1e-12

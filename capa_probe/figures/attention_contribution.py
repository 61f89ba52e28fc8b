"""Attention against contribution of visual tokens, layer by layer, with the sinks by role and both distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from capa_probe.analysis.reading import FIRST_LAYER
from capa_probe.figures.scatter_tables import (
    AXES,
    OTHER,
    scatter_tables,
)
from capa_probe.figures.style import (
    FAINT,
    QUIET,
    ROLE_NAMES,
    ROLES,
    NotebookFigure,
    count,
    headline,
    headline_height,
    styled,
)

MAX_COLUMNS = 4
#: Height of the distribution above a panel and width of the one beside it, in inches, and the gap to the panel.
_MARGIN, _GAP = 0.24, 0.04


@styled
def attention_contribution(
    tokens_df: pd.DataFrame, sinks: pd.DataFrame, layers: Sequence[int] | None = None
) -> Figure:
    """Attention from the last prompt token against contribution to it, one point per visual token, log-log.

    Above and right of each panel are the distributions of both over all tokens, sinks apart from the others.

    Args:
        tokens_df: token rows of a profile (``prof.tokens``, or as few as the columns sample, layer, position, kind,
            attention, contribution of visual tokens); text tokens and decode steps are passed over.
        sinks: what ``classify_sinks(prof)`` returned; it may be empty.
        layers: which layers to show; None shows all up to eight, otherwise eight evenly spread.

    Raises:
        CapaProbeError: columns or values are missing, or there are no visual tokens in a layer.
    """
    return attention_contribution_drawn(scatter_tables(tokens_df, sinks, layers))


@styled
def attention_contribution_drawn(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """The same, from the tables that :func:`capa_probe.figures.scatter_tables.scatter_tables` made.

    Args:
        tables: ``points``, ``panels`` and ``margins``.
    """
    points, panels, margins = (tables[name] for name in ("points", "panels", "margins"))
    floors = {axis: _floor(points[axis]) for axis in AXES}
    n = len(panels)
    n_rows = math.ceil(n / MAX_COLUMNS)
    columns = math.ceil(n / n_rows)
    side = (2.15, 1.75 if n_rows > 1 else 2.1)  # of a panel, in inches
    left, right, below, between = 0.95, 0.2, 0.62, (0.2, 1.0)
    least = 7.8
    side = (max(side[0], (least - left - right) / columns - _MARGIN - between[0]), side[1])
    width = left + columns * (side[0] + _MARGIN + between[0]) + right - between[0]
    subtitle = _subtitle(panels)
    figure = NotebookFigure(figsize=(width, 10))
    top = headline_height(width, subtitle)
    above = top + 0.3 + _MARGIN + 0.5
    height = above + n_rows * side[1] + (n_rows - 1) * (between[1]) + below
    figure.set_size_inches(width, height)
    headline(figure, _TITLE, subtitle)
    grid = figure.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (_, panel) in zip(grid.flat, panels.iterrows(), strict=False):
        layer = int(panel["layer"])
        own, margin = (table[table["layer"] == layer] for table in (points, margins))
        _panel(axes, panel, own, margin, floors, side)
    for axes in grid.flat[n:]:
        axes.set_visible(False)
        grid[-2, list(grid.flat).index(axes) % columns].tick_params(labelbottom=True)
    for axis in (grid[0, 0].xaxis, grid[0, 0].yaxis):
        axis.set_major_locator(LogLocator(numticks=6))
        axis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=50))
        axis.set_minor_formatter(NullFormatter())
    _legend(figure, panels, top)
    figure.supxlabel(
        "attention from the last prompt token (probability, mean over heads)", fontsize=10, y=0.1 / height
    )
    figure.supylabel(
        "contribution to its attention output\n(L2 norm, residual-stream units)", fontsize=10, x=0.1 / width,
        y=(below + (height - above - below) / 2) / height,
    )  # fmt: skip
    figure.subplots_adjust(
        left=left / width,
        right=1 - (right + _MARGIN) / width,
        top=1 - above / height,
        bottom=below / height,
        wspace=(between[0] + _MARGIN) / side[0],
        hspace=between[1] / side[1],
    )
    return figure


def _panel(
    axes: Any,
    panel: pd.Series[Any],
    points: pd.DataFrame,
    margins: pd.DataFrame,
    floors: dict[str, float],
    side: tuple[float, float],
) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    pad = 72 * (_MARGIN + _GAP) + 15
    rho, layer = float(panel["rho"]), int(panel["layer"])
    axes.set_title(f"Layer {layer}", loc="left", fontweight="bold", pad=pad)
    axes.set_title("ρ undefined" if math.isnan(rho) else f"ρ = {rho:.2f}", loc="right", pad=pad)
    for role in (OTHER, *ROLES):
        drawn = points[points["role"] == role]
        if drawn.empty:
            continue
        x, y = (drawn[axis].clip(lower=floors[axis]).to_numpy() for axis in AXES)
        if role == OTHER:
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
        sns.scatterplot(x=x, y=y, ax=axes, legend=False, rasterized=True, zorder=2 + (role != OTHER), **style)
    _margins(axes, margins, side)
    numbers = {role: int(panel[f"n_{role}"]) for role in ROLES}
    found = [
        f"{n:,} {role}" if role == "undetermined" else count(n, role) for role, n in numbers.items() if n
    ]
    none = "no sinks" if layer >= FIRST_LAYER else f"sinks count from layer {FIRST_LAYER} on"
    axes.annotate(
        ", ".join(found) or none,
        (0, 1),
        (0, 72 * (_MARGIN + _GAP) + 3),
        "axes fraction",
        "offset points",
        color=QUIET,
        fontsize=8,
    )


def _margins(axes: Any, margins: pd.DataFrame, side: tuple[float, float]) -> None:
    """The distributions above (attention) and to the right (contribution), each role to its own height."""
    gap, size = (tuple(inches / of for of in side) for inches in (_GAP, _MARGIN))
    top = axes.inset_axes((0, 1 + gap[1], 1, size[1]), sharex=axes)
    right = axes.inset_axes((1 + gap[0], 0, size[0], 1), sharey=axes)
    for strip, axis in ((top, "attention"), (right, "contribution")):
        own = margins[margins["axis"] == axis]
        for role in (OTHER, *ROLES):
            bars = own[own["role"] == role]
            if bars.empty:
                continue
            low, high = (10 ** bars[end].to_numpy(np.float64) for end in ("low", "high"))
            share = bars["share"].to_numpy(np.float64) / bars["share"].max()
            colour = FAINT if role == OTHER else ROLES[role][0]
            style = {"align": "edge", "color": colour, "alpha": 0.75, "linewidth": 0}
            if strip is top:
                strip.bar(low, share, high - low, **style)
            else:
                strip.barh(low, share, high - low, **style)
        strip.set_axis_off()
    top.set_ylim(0, 1.02)
    right.set_xlim(0, 1.02)


_TITLE = "Attention to visual tokens and what they contribute"


def _subtitle(panels: pd.DataFrame) -> str:
    first = panels.iloc[0]
    tau = "" if math.isnan(first["tau"]) else f" at τ = {first['tau']:g}"
    n_sinks = int(panels[[f"n_{role}" for role in ROLES]].to_numpy().sum())
    found = (
        f"{count(n_sinks, 'sink')}{tau} in the layers shown"
        if n_sinks
        else f"No sinks{tau} in the layers shown"
    )
    size = f"{count(int(first['n_samples']), 'sample')}, {count(int(first['n_tokens']), 'visual token')} per layer"
    most = int(first["most"])
    largest = int(panels[[f"n_{role}" for role in (OTHER, *ROLES)]].to_numpy().max())
    thinned = f" (at most {most:,} drawn of each kind)" if largest > most else ""
    lines = [
        f"{found}; {size}{thinned}; ρ: Spearman's rank correlation over all of them",
        "Above and beside each panel: distributions over all tokens, each kind to its own height",
    ]
    zeros = int(panels["n_zero"].sum())
    if zeros:
        lines.append(f"{count(zeros, 'token')} with a value of 0 drawn at the edge, left or bottom")
    return "\n".join(lines)


def _legend(figure: Figure, panels: pd.DataFrame, top: float) -> None:
    found = [role for role in ("anchor", "dump", "undetermined") if panels[f"n_{role}"].any()]
    plain = "other visual token" if found else "visual token"
    handles = [Line2D([], [], marker="o", linestyle="", color=FAINT, markersize=4, label=plain)]
    for role in found:
        colour, marker = ROLES[role]
        handles.append(
            Line2D([], [], marker=marker, linestyle="", color=colour, markersize=6, label=ROLE_NAMES[role])
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

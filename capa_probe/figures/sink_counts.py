"""How many visual tokens are sinks in each layer, of which role, and how much of the attention they take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from capa_probe.analysis.reading import FIRST_LAYER
from capa_probe.errors import CapaProbeError
from capa_probe.figures.style import (
    INK,
    QUIET,
    ROLE_NAMES,
    ROLES,
    RULE,
    NotebookFigure,
    count,
    headline,
    styled,
)

COLUMNS = ("layer", "n_visual", "n_sinks", *(f"n_{role}" for role in ROLES), "share_sinks", "attention_share")


@styled
def sink_counts(by_layer: pd.DataFrame, tau: float | None = None, n_samples: int | None = None) -> Figure:
    """Sinks per layer, stacked by role; below, their share of the visual tokens and of those tokens' attention.

    Args:
        by_layer: what ``sink_summary(sinks)`` returned; there may be no sink in it.
        tau: the threshold on sink strength, to be named in the subtitle.
        n_samples: how many samples were looked at, likewise.

    Raises:
        CapaProbeError: the table is empty or lacks columns.
    """
    missing = [name for name in COLUMNS if name not in by_layer]
    if missing or by_layer.empty:
        what = f"lacks the columns {', '.join(missing)}" if missing else "is empty"
        raise CapaProbeError(f"The table of sinks by layer {what}; give what sink_summary returned.")
    table = by_layer.sort_values("layer")
    layers = table["layer"].to_numpy()

    figure = NotebookFigure(figsize=(max(7.8, min(0.3 * len(table) + 2, 12.0)), 4.9))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.35, 1))
    base = np.zeros(len(table))
    for role, (colour, _) in ROLES.items():
        number = table[f"n_{role}"].to_numpy(float)
        above.bar(layers, number, 0.72, bottom=base, color=colour, linewidth=0, zorder=2)
        base += number
    if len(table) <= 16:
        for layer, total in zip(layers, base, strict=True):
            if total:
                above.annotate(
                    f"{total:,.0f}", (layer, total), (0, 2), textcoords="offset points", ha="center", color=INK,
                    fontsize=8.5,
                )  # fmt: skip
    above.set_ylim(0, max(base.max() * 1.14, 1))
    above.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    above.set_ylabel("sinks\n(all samples)")

    counted = layers >= FIRST_LAYER
    attention, share = (
        np.where(counted, 100 * table[name].to_numpy(float), np.nan)
        for name in ("attention_share", "share_sinks")
    )
    below.plot(layers, attention, "o-", color=INK, markersize=5, linewidth=1.6, zorder=3)
    below.plot(layers, share, "D--", color=QUIET, markersize=3.5, linewidth=1.1, zorder=2.5)
    largest = np.nanmax([*attention, *share, 0.0])
    below.set_ylim(-0.04 * max(largest, 1), 1.12 * max(largest, 1))
    below.yaxis.set_major_locator(MaxNLocator(nbins=4))
    below.set_ylabel("share among\nvisual tokens (%)")
    below.set_xlabel("decoder layer (from 0)")
    for axes in (above, below):
        # Where there are none by definition.
        axes.axvspan(-0.5, FIRST_LAYER - 0.5, color=RULE, alpha=0.55, linewidth=0, zorder=0.5)
        axes.set_xlim(layers.min() - 0.5, layers.max() + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=18, integer=True, min_n_ticks=1))
        axes.grid(visible=False, axis="x")

    top = headline(figure, "Attention sinks by layer and role", _subtitle(table, tau, n_samples))
    _legend(figure, table, top)
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=0.95 / width,
        right=1 - 0.2 / width,
        top=1 - (top + 0.62) / height,
        bottom=0.58 / height,
        hspace=0.16,
    )
    figure.align_ylabels((above, below))
    return figure


def _subtitle(table: pd.DataFrame, tau: float | None, n_samples: int | None) -> str:
    at = "" if tau is None else f" at τ = {tau:g}"
    n_sinks = int(table["n_sinks"].sum())
    tokens = count(int(table["n_visual"].max()), "visual token")
    size = f"{'' if n_samples is None else count(n_samples, 'sample') + ', '}{tokens} per layer"
    found = f"{count(n_sinks, 'sink')}{at}" if n_sinks else f"No sinks{at}"
    counted = f"a token counts in every layer in which it is one, from layer {FIRST_LAYER} on"
    return f"{found}; {size}\n{counted}"


def _legend(figure: Figure, table: pd.DataFrame, top: float) -> None:
    found = [role for role in ROLES if table[f"n_{role}"].any()]
    roles: list[Any] = [Patch(color=ROLES[role][0], linewidth=0, label=ROLE_NAMES[role]) for role in found]
    shares = [
        Line2D([], [], color=INK, marker="o", markersize=5, linewidth=1.6, label="of the attention: what sinks take"),
        Line2D(
            [], [], color=QUIET, marker="D", markersize=3.5, linewidth=1.1, linestyle="--",
            label="of the tokens: how many are sinks",
        ),
    ]  # fmt: skip
    width, height = figure.get_size_inches()
    for row, handles in enumerate(part for part in (roles, shares) if part):
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.06 / width, 1 - (top + 0.02 + 0.24 * row) / height),
            ncols=len(handles),
            borderaxespad=0,
            columnspacing=1.6,
            handlelength=1.8,
        )

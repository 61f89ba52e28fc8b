"""Sizes by layer: of value vectors, and of what attention and FFN add to the residual stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from capa_probe.errors import CapaProbeError
from capa_probe.figures.style import (
    INK,
    ROLE_NAMES,
    ROLES,
    TEXT,
    VISUAL,
    NotebookFigure,
    count,
    headline,
    styled,
)

#: Panel: what it shows, its title, and the stream that it is added to.
_PANELS = (
    ("value_norm", "Value vectors", None),
    ("attn_update_norm", "Added by attention", "resid_pre_norm"),
    ("ffn_update_norm", "Added by the FFN", "resid_mid_norm"),
)
_KINDS = {"text": (TEXT, "s", "text tokens"), "visual": (VISUAL, "o", "visual tokens")}
_STREAM: Any = (0, (1, 1.4))


@styled
def norms(layers_df: pd.DataFrame, sinks: pd.DataFrame | None = None) -> Figure:
    """Median L2 norms of value vectors and of residual updates per layer, for visual and text tokens, log scale.

    Medians, since a massive token or two would carry a mean away.

    Args:
        layers_df: ``prof.layers``; decode steps are passed over. A norm that was not measured has no panel.
        sinks: what ``classify_sinks(prof)`` returned, to show the median value norm of each role as well.

    Raises:
        CapaProbeError: columns are missing, or none of the norms was measured.
    """
    names = [name for value, _, stream in _PANELS for name in (value, stream) if name]
    statistics = ("p05", "p50", "p95")
    needed = ["step", "layer", "kind", "n_tokens", "sample", *(f"{n}_{s}" for n in names for s in statistics)]
    missing = [name for name in needed if name not in layers_df]
    if missing:
        raise CapaProbeError(
            f"The table of layers lacks the columns {', '.join(missing)}; give prof.layers of a profile."
        )
    table = layers_df.loc[layers_df["step"] == 0, needed]
    panels = [panel for panel in _PANELS if table[f"{panel[0]}_p50"].notna().any()]
    if not panels:
        raise CapaProbeError(
            "This profile holds neither value norms nor residual updates; profile with the probes value_norm and "
            "residual."
        )
    # A sample counts once, however long it is.
    values = table.drop(columns=["sample", "n_tokens", "step"])
    means = {
        str(kind): part.drop(columns="kind").groupby("layer").mean() for kind, part in values.groupby("kind")
    }

    figure = NotebookFigure(figsize=(max(3.3 * len(panels) + 0.4, 7.8), 4.2))
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, title, stream) in zip(grid, panels, strict=True):
        axes.set_yscale("log")
        for kind, (colour, marker, _) in _KINDS.items():
            if kind in means:
                _line(axes, means[kind], name, stream, colour, marker)
        if name == "value_norm" and sinks is not None:
            _roles(axes, sinks)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("decoder layer (from 0)")
    _share_limits([axes for axes, panel in zip(grid, panels, strict=True) if panel[2]])
    for axes in grid:
        _ticks(axes)
    grid[0].set_ylabel("L2 norm (activation units)")

    top = headline(figure, "How large values and residual updates are", _subtitle(table))
    _legend(figure, top, panels, sinks if panels[0][0] == "value_norm" else None)
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=0.8 / width,
        right=1 - 0.15 / width,
        top=1 - (top + 0.6) / height,
        bottom=0.55 / height,
        wspace=0.22,
    )
    return figure


def _line(axes: Any, means: pd.DataFrame, name: str, stream: str | None, colour: str, marker: str) -> None:
    layers = means.index.to_numpy()
    low, middle, high = (means[f"{name}_{statistic}"].to_numpy(float) for statistic in ("p05", "p50", "p95"))
    axes.fill_between(layers, low, high, color=colour, alpha=0.16, linewidth=0, zorder=1)
    axes.plot(layers, middle, marker=marker, color=colour, markersize=4.5, linewidth=1.7, zorder=3)
    if stream:
        axes.plot(layers, means[f"{stream}_p50"], color=colour, linewidth=1.5, linestyle=_STREAM, zorder=2.5)


def _roles(axes: Any, sinks: pd.DataFrame) -> None:
    for role, (colour, marker) in ROLES.items():
        medians = sinks.loc[sinks["role"] == role].groupby("layer")["value_norm"].median().dropna()
        axes.plot(
            medians.index, medians, marker, color=colour, markersize=6.5, mec="white", mew=0.6, zorder=4
        )


def _share_limits(panels: list[Any]) -> None:
    if panels:
        limits = np.array([axes.get_ylim() for axes in panels])
        for axes in panels:
            axes.set_ylim(limits[:, 0].min(), limits[:, 1].max())


def _ticks(axes: Any) -> None:
    low, high = axes.get_ylim()
    decades = np.log10(high / low)
    # Within a decade or two, 10, 100, ... would leave the axis bare.
    subs = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if decades < 0.8 else (1, 2, 5) if decades < 2.5 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=30))
    axes.yaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=50))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _subtitle(table: pd.DataFrame) -> str:
    first = table[table["layer"] == table["layer"].min()]
    tokens = first.groupby("kind")["n_tokens"].sum()
    size = " and ".join(
        count(int(tokens[kind]), f"{kind} token") for kind in ("visual", "text") if kind in tokens.index
    )
    return (
        f"{count(first['sample'].nunique(), 'sample')} with {size}\n"
        "Lines: median over a sample's tokens; bands: 5th to 95th percentile; both averaged over samples"
    )


def _legend(figure: Figure, top: float, panels: Any, sinks: pd.DataFrame | None) -> None:
    kinds = [
        Line2D([], [], color=colour, marker=marker, markersize=4.5, linewidth=1.7, label=label)
        for colour, marker, label in reversed(_KINDS.values())
    ]
    if any(stream for _, _, stream in panels):
        label = "residual stream that it is added to"
        kinds.append(Line2D([], [], color=INK, linewidth=1.5, linestyle=_STREAM, label=label))
    found = [] if sinks is None else [role for role in ROLES if (sinks["role"] == role).any()]
    kinds += [
        Line2D([], [], linestyle="", color=ROLES[role][0], marker=ROLES[role][1], label=ROLE_NAMES[role])
        for role in found
    ]
    width, height = figure.get_size_inches()
    figure.legend(
        handles=kinds,
        loc="upper left",
        bbox_to_anchor=(0.06 / width, 1 - (top + 0.02) / height),
        ncols=len(kinds),
        borderaxespad=0,
        columnspacing=1.4,
        handlelength=1.8,
    )

"""Cosine of FFN input and output by layer, for visual and for text tokens, with its spread over single tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from capa_probe.analysis import layer_ranges
from capa_probe.errors import CapaProbeError
from capa_probe.figures.cosine_axis import cosine_limits, drawable, from_nines, nines
from capa_probe.figures.entry import ModelTables, Source
from capa_probe.figures.style import (
    FAINT,
    INK,
    QUIET,
    TEXT,
    VISUAL,
    NotebookFigure,
    count,
    headline,
    headline_height,
    run_looks,
    styled,
)

COLUMNS = (
    "layer",
    *(f"{kind}_{what}" for kind in ("visual", "text") for what in ("cosine", "low", "high")),
    "n_samples",
    "n_visual",
    "n_text",
    "redundant",
    "visual_only",
)
_TITLE = "What the FFN does to visual and to text tokens"


@styled
def ffn_cosine(layers_table: pd.DataFrame, eta: float = 0.96) -> Figure:
    """``cos(x, x + FFN(norm(x)))`` per layer: means with intervals, spread over tokens, eta, and redundant layers.

    Below, the share of single tokens above eta. The axis is logarithmic in ``1 - cosine``, since what matters is how
    near to 1 the cosine is.

    Args:
        layers_table: what ``redundant_layers(prof, eta)`` returned; the spread over tokens is left out where the
            profile kept no rows of them.
        eta: the threshold that it was called with.

    Raises:
        CapaProbeError: the table is empty or lacks columns.
    """
    table = _checked(layers_table)
    spread = _has_spread(table)
    room = 1.0 if spread else 0.0
    figure = NotebookFigure(figsize=(max(7.8, min(0.3 * len(table) + 2, 12.0)), 4.5 + room))
    panels = figure.subplots(2 if spread else 1, 1, sharex=True, squeeze=False,
                             height_ratios=(3.2, 1) if spread else None)[:, 0]  # fmt: skip
    axes = panels[0]
    _cosines(axes, table, eta)
    _limits(axes, [table], eta)
    _name_eta(axes, eta)
    axes.set_ylabel("cosine of FFN input and output\n(no unit; 1: direction unchanged)")
    if spread:
        _above(panels[1], table)
        panels[1].set_ylabel("tokens\nabove η")
    panels[-1].set_xlabel("decoder layer (from 0)")
    top = headline(figure, _TITLE, _subtitle(table, eta))
    width, height = figure.get_size_inches()
    handles = _handles([table])
    n_lines = 1 + (len(handles) > 3)
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.06 / width, 1 - (top + 0.02) / height),
        ncols=-(-len(handles) // n_lines),
        borderaxespad=0,
        columnspacing=1.6,
        handlelength=1.8,
    )
    figure.subplots_adjust(
        left=1.08 / width, right=1 - 0.75 / width, top=1 - (top + 0.18 + 0.2 * n_lines) / height,
        bottom=0.58 / height, hspace=0.12,
    )  # fmt: skip
    figure.align_ylabels(panels)
    return figure


def ffn_cosines_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`ffn_cosines` draws, from a profile.

    Raises:
        CapaProbeError: the profile has no FFN cosines.
    """
    if "layers" not in source.tables:
        raise CapaProbeError('This run holds no FFN cosines; profile with "ffn_cosine" among the probes.')
    table = source.tables["layers"]
    confidence = table.attrs.get("confidence", np.nan)
    return {"layers": table.assign(eta=float(source.settings["eta"]), confidence=confidence)}


@styled
def ffn_cosines(models: ModelTables) -> Figure:
    """The same for several models side by side, with one axis for all; for one model, :func:`ffn_cosine`.

    Args:
        models: name of a model -> ``layers``: what ``redundant_layers`` returned, with its ``eta`` in a column.

    Raises:
        CapaProbeError: a table is empty or lacks columns, the models were judged by different eta, or there are too
            many of them.
    """
    tables = {name: _checked(own["layers"]) for name, own in models.items()}
    looks = run_looks(tables)
    etas = sorted({float(eta) for table in tables.values() for eta in table["eta"].unique()})
    if len(etas) > 1:
        raise CapaProbeError(
            f"The models were judged by eta = {' and '.join(f'{eta:g}' for eta in etas)}; give profiles with one eta."
        )
    if len(looks) == 1:
        (table,) = tables.values()
        table.attrs = {"confidence": table["confidence"].iloc[0]} if table["confidence"].notna().all() else {}
        return ffn_cosine(table, etas[0])
    figure = NotebookFigure(figsize=(11.6, 5.4))
    grid = figure.subplots(
        2, len(tables), sharex="col", sharey="row", squeeze=False, height_ratios=(3.2, 1),
        width_ratios=[max(len(table), 12) for table in tables.values()],
    )  # fmt: skip
    lines = []
    for column, (name, table) in zip(grid.T, tables.items(), strict=True):
        _cosines(column[0], table, etas[0])
        if _has_spread(table):
            _above(column[1], table)
        column[0].set_title(name, loc="left", fontweight="bold")
        column[1].set_xlabel("decoder layer (from 0)")
        redundant = _named(table.loc[table["redundant"], "layer"].tolist())
        only = _named(table.loc[table["visual_only"], "layer"].tolist())
        n = count(int(table["n_samples"].iloc[0]), "sample")
        lines.append(f"{name}: redundant FFN in {redundant}; not so for text tokens: {only} ({n})")
    _limits(grid[0, 0], list(tables.values()), etas[0])
    _name_eta(grid[0, -1], etas[0])
    grid[0, 0].set_ylabel("cosine of FFN input and output\n(no unit; 1: direction unchanged)")
    grid[1, 0].set_ylabel("tokens\nabove η")
    shares = {_share(table) for table in tables.values()}
    share = shares.pop() if len(shares) == 1 else ""
    lines.append(f"Bands: {share}bootstrap over samples; redundant: mean cosine of visual tokens above η")
    width, height = figure.get_size_inches()
    top = headline_height(width, "\n".join(lines))
    height += top - 0.8
    figure.set_size_inches(width, height)
    headline(figure, _TITLE, "\n".join(lines))
    handles = _handles(list(tables.values()))
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.12 / width, 0.05 / height),
        ncols=-(-len(handles) // 2), borderaxespad=0, columnspacing=1.6, handlelength=1.8,
    )  # fmt: skip
    figure.subplots_adjust(
        left=1.08 / width, right=1 - 0.75 / width, top=1 - (top + 0.36) / height, bottom=1.02 / height,
        hspace=0.12, wspace=0.06,
    )  # fmt: skip
    figure.align_ylabels(grid[:, 0])
    return figure


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    missing = [name for name in COLUMNS if name not in table]
    if missing or table.empty:
        what = f"lacks the columns {', '.join(missing)}" if missing else "is empty"
        raise CapaProbeError(f"The table of layers {what}; give what redundant_layers returned.")
    return table.sort_values("layer")


def _has_spread(table: pd.DataFrame) -> bool:
    return "visual_p05" in table and bool(table["visual_p05"].notna().any())


def _cosines(axes: Any, table: pd.DataFrame, eta: float) -> None:
    """One panel of means, spread, eta and redundant layers."""
    layers = table["layer"].to_numpy()
    axes.set_yscale("function", functions=(nines, from_nines))
    for kind, colour, marker, shift in (("text", TEXT, "s", 0.16), ("visual", VISUAL, "o", -0.16)):
        if f"{kind}_p05" in table:
            low, middle, high = (drawable(table[f"{kind}_{of}"]) for of in ("p05", "p50", "p95"))
            axes.vlines(layers + shift, low, high, color=colour, linewidth=3.2, alpha=0.38, zorder=1.8)
            axes.scatter(layers + shift, middle, marker="_", color=colour, s=36, linewidth=1.6, zorder=2.1)
        mean, low, high = (drawable(table[f"{kind}_{what}"]) for what in ("cosine", "low", "high"))
        axes.fill_between(layers, low, high, color=colour, alpha=0.22, linewidth=0, zorder=2)
        axes.plot(layers, mean, color=colour, linewidth=1.8, zorder=3)
        if kind == "visual":
            above = table["redundant"].to_numpy(bool)
            axes.plot(layers[above], mean[above], marker, color=colour, markersize=6.5, zorder=4)
            axes.plot(layers[~above], mean[~above], marker, mec=colour, mfc="white", markersize=6.5, zorder=4)
        else:
            axes.plot(layers, mean, marker, color=colour, markersize=4.5, zorder=3.5)
    axes.axhline(eta, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=2.5)
    _shade(axes, table)
    axes.set_xlim(layers.min() - 0.5, layers.max() + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=18 if len(table) > 12 else 9, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")


def _shade(axes: Any, table: pd.DataFrame) -> None:
    """The redundant layers."""
    for layer in table.loc[table["redundant"], "layer"]:
        only = bool(table.loc[table["layer"] == layer, "visual_only"].iloc[0])
        axes.axvspan(
            layer - 0.5, layer + 0.5, color=VISUAL if only else FAINT, alpha=0.13, linewidth=0, zorder=0.5
        )


def _above(axes: Any, table: pd.DataFrame) -> None:
    """One panel of the share of single tokens above eta."""
    for kind, colour, marker, size in (("text", TEXT, "s", 3.5), ("visual", VISUAL, "o", 4.5)):
        share = table[f"{kind}_share_above"].to_numpy(float)
        axes.plot(table["layer"], share, marker=marker, color=colour, markersize=size, linewidth=1.3)
    _shade(axes, table)
    axes.set_ylim(-0.06, 1.06)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.grid(visible=False, axis="x")


def _name_eta(axes: Any, eta: float) -> None:
    # In the margin, where no curve can run through it.
    axes.annotate(
        f"η = {eta:g}",
        (1, eta),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=INK,
    )


def _subtitle(table: pd.DataFrame, eta: float) -> str:
    redundant = table.loc[table["redundant"], "layer"].tolist()
    only = table.loc[table["visual_only"], "layer"].tolist()
    finding = f"Redundant FFN (visual cosine above {eta:g}): {_named(redundant)}"
    if redundant:
        finding += f"; not so for text tokens: {_named(only)}"
    first = table.iloc[0]
    text = count(int(first["n_text"]), "text token")
    size = f"{count(int(first['n_samples']), 'sample')} with {int(first['n_visual']):,} visual and {text}"
    if table[["visual_low", "text_low"]].isna().all(axis=None):
        return f"{finding}\n{size}; no intervals from a single sample"
    return f"{finding}\n{size}; bands: {_share(table)}bootstrap over samples"


def _share(table: pd.DataFrame) -> str:
    """What the bands hold, such as "95 % "; "" where that is not known."""
    confidence = table.attrs.get("confidence", table["confidence"].iloc[0] if "confidence" in table else None)
    return "" if confidence is None or np.isnan(confidence) else f"{100 * confidence:g} % "


def _named(layers: list[int]) -> str:
    return f"layer{'' if len(layers) == 1 else 's'} {layer_ranges(layers)}" if layers else "none"


def _handles(tables: list[pd.DataFrame]) -> list[Any]:
    handles: list[Any] = [
        Line2D([], [], color=VISUAL, marker="o", markersize=6.5, linewidth=1.8, label="visual tokens, mean"),
        Line2D([], [], color=TEXT, marker="s", markersize=4.5, linewidth=1.8, label="text tokens, mean"),
    ]
    if not all(table["redundant"].all() for table in tables):
        label = "not redundant"
        handles.append(
            Line2D([], [], mec=VISUAL, mfc="white", marker="o", linestyle="", markersize=6.5, label=label)
        )
    if any(_has_spread(table) for table in tables):
        label = "single tokens: median, 5 to 95 %"
        handles.append(
            Line2D(
                [], [], color=QUIET, marker="|", linestyle="", markersize=11, mew=3.2, alpha=0.5, label=label
            )
        )
    if any((table["redundant"] & ~table["visual_only"]).any() for table in tables):
        handles.append(Patch(color=FAINT, alpha=0.3, linewidth=0, label="redundant for both"))
    if any(table["visual_only"].any() for table in tables):
        handles.append(Patch(color=VISUAL, alpha=0.2, linewidth=0, label="redundant for visual tokens only"))
    return handles


def _limits(axes: Any, tables: list[pd.DataFrame], eta: float) -> None:
    names = [f"{kind}_{of}" for kind in ("visual", "text") for of in ("cosine", "low", "high", "p05", "p95")]
    shown = [table[[name for name in names if name in table]].to_numpy(float).ravel() for table in tables]
    cosine_limits(axes, [*np.concatenate(shown), eta])

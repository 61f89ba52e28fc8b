"""Up to which layer a model looks at the image, and how many of its visual tokens it can spare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from capa_probe.figures.reading import check_columns
from capa_probe.figures.style import (
    FAINT,
    INK,
    QUIET,
    RULE,
    SCORES,
    NotebookFigure,
    count,
    headline,
    styled,
    task_looks,
)

#: What stays, in words, with colour, marker and whether it is filled.
_TOKENS = {
    "region_kept": ("only what is asked about", "#0072B2", "^", True),
    "others_kept": ("only as many others", "#0072B2", "^", False),
    "region_removed": ("all but what is asked about", "#D55E00", "v", True),
    "others_removed": ("all but as many others", "#D55E00", "v", False),
}
_SCORES = {score: look for score, look in SCORES.items() if score != "random"}
_NAMES = {"correct": "accuracy", "agrees": "agreement with the unpruned model"}
_NEEDED = {
    "depth": ("task", "measure", "n", "n_images", "whole", "blank", "last_layer"),
    "depth_gone": ("task", "layer"),
    "depth_kept": ("task", "layer", "keep", "score"),
}


@styled
def depth(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Accuracy by task with all visual tokens gone before each layer, and with some kept from a few layers on.

    A third panel, where the data say which regions the questions are about: with their tokens removed, or kept alone.

    Args:
        tables: what :func:`capa_probe.benchmark.depth.measure_depth` returned, or
            :func:`capa_probe.benchmark.store.read_tables` read.

    Raises:
        CapaProbeError: a table or a column is missing.
    """
    check_columns(tables, _NEEDED, "the tables of a run of capa-probe depth")
    verdict, regions = tables["depth"], tables.get("depth_regions", pd.DataFrame())
    overall = verdict.iloc[0]
    measure = str(overall["measure"])
    with_regions = not regions.empty
    ratios = (1.5, 1.0, 0.8) if with_regions else (1.5, 1.0)
    figure = NotebookFigure(figsize=(11.6 if with_regions else 9.0, 5.4))
    panels = figure.subplots(1, len(ratios), sharey=True, width_ratios=ratios)
    _gone(panels[0], tables["depth_gone"], measure)
    _kept(panels[1], tables, overall)
    if with_regions:
        _regions(panels[2], regions, overall)
    for axes in panels:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.grid(visible=False, axis="x")
    panels[0].set_ylabel(_NAMES[measure])
    top = headline(figure, "Up to which layer the image is read", _subtitle(overall, tables))
    per_row = [2 if axes is panels[0] else 1 for axes in panels]
    lines = max(
        -(-len(axes.get_legend_handles_labels()[1]) // n) for axes, n in zip(panels, per_row, strict=True)
    )
    width, height = figure.get_size_inches()
    height += 0.185 * max(lines - 5, 0)
    figure.set_size_inches(width, height)
    above, below = top + 0.4, 0.68 + 0.185 * lines
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.15 / width, top=1 - above / height, bottom=below / height, wspace=0.08
    )
    for axes, n in zip(panels, per_row, strict=True):
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.03, -0.57 / (height - above - below)), ncols=n,
            borderaxespad=0, columnspacing=1.4, handlelength=2.0, labelspacing=0.3,
        )  # fmt: skip
    return figure


def _gone(axes: Any, table: pd.DataFrame, measure: str) -> None:
    whole = table["layer"].max()
    tasks = [task for task in table["task"].unique() if task != "all"]
    for task, (colour, marker) in task_looks(tasks).items():
        own = table[table["task"] == task].sort_values("layer")
        sns.lineplot(
            x=own["layer"], y=own[measure], ax=axes, color=colour, marker=marker, markersize=5, linewidth=1.2,
            label=f"{task or 'no task'} (n = {own['n'].iloc[0]:,})", errorbar=None, legend=False,
        )  # fmt: skip
    own = table[table["task"] == "all"].sort_values("layer")
    axes.fill_between(
        own["layer"], own[f"{measure}_low"], own[f"{measure}_high"], color=INK, alpha=0.15, linewidth=0
    )
    label = f"all (n = {own['n'].iloc[0]:,}; band: 95 %)"
    axes.plot(own["layer"], own[measure], color=INK, linewidth=2.2, label=label, zorder=3)
    axes.set_title("All visual tokens gone", loc="left", fontweight="bold")
    axes.set_xlabel("gone before decoder layer (from 0)")
    axes.set_xlim(-0.35, whole + 0.35)
    ticks = [tick for tick in MaxNLocator(9, integer=True).tick_values(0, whole) if 0 <= tick < whole]
    axes.xaxis.set_major_locator(FixedLocator([*ticks, whole]))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: "never" if value == whole else f"{value:.0f}")
    )


def _kept(axes: Any, tables: Mapping[str, pd.DataFrame], overall: pd.Series[Any]) -> None:
    measure, table = str(overall["measure"]), tables["depth_kept"]
    table, gone = table[table["task"] == "all"], tables["depth_gone"]
    gone = gone[gone["task"] == "all"].set_index("layer")
    keeps = sorted(table["keep"].unique(), reverse=True)
    layers = sorted(table["layer"].unique())
    colours = sns.color_palette("viridis", n_colors=len(layers) + 1)
    for layer, colour in zip(layers, colours, strict=False):
        own = table[(table["layer"] == layer) & (table["score"] == "random")].set_index("keep").loc[keeps]
        # From all to none, which is the first panel's value at this layer.
        ends = [float(overall["whole"]), *own[measure], gone.loc[layer, measure]]
        low = [float(overall["whole_low"]), *own[f"{measure}_low"], gone.loc[layer, f"{measure}_low"]]
        high = [float(overall["whole_high"]), *own[f"{measure}_high"], gone.loc[layer, f"{measure}_high"]]
        x = np.arange(len(ends))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            x, ends, color=colour, marker="o", markersize=5, linewidth=1.7, label=f"from layer {layer} on"
        )
        for score, (_, marker) in _SCORES.items():
            scored = table[(table["layer"] == layer) & (table["score"] == score)]
            if len(scored):
                values = scored.set_index("keep").reindex(keeps)[measure]
                axes.plot(
                    x[1:-1], values, color=colour, marker=marker, markersize=6, linewidth=1.0, linestyle=":"
                )
    if set(table["score"]) - {"random"}:  # what the markers mean, in no layer's colour
        axes.plot([], [], color=QUIET, marker="o", markersize=5, linewidth=1.7, label="at random")
    for score, (_, marker) in _SCORES.items():
        if (table["score"] == score).any():
            name = f"by {score.replace('_', ' ')}"
            axes.plot(
                [], [], color=QUIET, marker=marker, markersize=6, linewidth=1.0, linestyle=":", label=name
            )
    axes.set_title(
        "Some kept" if set(table["score"]) - {"random"} else "Some kept, at random",
        loc="left",
        fontweight="bold",
    )
    axes.set_xlabel("visual tokens that stay")
    axes.set_xticks(range(len(keeps) + 2), ["all", *(f"{100 * keep:g} %" for keep in keeps), "none"])


def _regions(axes: Any, table: pd.DataFrame, overall: pd.Series[Any]) -> None:
    measure = str(overall["measure"])
    own = table[table["task"] == "all"]
    layers = sorted(own["layer"].unique())
    for number, (tokens, (name, colour, marker, filled)) in enumerate(_TOKENS.items()):
        rows = own[own["tokens"] == tokens].set_index("layer").loc[layers]
        x = np.arange(len(layers)) + 0.12 * (number - 1.5)
        ends = np.abs(rows[[f"{measure}_low", f"{measure}_high"]].to_numpy().T - rows[measure].to_numpy())
        axes.errorbar(
            x, rows[measure], yerr=ends, fmt=marker, color=colour, markersize=7, elinewidth=1.1,
            markerfacecolor=colour if filled else "white", label=name,
        )  # fmt: skip
    whole = own[own["tokens"] == "all"]
    axes.axhline(
        whole[measure].iloc[0], color=QUIET, linewidth=1.0, linestyle="--", label="unpruned", zorder=1
    )
    for between in range(len(layers) - 1):
        axes.axvline(between + 0.5, color=RULE, linewidth=0.7, zorder=0)
    axes.set_title(f"What is asked about (n = {whole['n'].iloc[0]:,})", loc="left", fontweight="bold")
    axes.set_xlabel("from layer")
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.tick_params(axis="y", color=FAINT)


def _subtitle(overall: pd.Series[Any], tables: Mapping[str, pd.DataFrame]) -> str:
    size = f"{count(int(overall['n']), 'question')} about {count(int(overall['n_images']), 'image')}"
    last, n_layers = int(overall["last_layer"]), int(tables["depth_gone"]["layer"].max())
    if last < 0:
        found = "Removing all visual tokens costs nothing before any layer"
    elif last == n_layers - 1:
        found = f"Removing all visual tokens costs something before every layer, up to the last of {n_layers}"
    else:
        found = (
            f"The last layer, of {n_layers}, before which removing all visual tokens costs something: {last}"
        )
    return f"{found}\n{size}; intervals: 95 % bootstrap over images"

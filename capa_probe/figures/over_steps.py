"""How far a pruned model's next-token distributions are from the model's own, over the steps of generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from capa_probe.figures.entry import ModelTables, Source
from capa_probe.figures.grid import finish, grid, span
from capa_probe.figures.reading import filled, interval_columns, overall, wanted
from capa_probe.figures.style import METHODS, QUIET, styled

_STEPS = ["method", "stage", "layer", "step", "task", "n", "n_images", *interval_columns("hellinger")]
_MAPS = ["layer", "against", "step", "task", "n", "n_images", *interval_columns("hellinger")]
#: Questions that a step must have to be drawn: a few answers are much longer than all others.
FEWEST = 5
#: Methods in words.
_NAMES = {
    "contribution": "CAPA: contribution",
    "every_step": "contribution, ranked anew at every step",
    "attention": "attention",
    "random": "random",
}

#: Least distance of two layers' numbers, in the unit of the axis.
_LABEL = 0.045


def over_steps_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`over_steps` draws, from a confirmation: all tasks together."""
    steps = filled(source.tables, "over_steps", _STEPS)[_STEPS]
    maps = overall(wanted(source.tables, "over_steps_maps", _MAPS))[_MAPS]
    maps = maps[maps["against"] == "previous"]
    return {"over_steps": steps.reset_index(drop=True), "over_steps_maps": maps.reset_index(drop=True)}


@styled
def over_steps(models: ModelTables) -> Figure:
    """Hellinger distance over generation steps: a panel per stage, a line per method; and how the maps change.

    The last panel shows, for each layer of the model itself, the distance of the contributions of visual tokens
    (divided by their sum) from those of the step before.

    Args:
        models: name of a model -> ``over_steps`` and ``over_steps_maps`` of its confirmation (experiment 6).

    Raises:
        CapaProbeError: a table or a column is missing, or there are too many models.
    """
    steps = {name: _reached(filled(tables, "over_steps", _STEPS)) for name, tables in models.items()}
    maps = {
        name: _reached(overall(wanted(tables, "over_steps_maps", _MAPS))) for name, tables in models.items()
    }
    columns = max(table["stage"].nunique() for table in steps.values()) + 1
    figure, axes = grid(steps, columns, size=(12.6, 2.6), sharey=True)
    for row, name in zip(axes, steps, strict=True):
        table = steps[name]
        stages = list(table.sort_values("layer")["stage"].unique())
        for panel, stage in zip(row, stages, strict=False):
            _panel(panel, table[table["stage"] == stage])
        for panel in row[len(stages) : -1]:
            panel.set_visible(False)
        _maps(row[-1], maps[name])
        row[0].set_ylabel("Hellinger distance")
    shown = [table[[f"hellinger{end}" for end in ("", "_high")]] for table in steps.values()]
    shown += [table.loc[table["against"] == "previous", ["hellinger"]] for table in maps.values()]
    axes[0, 0].set_ylim(
        -0.02, span([0, *np.concatenate([table.to_numpy(float).ravel() for table in shown])])[1]
    )
    for panel in axes[-1]:
        panel.set_xlabel("generation step, and n")
    drawn = set.union(*(set(table["method"]) for table in steps.values()))
    handles = [
        Line2D([], [], color=METHODS[method].colour, marker=METHODS[method].marker, markersize=6, linewidth=1.6,
               label=_NAMES[method])
        for method in _NAMES if method in drawn
    ]  # fmt: skip
    finish(
        figure, axes, steps, "What pruning does over the steps of generation",
        "Of next-token distributions before the same words (the model's own answer), pruned to the share of CAPA's "
        f"setting against unpruned, up to the last step that {FEWEST} answers reach (step 0 is the prompt); half of "
        "the samples ask for a description; bars: 95 % bootstrap over images\n"
        "Right: how far a step's map of contributions is from that of the step before, by layer, nothing pruned",
        handles, wspace=0.07, below=0.72, gap=0.9,
    )  # fmt: skip
    return figure


def _reached(table: pd.DataFrame) -> pd.DataFrame:
    """The steps that enough answers reach, or all there are where the first one has no more."""
    return table[table["n"] >= min(FEWEST, table["n"].max())] if len(table) else table


def _panel(panel: Any, table: pd.DataFrame) -> None:
    methods = [method for method in METHODS if (table["method"] == method).any()]
    for number, method in enumerate(methods):
        rows = table[table["method"] == method].sort_values("step")
        # The prompt's step is not pruned by a method that only begins behind it.
        rows = rows[rows["step"] > 0] if method == "every_step" else rows
        colour, marker = METHODS[method]
        _line(panel, rows, 0.1 * (number - (len(methods) - 1) / 2), color=colour, marker=marker, label=method)
    first = table.iloc[0]
    stage, where = str(first["stage"]), f"before layer {first['layer']}"
    panel.set_title(
        f"Pruned {where}" if stage.startswith("layer") else f"{stage}: {where}", loc="left", fontweight="bold"
    )
    _ticks(panel, table)


def _maps(panel: Any, table: pd.DataFrame) -> None:
    table = table[table["against"] == "previous"]
    layers = sorted(table["layer"].unique())
    colours = mpl.colormaps["viridis"].resampled(len(layers) + 1)
    ends = {}
    for number, layer in enumerate(layers):
        rows = table[table["layer"] == layer].sort_values("step")
        colour = mpl.colors.to_hex(colours(number))
        panel.plot(rows["step"], rows["hellinger"], color=colour, linewidth=1.3, label=f"layer {layer}")
        if len(layers) <= 12 or layer in (layers[0], layers[-1]):
            ends[layer] = (float(rows["step"].iloc[-1]), float(rows["hellinger"].iloc[-1]), colour)
    heights = apart([height for _, height, _ in ends.values()], _LABEL)
    for (layer, (step, height, colour)), place in zip(ends.items(), heights, strict=True):
        panel.annotate(
            f"{layer}", (step, height), xytext=(step + 0.045 * max(table["step"].max(), 1), place),
            color=colour, fontsize=8, va="center",
        )  # fmt: skip
    panel.set_title("Contribution maps, by layer", loc="left", fontweight="bold")
    _ticks(panel, table)


def apart(heights: Sequence[float], least: float) -> list[float]:
    """The same heights in the same order, moved as little as keeps each ``least`` above the one below it."""
    order = np.argsort(heights, kind="stable")
    steps = least * np.arange(len(order))
    # What is left of each once the steps are taken off must not fall: the nearest such numbers are means of blocks.
    blocks: list[tuple[float, int]] = []
    for value in np.asarray(heights, dtype=float)[order] - steps:
        total, n = float(value), 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / n:
            before = blocks.pop()
            total, n = total + before[0], n + before[1]
        blocks.append((total, n))
    moved = np.repeat([total / n for total, n in blocks], [n for _, n in blocks]) + steps
    placed = np.empty(len(order))
    placed[order] = moved
    return placed.tolist()


def _line(panel: Any, rows: pd.DataFrame, shift: float, **look: Any) -> None:
    middle, low, high = (rows[f"hellinger{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high"))
    panel.errorbar(
        rows["step"] + shift, middle, yerr=[abs(middle - low), abs(high - middle)], markersize=5, linewidth=1.4,
        elinewidth=0.8, **look,
    )  # fmt: skip


def _ticks(panel: Any, table: pd.DataFrame) -> None:
    """The steps, each with the number of samples that reach it."""
    n = table.groupby("step")["n"].max()
    steps = [int(step) for step in n.index]
    if len(steps) > 9:
        steps = [int(tick) for tick in MaxNLocator(8, integer=True).tick_values(steps[0], steps[-1])]
        steps = [step for step in steps if step in n.index]
    panel.xaxis.set_major_locator(FixedLocator(steps))
    panel.set_xticklabels([f"{step}\n{n[step]}" for step in steps], fontsize=8)
    panel.tick_params(axis="x", color=QUIET)
    panel.grid(visible=False, axis="x")

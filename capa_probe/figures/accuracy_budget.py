"""Accuracy against the share of visual tokens that stays, by score and by pruning stage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from capa_probe.figures.entry import ModelTables, Source
from capa_probe.figures.grid import finish, grid
from capa_probe.figures.reading import (
    MEASURE_NAMES,
    SHARES_BARS,
    ends,
    filled,
    interval_columns,
    measured,
    per_cent,
    sizes_of,
)
from capa_probe.figures.style import SCORES, styled

_COLUMNS = [
    "stage",
    "layer",
    "keep",
    "score",
    "task",
    "n",
    "n_images",
    *interval_columns("correct", "agrees"),
]
#: Sideways, in steps of the axis, so that intervals do not hide each other.
_SHIFT = 0.07


def accuracy_budget_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`accuracy_budget` draws, from a confirmation: all tasks together."""
    return {"budget": filled(source.tables, "budget", _COLUMNS)[_COLUMNS].reset_index(drop=True)}


@styled
def accuracy_budget(models: ModelTables) -> Figure:
    """Accuracy against the share of visual tokens that stays: a panel per stage, a line per score, a row per model.

    Args:
        models: name of a model -> ``budget`` of its confirmation (experiment 3).

    Raises:
        CapaProbeError: a table or a column is missing, or there are too many models.
    """
    found = {name: filled(tables, "budget", _COLUMNS) for name, tables in models.items()}
    columns = max(table["stage"].nunique() for table in found.values())
    figure, axes = grid(found, columns, sharey=True)
    for row, table in zip(axes, found.values(), strict=True):
        measure, stages = measured(table), list(table.sort_values("layer")["stage"].unique())
        for panel, stage in zip(row, stages, strict=False):
            _panel(panel, table[table["stage"] == stage], measure)
        for panel in row[len(stages) :]:
            panel.set_visible(False)
        row[0].set_ylabel(MEASURE_NAMES[measure])
    for panel in axes[-1]:
        panel.set_xlabel("visual tokens that stay")
    drawn = set.union(*(set(table["score"]) for table in found.values()))
    handles = [
        Line2D(
            [], [], color=colour, marker=marker, markersize=6, linewidth=1.6, label=score.replace("_", " ")
        )
        for score, (colour, marker) in SCORES.items()
        if score in drawn
    ]
    size = sizes_of(found)
    finish(
        figure,
        axes,
        found,
        "Accuracy against the visual tokens that stay, by score and pruning stage",
        f"{size}; {SHARES_BARS}; random: mean of repeated draws",
        handles,
    )
    return figure


def _panel(panel: Any, table: pd.DataFrame, measure: str) -> None:
    keeps = sorted(table["keep"].unique())
    scores = [score for score in SCORES if (table["score"] == score).any()]
    for number, score in enumerate(scores):
        rows = table[table["score"] == score].set_index("keep").reindex(keeps)
        x = np.arange(len(keeps)) + _SHIFT * (number - (len(scores) - 1) / 2)
        colour, marker = SCORES[score]
        panel.errorbar(
            x, rows[measure], yerr=ends(rows, measure), color=colour, marker=marker, markersize=5.5,
            linewidth=1.5, elinewidth=0.9, alpha=0.95, label=score,
        )  # fmt: skip
    panel.set_xticks(
        range(len(keeps)), ["all" if keep == 1 else f"{100 * keep:g} %" for keep in keeps], fontsize=8.5
    )
    per_cent(panel.yaxis)
    panel.grid(visible=False, axis="x")
    first = table.iloc[0]
    stage = str(first["stage"])
    where = f"before layer {first['layer']}"
    panel.set_title(
        where if stage.startswith("layer") else f"{stage}: {where}", loc="left", fontweight="bold"
    )

"""Accuracy against what it costs: FLOPs, and the measured time of the prefill and of a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from capa_probe.figures.entry import ModelTables, Source
from capa_probe.figures.grid import empty, finish, grid, span
from capa_probe.figures.reading import (
    MEASURE_NAMES,
    SHARES_BARS,
    ends,
    filled,
    interval_columns,
    measured,
    per_cent,
    sizes_of,
    wanted,
)
from capa_probe.figures.style import FFN, INK, QUIET, SCORES, STAGES, Look, styled

_CONDITION = ["task", "n", "n_images", *interval_columns("correct", "agrees"), "flops"]
_BUDGET = ["stage", "layer", "keep", "score", *_CONDITION]
_TOGETHER = ["method", "stage", "layer", *_CONDITION]
_TIME = ["stage", "phase", "n", "n_images", *interval_columns("ratio")]
#: Of the scores, those whose curves are drawn, with a line style.
_LINES = {"contribution": "-", "random": ":"}
_PANELS = ("FLOPs of the prefill", "Time of the prefill", "Time of a decode step")
#: As ``together_time`` has them.
_PHASES = ("prefill", "decode step")


def accuracy_cost_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`accuracy_cost` draws, from a confirmation: all tasks together."""
    budget = filled(source.tables, "budget", _BUDGET)[_BUDGET]
    found = {
        "budget": budget[budget["score"].isin(list(_LINES))],
        "together": filled(source.tables, "together", _TOGETHER)[_TOGETHER],
        "together_time": wanted(source.tables, "together_time", _TIME)[_TIME],
    }
    return {name: table.reset_index(drop=True) for name, table in found.items()}


@styled
def accuracy_cost(models: ModelTables) -> Figure:
    """Accuracy against FLOPs and measured time, each as a share of the unpruned model's.

    Lines are budgets (5 % to all visual tokens kept by contribution, or at random), one for each stage; large markers
    CAPA in full, pruning and Hadamard layers, and the Hadamard layers alone. Time is that of ``together_time``, for
    which the two models took turns on the same prompts; it was measured of CAPA in full alone.

    Args:
        models: name of a model -> ``budget``, ``together`` and ``together_time`` of its confirmation (experiments 3
            and 5).

    Raises:
        CapaProbeError: a table or a column is missing, or there are too many models.
    """
    figure, axes = grid(models, 3, ratios=(1.5, 1, 1), size=(11.8, 2.7), sharey=True)
    stages, wholes, times = dict[str, Look](), dict[str, pd.DataFrame](), dict[str, pd.DataFrame]()
    for row, (name, tables) in zip(axes, models.items(), strict=True):
        together = filled(tables, "together", _TOGETHER)
        budget, time = filled(tables, "budget", _BUDGET), wanted(tables, "together_time", _TIME)
        looks = stage_looks(list(budget.sort_values("layer")["stage"].unique()))
        stages |= looks
        measure = measured(together)
        whole = together[together["method"] == "vanilla"].iloc[0]
        _budgets(row[0], budget, looks, measure, float(whole["flops"]))
        _methods(row[0], together, looks, measure, together["flops"] / float(whole["flops"]))
        for panel, phase in zip(row[1:], _PHASES, strict=True):
            _timed(panel, together, time[time["phase"] == phase], looks, measure)
        for panel, title in zip(row, _PANELS, strict=True):
            per_cent(panel.yaxis)
            panel.set_title(title, loc="left", fontweight="bold")
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        row[0].set_ylabel(MEASURE_NAMES[measure])
        wholes[name] = together
        times[name] = time
    for panel in axes[-1]:
        panel.set_xlabel("share of the unpruned model's")
    ratios = np.concatenate(
        [time[interval_columns("ratio")].to_numpy(float).ravel() for time in times.values()]
    )
    for row in axes:
        row[0].set_xlim(0, max(1.08, 1.04 * row[0].dataLim.x1))
        row[0].xaxis.set_major_locator(MaxNLocator(6))
        for panel in row[1:]:
            panel.set_xlim(*span([1, *ratios], 0.08))
            panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    prompts = sorted({int(n) for time in times.values() for n in time["n"]})
    finish(
        figure, axes, models, "Accuracy against cost",
        f"{sizes_of(wholes)}; {SHARES_BARS}\nFLOPs with vision tower and scoring. Time: of CAPA "
        f"and of the unpruned model by turns, on {' or '.join(map(str, prompts))} prompts (across: 95 % "
        "bootstrap over images)",
        _handles(stages), wspace=0.07,
    )  # fmt: skip
    return figure


def stage_looks(stages: Sequence[str]) -> dict[str, Look]:
    """A look for each stage; stages that go by another name than the paper's have theirs by their order."""
    spare = [look for stage, look in STAGES.items() if stage not in stages]
    found = {}
    for stage in stages:
        found[stage] = STAGES[stage] if stage in STAGES else spare.pop(0) if spare else Look(QUIET, "o")
    return found


def _budgets(panel: Any, budget: pd.DataFrame, looks: dict[str, Look], measure: str, whole: float) -> None:
    for stage, look in looks.items():
        for score, line in _LINES.items():
            rows = budget[(budget["stage"] == stage) & (budget["score"] == score)].sort_values("keep")
            panel.plot(
                rows["flops"] / whole, rows[measure], color=look.colour, linestyle=line, linewidth=1.3, markersize=4,
                marker=look.marker, label=f"{stage} {score}",
            )  # fmt: skip


def _methods(
    panel: Any, together: pd.DataFrame, looks: dict[str, Look], measure: str, share: pd.Series[float]
) -> None:
    for stage, look in looks.items():
        own = together[(together["method"] == "capa") & (together["stage"] == stage)]
        _point(panel, share[own.index], own, measure, look.colour, SCORES["contribution"].marker, 10)
    own = together[together["method"] == "hadamard"]
    _point(panel, share[own.index], own, measure, *FFN["hadamard"], 7)
    own = together[together["method"] == "vanilla"]
    _point(panel, share[own.index], own, measure, INK, "s", 7)


def _timed(
    panel: Any, together: pd.DataFrame, time: pd.DataFrame, looks: dict[str, Look], measure: str
) -> None:
    if time.empty:
        empty(panel, "No time was measured.")
        return
    own = time.set_index("stage")
    for stage, look in looks.items():
        rows = together[(together["method"] == "capa") & (together["stage"] == stage)]
        if stage in own.index and len(rows):
            _point(
                panel, own.loc[[stage], "ratio"], rows, measure, look.colour, SCORES["contribution"].marker, 10,
                ends(own.loc[[stage]], "ratio"),
            )  # fmt: skip
    vanilla = together[together["method"] == "vanilla"]
    _point(panel, [1.0], vanilla, measure, INK, "s", 7)


def _point(
    panel: Any, x: Any, rows: pd.DataFrame, measure: str, colour: str, marker: str, size: float, across: Any = None
) -> None:  # fmt: skip
    if len(rows):
        panel.errorbar(
            x, rows[measure], yerr=ends(rows, measure), xerr=across, fmt=marker, color=colour, markersize=size,
            markeredgecolor="white", markeredgewidth=0.7, elinewidth=1.0, zorder=4, label=str(rows["method"].iloc[0]),
        )  # fmt: skip


def _handles(stages: dict[str, Look]) -> list[Line2D]:
    found = [
        Line2D(
            [],
            [],
            color=look.colour,
            marker=look.marker,
            markersize=5,
            linewidth=1.3,
            label=f"pruned {stage}" if " " not in stage else stage,
        )
        for stage, look in stages.items()
    ]
    found += [
        Line2D([], [], color=QUIET, linestyle=line, linewidth=1.3, label=f"kept by {score}"
               if score != "random" else "kept at random")
        for score, line in _LINES.items()
    ]  # fmt: skip
    for marker, colour, name in (
        (SCORES["contribution"].marker, QUIET, "CAPA: pruning and Hadamard layers"),
        (FFN["hadamard"].marker, FFN["hadamard"].colour, "Hadamard layers alone"),
        ("s", INK, "unpruned"),
    ):
        found.append(
            Line2D([], [], linestyle="", color=colour, marker=marker, markersize=8 if colour == QUIET else 6.5,
                   label=name)
        )  # fmt: skip
    return found

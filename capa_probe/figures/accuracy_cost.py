"""Accuracy against what it costs: FLOPs, the time of the prefill, and the time of whole answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from capa_probe.figures.entry import ModelTables, Source
from capa_probe.figures.grid import empty, finish, grid
from capa_probe.figures.reading import (
    MEASURE_NAMES,
    ends,
    interval_columns,
    measured,
    overall,
    per_cent,
    sizes_of,
    wanted,
)
from capa_probe.figures.style import FFN, INK, QUIET, SCORES, STAGES, Look, styled

_CONDITION = ["task", "n", "n_images", *interval_columns("correct", "agrees"), "flops", "seconds"]
_BUDGET = ["stage", "layer", "keep", "score", *_CONDITION]
_TOGETHER = ["method", "stage", "layer", *_CONDITION]
_TIME = ["stage", "phase", "n", "n_images", *interval_columns("ratio")]
#: Of the scores, those whose curves are drawn, with a line style.
_LINES = {"contribution": "-", "random": ":"}
_PANELS = ("FLOPs of the prefill", "Time of the prefill", "Time of the whole answer")


def accuracy_cost_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`accuracy_cost` draws, from a confirmation: all tasks together."""
    budget = overall(wanted(source.tables, "budget", _BUDGET))[_BUDGET]
    found = {
        "budget": budget[budget["score"].isin(list(_LINES))],
        "together": overall(wanted(source.tables, "together", _TOGETHER))[_TOGETHER],
        "together_time": wanted(source.tables, "together_time", _TIME)[_TIME],
    }
    return {name: table.reset_index(drop=True) for name, table in found.items()}


@styled
def accuracy_cost(models: ModelTables) -> Figure:
    """Accuracy against FLOPs, prefill time and answer time, each as a share of the unpruned model's.

    Lines are budgets (5 % to all visual tokens kept by contribution, or at random), one for each stage; large markers
    CAPA in full, pruning and Hadamard layers, and the Hadamard layers alone.

    Args:
        models: name of a model -> ``budget``, ``together`` and ``together_time`` of its confirmation (experiments 3
            and 5).

    Raises:
        CapaProbeError: a table or a column is missing, or there are too many models.
    """
    figure, axes = grid(models, 3, size=(11.8, 2.9), sharey=True)
    stages, wholes, prompts = dict[str, Look](), dict[str, pd.DataFrame](), set[int]()
    for row, (name, tables) in zip(axes, models.items(), strict=True):
        together = overall(wanted(tables, "together", _TOGETHER))
        budget, time = overall(wanted(tables, "budget", _BUDGET)), wanted(tables, "together_time", _TIME)
        looks = stage_looks(list(budget.sort_values("layer")["stage"].unique()))
        stages |= looks
        measure = measured(together)
        whole = together[together["method"] == "vanilla"].iloc[0]
        for panel, cost in zip((row[0], row[2]), ("flops", "seconds"), strict=True):
            _budgets(panel, budget, looks, measure, cost, float(whole[cost]))
            _methods(panel, together, looks, measure, together[cost] / float(whole[cost]))
        _prefill(row[1], together, time, looks, measure)
        for panel, title in zip(row, _PANELS, strict=True):
            per_cent(panel.yaxis)
            panel.set_xlim(0, max(1.12, 1.04 * panel.dataLim.x1))
            panel.set_title(title, loc="left", fontweight="bold")
            panel.xaxis.set_major_locator(MaxNLocator(6))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        row[0].set_ylabel(MEASURE_NAMES[measure])
        wholes[name] = together
        prompts |= set(time["n"].astype(int))
    for panel in axes[-1]:
        panel.set_xlabel("share of the unpruned model's")
    finish(
        figure, axes, models, "Accuracy against cost",
        f"{sizes_of(wholes)}, {' or '.join(map(str, sorted(prompts)))} prompts timed for the prefill; bars: 95 % "
        "bootstrap over images\nFLOPs with vision tower and scoring. Prefill: CAPA and the model turn by turn. Whole "
        "answer: wall time in batches, each setting run once, so that it is rough",
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


def _budgets(
    panel: Any, budget: pd.DataFrame, looks: dict[str, Look], measure: str, cost: str, whole: float
) -> None:
    for stage, look in looks.items():
        for score, line in _LINES.items():
            rows = budget[(budget["stage"] == stage) & (budget["score"] == score)].sort_values("keep")
            panel.plot(
                rows[cost] / whole, rows[measure], color=look.colour, linestyle=line, linewidth=1.3, markersize=3,
                marker="o", label=f"{stage} {score}",
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


def _prefill(
    panel: Any, together: pd.DataFrame, time: pd.DataFrame, looks: dict[str, Look], measure: str
) -> None:
    own = time[time["phase"] == "prefill"].set_index("stage")
    if own.empty:
        empty(panel, "No time was measured.")
        return
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
        Line2D([], [], color=look.colour, linewidth=3, label=f"pruned {stage}" if " " not in stage else stage)
        for stage, look in stages.items()
    ]
    found += [
        Line2D([], [], color=QUIET, linestyle=line, marker="o", markersize=3, linewidth=1.3, label=f"kept by {score}"
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

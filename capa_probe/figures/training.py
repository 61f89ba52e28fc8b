"""How a demo model was trained: loss and right answers by stage and task, and what it answers in the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from capa_probe.errors import CapaProbeError
from capa_probe.figures.entry import ModelTables, Source
from capa_probe.figures.grid import finish, grid
from capa_probe.figures.reading import per_cent, wanted
from capa_probe.figures.style import FAINT, INK, QUIET, styled, task_looks

LOG_COLUMNS = ["stage", "step", "seconds", "loss", "task", "right"]
_TEST_COLUMNS = ["task", "n", "accuracy", "low", "high", "blank", "majority"]
#: Stages whose questions are about single patches, with names of their own.
_TOWER = ("tower", "shrunk")
#: Lines of the log that a mean is taken over.
WINDOW = 3
_BY = "scripts/train_demo_lvlm.py"


def training_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`training` draws, from a demo model's folder."""
    return {
        "training": wanted(source.tables, "training", LOG_COLUMNS, _BY)[LOG_COLUMNS],
        "evaluation": wanted(source.tables, "evaluation", _TEST_COLUMNS, _BY)[_TEST_COLUMNS],
    }


@styled
def training(models: ModelTables) -> Figure:
    """Loss and share of right answers over the steps of each stage, and test accuracy by task, a row per model.

    Args:
        models: name of a model -> ``training`` and ``evaluation`` of its folder.

    Raises:
        CapaProbeError: a table or a column is missing, there are too many models, or a log is empty.
    """
    logs = {name: wanted(tables, "training", LOG_COLUMNS, _BY) for name, tables in models.items()}
    tests = {name: wanted(tables, "evaluation", _TEST_COLUMNS, _BY) for name, tables in models.items()}
    for name, log in logs.items():
        if log.empty:
            raise CapaProbeError(
                f"The training log of {name} is empty; give the folder of a trained demo model."
            )
    stages = max((list(log["stage"].unique()) for log in logs.values()), key=len)
    ratios = [0.7 if _asks_nothing(logs, stage) else 1.0 for stage in stages]
    figure, axes = grid(models, len(stages) + 1, ratios=[*ratios, 1.5], size=(13.4, 3.3))
    n = sorted({int(n) for test in tests.values() for n in test["n"]})
    finish(
        figure, axes, models, f"How the demo model{'s were' if len(models) > 1 else ' was'} trained",
        f"By stage, over its steps: loss, and share of right answers to questions about new boards (mean of {WINDOW} "
        "lines of the log, 25 steps each); the stage projector asks nothing\nRight: accuracy on the test split "
        f"(n = {' or '.join(map(str, n))} per task) with Wilson's 95 % interval; grey bar: with a blank image; |: "
        "always giving the most frequent answer",
        _handles(logs, tests), wspace=0.28, gap=0.95, below=0.5,
    )  # fmt: skip
    for row, name in zip(axes, models, strict=True):
        log, test = logs[name], tests[name]
        looks = task_looks([*test["task"], *log.loc[~log["stage"].isin(_TOWER), "task"]])
        for panel, stage in zip(row, stages, strict=False):
            own = log[log["stage"] == stage]
            above = _split(figure, panel)
            minutes = f" ({own['seconds'].iloc[-1] / 60:.0f} min)" if len(own) else ""
            above.set_title(f"{stage}{minutes}", loc="left", fontweight="bold", fontsize=9.5)
            _loss(above, own, labelled=_asks_nothing(logs, stage))
            _right(panel, own, task_looks(own["task"]) if stage in _TOWER else looks)
            if panel is row[0]:
                above.set_ylabel("loss")
                panel.set_ylabel("share right")
        _test(row[-1], test, looks)
    return figure


def smoothed(log: pd.DataFrame) -> pd.DataFrame:
    """Share of right answers, (step, task), each the mean of up to three lines of the log around it."""
    table = log[log["task"] != ""].pivot(index="step", columns="task", values="right").sort_index()
    return table.rolling(WINDOW, min_periods=1, center=True).mean().where(table.notna())


def _asks_nothing(logs: dict[str, pd.DataFrame], stage: str) -> bool:
    return not any((log.loc[log["stage"] == stage, "task"] != "").any() for log in logs.values())


def _split(figure: Figure, panel: Any) -> Any:
    """Shorten a panel, and make one above it in the room that it leaves."""
    box = panel.get_position()
    panel.set_position([box.x0, box.y0, box.width, 0.64 * box.height])
    return figure.add_axes((box.x0, box.y0 + 0.7 * box.height, box.width, 0.3 * box.height))


def _loss(panel: Any, log: pd.DataFrame, labelled: bool) -> None:
    rows = log.drop_duplicates("step")
    panel.plot(rows["step"], rows["loss"], color=INK, linewidth=1.2)
    panel.set_yscale("log")
    panel.tick_params(labelbottom=labelled, labelsize=8)
    panel.set_xlabel("step" if labelled else "")
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.minorticks_off()


def _right(panel: Any, log: pd.DataFrame, looks: Any) -> None:
    table = smoothed(log)
    if table.empty:
        panel.set_axis_off()
        return
    for task in table.columns:
        values = table[task].dropna()
        colour, marker = looks[task]
        every = max(len(values) // 5, 1)
        panel.plot(
            values.index, values, color=colour, marker=marker, markersize=4, markevery=(0, every), linewidth=0.9,
            label=task,
        )  # fmt: skip
    per_cent(panel.yaxis)
    panel.tick_params(labelsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.set_xlabel("step")
    if set(log["stage"]) <= set(_TOWER):  # questions of its own
        panel.legend(fontsize=6, loc="lower right", handlelength=1.4, labelspacing=0.15, borderaxespad=0.1)


def _test(panel: Any, test: pd.DataFrame, looks: Any) -> None:
    panel.set_title("test split", loc="left", fontweight="bold", fontsize=9.5)
    box = panel.get_position()
    panel.set_position([box.x0 + 0.3 * box.width, box.y0, 0.7 * box.width, box.height])  # room for names
    y = np.arange(len(test))[::-1]
    panel.barh(y, test["blank"], color=FAINT, height=0.62, alpha=0.55, linewidth=0, zorder=1)
    panel.plot(test["majority"], y, linestyle="", marker="|", color=QUIET, markersize=9, markeredgewidth=1.6)
    found = test[["accuracy", "low", "high"]].to_numpy(dtype=float)
    for place, task, (middle, low, high) in zip(y, test["task"], found, strict=True):
        colour, marker = looks[task]
        panel.errorbar(
            [middle], [place], xerr=[[max(middle - low, 0.0)], [max(high - middle, 0.0)]], fmt=marker, color=colour, markersize=5,
            elinewidth=1.0,
        )  # fmt: skip
    panel.set_yticks(y, list(test["task"]), fontsize=7.5)
    panel.set_xlim(-0.02, 1.03)
    panel.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"], fontsize=8)
    panel.grid(visible=False, axis="y")
    panel.set_xlabel("accuracy")


def _handles(logs: dict[str, pd.DataFrame], tests: dict[str, pd.DataFrame]) -> list[Line2D]:
    names = [task for test in tests.values() for task in test["task"]]
    names += [task for log in logs.values() for task in log.loc[~log["stage"].isin(_TOWER), "task"]]
    return [
        Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=1.2, label=task)
        for task, (colour, marker) in task_looks(names).items()
        if task
    ]

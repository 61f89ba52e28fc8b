"""How a demo model was trained: loss and right answers by stage and task, and what it answers in the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from capa_probe.errors import CapaProbeError
from capa_probe.figures.entry import ModelTables, Source
from capa_probe.figures.grid import empty, finish, grid
from capa_probe.figures.reading import per_cent, wanted
from capa_probe.figures.style import FAINT, INK, QUIET, Look, styled, task_looks

LOG_COLUMNS = ["stage", "step", "seconds", "loss", "task", "right"]
_TEST_COLUMNS = ["task", "n", "accuracy", "low", "high", "blank", "majority"]
#: Stages whose questions are about single patches, with names of their own.
_TOWER = ("tower", "shrunk")
#: Lines of the log that a mean is taken over.
WINDOW = 3
#: Of a long stage, a mean is of so many parts of it.
_PARTS = 20
_BY = "scripts/train_demo_lvlm.py"
#: Inches: between stages, of the test split, and left of it.
_GAP, _TEST, _NAMES = 0.14, 2.0, 0.98


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
    figure, axes = grid(models, 1, size=(14.0, 3.3))
    looks = task_looks([*_tasks(logs, tests)])
    n = sorted({int(n) for test in tests.values() for n in test["n"]})
    finish(
        figure, axes, models, f"How the demo model{'s were' if len(models) > 1 else ' was'} trained",
        "By stage, over its steps: loss, and share of right answers to questions about new boards (mean of "
        f"{WINDOW} lines of the log{_every(logs)}, or of a twentieth of the stage where that is more)\n"
        "Right: accuracy on the test split (n = "
        f"{' or '.join(map(str, n))} per task) with Wilson's 95 % interval; grey bar: with a blank image; |: always "
        "giving the most frequent answer",
        _handles(logs, looks), gap=0.95, below=0.5,
    )  # fmt: skip
    losses = np.concatenate([log["loss"].to_numpy(float) for log in logs.values()])
    limits = (losses.min() / 1.2, losses.max() * 1.2)
    for (space,), name in zip(axes, models, strict=True):
        log, test = logs[name], tests[name]
        stages = list(log["stage"].unique())
        *panels, last = _divided(figure, space, len(stages))
        for number, (panel, stage) in enumerate(zip(panels, stages, strict=True)):
            own = log[log["stage"] == stage]
            asks = bool((own["task"] != "").any())
            above = _split(figure, panel)
            above.set_title(
                f"{stage}\n{own['seconds'].iloc[-1] / 60:.0f} min", loc="left", fontweight="bold", fontsize=9
            )
            _loss(above, own, limits, labelled=not asks)
            _right(panel, own, task_looks(own["task"]) if stage in _TOWER else looks)
            if number:
                above.tick_params(left=False, labelleft=False)
                panel.tick_params(left=False, labelleft=False)
            else:
                above.set_ylabel("loss")
                panel.set_ylabel("share right")
        _test(last, test, looks)
    return figure


def smoothed(log: pd.DataFrame) -> pd.DataFrame:
    """Share of right answers, (step, task), each the mean of some lines of the log around it.

    Of up to three, or of a twentieth of the log where that is more; of means that share most of their lines, a few
    stay.
    """
    table = log[log["task"] != ""].pivot(index="step", columns="task", values="right").sort_index()
    window = max(WINDOW, round(len(table) / _PARTS))
    means = table.rolling(window, min_periods=1, center=True).mean().where(table.notna())
    return means.iloc[:: max(window // 2, 1)] if window > WINDOW else means


def _every(logs: dict[str, pd.DataFrame]) -> str:
    """How many steps there are from line to line, where that is the same everywhere."""
    steps = {
        int(step)
        for log in logs.values()
        for _, own in log.groupby("stage")
        for step in own["step"].diff()
        if step > 0
    }
    return f", {steps.pop()} steps each" if len(steps) == 1 else ""


def _divided(figure: Figure, space: Any, n_stages: int) -> list[Any]:
    """A panel for each stage in the room of one, and one for the test split with room for names on its left."""
    width, _ = figure.get_size_inches()
    box = space.get_position()
    space.remove()
    gap, test = _GAP / width, _TEST / width
    each = (box.width - test - _NAMES / width - n_stages * gap) / n_stages
    places = [(box.x0 + number * (each + gap), each) for number in range(n_stages)]
    return [figure.add_axes((x, box.y0, wide, box.height)) for x, wide in [*places, (box.x1 - test, test)]]


def _split(figure: Figure, panel: Any) -> Any:
    """Shorten a panel, and make one above it in the room that it leaves."""
    box = panel.get_position()
    panel.set_position([box.x0, box.y0, box.width, 0.6 * box.height])
    return figure.add_axes((box.x0, box.y0 + 0.67 * box.height, box.width, 0.3 * box.height))


def _loss(panel: Any, log: pd.DataFrame, limits: tuple[float, float], labelled: bool) -> None:
    rows = log.drop_duplicates("step")
    panel.plot(rows["step"], rows["loss"], color=INK, linewidth=1.2)
    panel.set_yscale("log")
    panel.set_ylim(*limits)
    panel.tick_params(bottom=labelled, labelbottom=labelled, labelsize=8)
    panel.grid(visible=False, axis="x")
    panel.set_xlabel("step" if labelled else "")
    panel.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    panel.yaxis.set_major_locator(LogLocator(subs=(1,), numticks=6))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.minorticks_off()


def _right(panel: Any, log: pd.DataFrame, looks: Any) -> None:
    table = smoothed(log)
    if table.empty:
        empty(panel, "nothing\nis asked")
        return
    for task in table.columns:
        values = table[task].dropna()
        colour, marker = looks[task]
        every = max(len(values) // 3, 1)
        panel.plot(
            values.index, values, color=colour, marker=marker, markersize=4, markevery=(0, every), linewidth=0.9,
            label=task,
        )  # fmt: skip
    per_cent(panel.yaxis)
    panel.tick_params(labelsize=8)
    panel.grid(visible=False, axis="x")
    panel.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    panel.set_xlabel("step")


def _test(panel: Any, test: pd.DataFrame, looks: Any) -> None:
    panel.set_title("test split", loc="left", fontweight="bold", fontsize=9)
    y = np.arange(len(test))[::-1]
    panel.barh(y, test["blank"], color=FAINT, height=0.62, alpha=0.55, linewidth=0, zorder=1)
    panel.plot(test["majority"], y, linestyle="", marker="|", color=QUIET, markersize=9, markeredgewidth=1.6)
    found = test[["accuracy", "low", "high"]].to_numpy(dtype=float)
    for place, task, (middle, low, high) in zip(y, test["task"], found, strict=True):
        colour, marker = looks[task]
        ends = [[max(middle - low, 0.0)], [max(high - middle, 0.0)]]
        panel.errorbar([middle], [place], xerr=ends, fmt=marker, color=colour, markersize=5, elinewidth=1.0)
    panel.set_yticks(y, list(test["task"]), fontsize=7.5)
    panel.set_xlim(-0.02, 1.03)
    panel.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"], fontsize=8)
    panel.grid(visible=False, axis="y")
    panel.set_xlabel("accuracy")


def _tasks(logs: dict[str, pd.DataFrame], tests: dict[str, pd.DataFrame]) -> Iterator[str]:
    """Tasks that are drawn, those of the single patches left out."""
    for test in tests.values():
        yield from test["task"]
    for log in logs.values():
        own = log[~log["stage"].isin(_TOWER)]
        yield from own.loc[own["task"] != "", "task"]


def _handles(logs: dict[str, pd.DataFrame], looks: dict[str, Look]) -> dict[str, list[Line2D]]:
    """The legends: of questions about single patches, which have looks of their own, and of tasks."""
    log = pd.concat([log[log["stage"].isin(_TOWER)] for log in logs.values()])
    groups = {
        f"Single patches ({', '.join(log['stage'].unique())})": task_looks(sorted(set(log["task"]) - {""})),
        "Tasks" if len(log) else "": looks,
    }
    return {
        heading: [
            Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=1.2, label=task)
            for task, (colour, marker) in own.items()
        ]
        for heading, own in groups.items()
        if own
    }

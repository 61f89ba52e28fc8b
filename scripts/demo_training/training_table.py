"""The training log as a small table that a demo model ships, so that how it was trained can be drawn again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from capa_probe.figure_set.collect import TRAINING_FILE
from capa_probe.figures.training import LOG_COLUMNS
from capa_probe.files import replace

#: What each line of a log says.
_KEYS = ("stage", "step", "seconds", "loss", "accuracy")


def training_table(log: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per line of the log and task.

    Args:
        log: the lines of ``log.jsonl``. A stage that was stopped has some steps twice; those that count come last.

    Returns:
        stage, step, seconds (of the stage so far), loss, task ("" where nothing was asked) and right (share of right
        answers since the line before; NaN where nothing was asked); stages in their order, steps rising.
    """
    order = list(dict.fromkeys(line["stage"] for line in log))
    lines = {(line["stage"], line["step"]): line for line in log}
    rows = [
        {
            "stage": stage,
            "step": step,
            "seconds": line["seconds"],
            "loss": line["loss"],
            "task": task,
            "right": right,
        }
        for (stage, step), line in sorted(
            lines.items(), key=lambda item: (order.index(item[0][0]), item[0][1])
        )
        for task, right in (sorted(line["accuracy"].items()) or [("", float("nan"))])
    ]
    kinds = {
        "step": "int32",
        "seconds": "float32",
        "loss": "float32",
        "right": "float32",
        "stage": "str",
        "task": "str",
    }
    return pd.DataFrame(rows, columns=LOG_COLUMNS).astype(kinds)


def write_training(log: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Write the table into a model's folder."""
    table = training_table(log)
    return replace(
        folder / TRAINING_FILE, lambda file: table.to_parquet(file, index=False, compression="zstd")
    )


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a log.

    Raises:
        ValueError: it is empty, or a line is not one of a training's log; one sentence.
    """
    lines = []
    for number, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not set(_KEYS) <= set(line):
            raise ValueError(
                f"Line {number} of {file} does not say {', '.join(_KEYS)}; give the log.jsonl of a training."
            )
        lines.append(line)
    if not lines:
        raise ValueError(f"{file} is empty; give the log.jsonl of a training.")
    return lines

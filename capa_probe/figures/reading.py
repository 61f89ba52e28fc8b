"""What figures of benchmark tables have in common: which rows and columns they go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.ticker import FixedLocator, FuncFormatter

from capa_probe.errors import CapaProbeError
from capa_probe.figures.entry import Tables

#: Words for what is measured.
MEASURE_NAMES = {
    "correct": "accuracy",
    "agrees": "agreement with\nthe unpruned model",
    "hellinger": "Hellinger distance",
}
#: How intervals of confirmations are made: a bootstrap of answers that are all alike has no width.
SHARES_BARS = "bars: 95 % bootstrap over images (Wilson's interval where all answers are alike)"
#: Stands for all tasks together.
ALL = "all"


def wanted(tables: Tables, name: str, columns: Sequence[str], by: str = "capa-probe confirm") -> pd.DataFrame:
    """A table, with the columns that a figure needs and others.

    Raises:
        CapaProbeError: it is not there, or lacks columns.
    """
    if name not in tables:
        raise CapaProbeError(f"There is no table {name}; give a run of {by} that has made it.")
    check_columns(tables, {name: columns}, f"the tables of a run of {by}")
    return tables[name]


def check_columns(
    tables: Tables, needed: Mapping[str, Sequence[str]], what_to_give: str, whose: str = ""
) -> None:
    """Refuse tables that a figure cannot be drawn from.

    Args:
        tables: by name.
        needed: name of a table -> its columns that the figure goes by.
        what_to_give: instead, in words.
        whose: of which model they are, if there may be several.

    Raises:
        CapaProbeError: one is not there, or lacks columns.
    """
    for name, columns in needed.items():
        missing = [column for column in columns if column not in tables.get(name, pd.DataFrame())]
        if missing:
            of = f" of {whose}" if whose else ""
            raise CapaProbeError(
                f"The table {name}{of} lacks the columns {', '.join(missing)}; give {what_to_give}."
            )


def filled(tables: Tables, name: str, columns: Sequence[str]) -> pd.DataFrame:
    """The rows of all tasks together of a table that has some.

    Raises:
        CapaProbeError: it is not there, lacks columns, or has no such rows.
    """
    rows = overall(wanted(tables, name, columns))
    if rows.empty:
        raise CapaProbeError(
            f"The table {name} has no rows of all tasks together; give a run of capa-probe confirm that has made it."
        )
    return rows


def overall(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of all tasks together."""
    return table[table["task"] == ALL]


def measured(table: pd.DataFrame) -> str:
    """What answers are judged by: "correct", or "agrees" where no right answers are known."""
    return "correct" if "correct" in table and bool(table["correct"].notna().any()) else "agrees"


def interval_columns(*measures: str) -> list[str]:
    """The columns of means and of the ends of their intervals."""
    return [f"{measure}{end}" for measure in measures for end in ("", "_low", "_high")]


def ends(rows: pd.DataFrame, measure: str) -> npt.NDArray[np.float64]:
    """How far the ends of the intervals lie from the means: (2, row), as matplotlib's error bars take them."""
    middle = rows[measure].to_numpy(dtype=float)
    low, high = (rows[f"{measure}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
    return np.abs(np.stack([middle - low, high - middle]))


def sizes(rows: pd.DataFrame) -> str:
    """How many samples and images rows stand for, such as "210 questions about 210 images"."""
    low, high = int(rows["n"].min()), int(rows["n"].max())
    images = int(rows["n_images"].max())
    n = f"{high:,}" if low == high else f"{low:,} to {high:,}"
    return f"{n} question{'' if high == 1 else 's'} about {images:,} image{'' if images == 1 else 's'}"


def sizes_of(models: Mapping[str, pd.DataFrame]) -> str:
    """The same of several models, said once where it is the same for all; models without rows are left out."""
    said = {name: sizes(rows) for name, rows in models.items() if len(rows)}
    if len(set(said.values())) == 1:
        return next(iter(said.values())) + (" each" if len(said) > 1 else "")
    return "; ".join(f"{name}: {size}" for name, size in said.items())


def notes(models: Mapping[str, Tables], table: str, named: bool) -> str:
    """The remarks of models in a table of them, each said once: a line for those that go for the same models."""
    whose: dict[str, list[str]] = {}
    for name, tables in models.items():
        for note in tables[table]["note"] if table in tables else ():
            whose.setdefault(note, []).append(name)
    lines: dict[tuple[str, ...], list[str]] = {}
    for note, names in whose.items():
        lines.setdefault(tuple(names), []).append(note)
    return "\n".join(
        f"{', '.join(names)}: {' '.join(said)}" if named else " ".join(said) for names, said in lines.items()
    )


def per_cent(axis: Any, low: float = -0.03, high: float = 1.03) -> None:
    """Make a y axis one of shares, in per cent."""
    axis.axes.set_ylim(low, high)
    axis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))

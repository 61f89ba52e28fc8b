"""A table of the page: its cells as they are shown, and as they are sorted and downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from capa_probe.report.encoding import plain


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: as it is shown.
        value: what it is sorted by and what a download holds.
        numeric: whether it is a number.
    """

    text: str
    value: str
    numeric: bool


@dataclass(frozen=True)
class Listing:
    """A table.

    Attributes:
        name: its id on the page, but for the number of its run.
        heading: above it.
        note: below it; "" for none.
        columns: their headings.
        rows: of cells; the first of each names the row.
    """

    name: str
    heading: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


#: How a value is shown.
Show = Callable[[Any], str]


def listing(
    name: str, heading: str, note: str, table: pd.DataFrame, columns: Mapping[str, tuple[str, Show]]
) -> Listing:
    """A listing of the columns that the table has, each with its heading and how it is shown."""
    shown = {column: of for column, of in columns.items() if column in table}
    rows = tuple(
        tuple(_cell(row[column], show) for column, (_, show) in shown.items())
        for row in table.to_dict("records")
    )
    return Listing(name, heading, note, tuple(label for label, _ in shown.values()), rows)


def columns_of(listing: Listing) -> Iterator[tuple[str, bool]]:
    """Headings, and whether each column holds numbers."""
    for place, heading in enumerate(listing.columns):
        cells: Sequence[Cell] = [row[place] for row in listing.rows]
        yield heading, all(cell.numeric for cell in cells)


def cosine(value: float) -> str:
    """A cosine near 1."""
    return f"{value:.4f}"


def count(value: int) -> str:
    """How many."""
    return f"{value:,}"


def _cell(value: Any, show: Show) -> Cell:
    known = plain(value)
    if known is None or value is pd.NA:
        return Cell("–", "", isinstance(value, float))
    number = isinstance(known, (int, float)) and not isinstance(known, bool)
    return Cell(show(known), repr(known) if number else str(known), number)

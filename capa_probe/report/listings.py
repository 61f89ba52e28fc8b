"""The tables of a report, which a reader may sort and download."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from capa_probe.benchmark.summary import ALL
from capa_probe.report import words
from capa_probe.report.costs import costs, points
from capa_probe.report.encoding import plain
from capa_probe.report.runs import ShownRun

#: Massive dimensions beyond this many are counted only.
_MOST_DIMS = 12


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
        name: its id on the page.
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


def listings(run: ShownRun, number: int) -> list[Listing]:
    """The tables of a run, those that have rows.

    Args:
        run: the run.
        number: its place among the runs, which makes the tables' ids different.
    """
    of = (_layers, _roles, _dims, _bimodality, _stability, _costs, _budget, _depth, _claims)
    made = [make(run) for make in of]
    return [
        Listing(f"{name}-{number}", heading, note, columns, rows)
        for name, heading, note, columns, rows in filter(None, made)
        if rows
    ]


_Made = tuple[str, str, str, tuple[str, ...], tuple[tuple[Cell, ...], ...]] | None
_Show = Callable[[Any], str]


def _table(
    name: str, heading: str, note: str, table: pd.DataFrame, columns: Mapping[str, tuple[str, _Show]]
) -> _Made:
    """A listing of the columns that the table has, each with its heading and how it is shown."""
    shown = {column: of for column, of in columns.items() if column in table}
    rows = tuple(
        tuple(_cell(row[column], show) for column, (_, show) in shown.items())
        for row in table.to_dict("records")
    )
    return name, heading, note, tuple(label for label, _ in shown.values()), rows


def _cell(value: Any, show: _Show) -> Cell:
    known = plain(value)
    if known is None or value is pd.NA:
        return Cell("–", "", isinstance(value, float))
    number = isinstance(known, (int, float)) and not isinstance(known, bool)
    return Cell(show(known), repr(known) if number else str(known), number)


def _layers(run: ShownRun) -> _Made:
    if run.findings is None:
        return None
    table = run.findings.summary()
    return _table(
        "layers",
        "The numbers of each layer",
        "Sinks are counted over all samples; shares are of what all visual tokens get together, mean over samples.",
        table if len(table.columns) > 1 else table.iloc[:0],
        {
            "layer": ("layer", str),
            "visual_cosine": ("FFN cosine, visual", _cosine),
            "text_cosine": ("FFN cosine, text", _cosine),
            "redundant": ("redundant", str),
            "n_sinks": ("sinks", _count),
            "n_dump": ("dumps", _count),
            "n_anchor": ("anchors", _count),
            "n_undetermined": ("undetermined", _count),
            "attention_share": ("their share of attention", words.percent),
            "contribution_share": ("of contribution", words.percent),
        },
    )


def _roles(run: ShownRun) -> _Made:
    table = None if run.findings is None else run.findings.totals
    if table is None:
        return None
    return _table(
        "roles",
        "Sinks by role, all layers",
        "",
        table[table["n_sinks"] > 0],
        {
            "role": ("role", str),
            "n_sinks": ("sinks", _count),
            "n_tokens": ("different tokens", _count),
            "share_sinks": ("share of visual tokens", words.percent),
            "attention_share": ("of their attention", words.percent),
            "contribution_share": ("of their contribution", words.percent),
        },
    )


def _dims(run: ShownRun) -> _Made:
    table = None if run.findings is None else run.findings.model_dims
    if table is None or run.findings is None or run.findings.by_layer is None:
        return None
    if not run.findings.by_layer["n_sinks"].any():
        return None
    rest = table.iloc[_MOST_DIMS:]
    less = int((rest["n_layers"] > 0).sum())
    notes = []
    if less:
        notes.append(f"{less} more exceed{'s' if less == 1 else ''} τ less often.")
    if len(rest) > less:
        absent = len(rest) - less
        notes.append(f"{absent} more {'is' if absent == 1 else 'are'} published, and found in no layer here.")
    known = {True: "yes", False: "no"}
    return _table(
        "dims",
        "Massive dimensions",
        " ".join(notes),
        table.iloc[:_MOST_DIMS].assign(
            published=[known.get(value, "none known") for value in table["published"].iloc[:_MOST_DIMS]]
        ),
        {
            "dim": ("dimension", str),
            "layers": ("layers", str),
            "n_samples": ("samples", _count),
            "largest": ("largest sink strength", words.number),
            "stability": ("found again in resamples", words.percent),
            "published": ("published", str),
        },
    )


def _bimodality(run: ShownRun) -> _Made:
    table = None if run.findings is None else run.findings.bimodality
    if table is None or not (table["n"] > 0).any():
        return None
    return _table(
        "bimodality",
        "Whether log C of the sinks has two modes",
        "A token counts once. Hartigan's dip test: a small p speaks against one mode. Ashman's D: two modes lie apart.",
        _all_last(table[table["n"] > 0], "layer"),
        {
            "layer": ("layer", str),
            "n": ("sinks", _count),
            "n_tokens": ("different tokens", _count),
            "dip_p": ("dip test, p", words.number),
            "ashman_d": ("Ashman's D", words.number),
            "ashman_d_needed": ("D needed", words.number),
            "verdict": ("verdict", str),
        },
    )


def _stability(run: ShownRun) -> _Made:
    table = None if run.findings is None else run.findings.stability
    if table is None:
        return None
    what = {"layers": "from one layer to the next", "prompts": "from one question to another"}
    own = table[table["n_pairs"] > 0]
    return _table(
        "stability",
        "Whether sinks keep their role",
        "",
        _all_last(own.assign(over=own["over"].map(what)), "layer"),
        {
            "over": ("over", str),
            "layer": ("layer", str),
            "n_pairs": ("pairs", _count),
            "same": ("same role", words.percent),
            "same_expected": ("by chance", words.percent),
        },
    )


def _costs(run: ShownRun) -> _Made:
    table = pd.DataFrame([vars(cost) for cost in costs(run.tables)])
    return _table(
        "costs",
        "What keeping 25 % of the visual tokens costs",
        "By contribution, against the model itself; the difference with its 95 % interval over samples.",
        table,
        {
            "layer": ("before layer", str),
            "change": ("points", points),
            "low": ("low", points),
            "high": ("high", points),
            "n": ("n", _count),
            "measure": ("of", str),
            "source": ("measured by", str),
        },
    )


def _budget(run: ShownRun) -> _Made:
    table = run.tables.get("budget")
    if table is None:
        return None
    return _table(
        "budget",
        "Accuracy against the tokens that are kept",
        "From capa-probe confirm; all tasks, with 95 % intervals over samples. Random choices are averaged over draws.",
        table[table["task"] == ALL],
        _ACCURACY,
    )


def _depth(run: ShownRun) -> _Made:
    table = run.tables.get("depth_kept")
    if table is None:
        return None
    return _table(
        "depth",
        "Accuracy against the tokens that are kept, by layer",
        "From capa-probe depth; all tasks, with 95 % intervals over samples.",
        table[table["task"] == ALL],
        _ACCURACY,
    )


def _claims(run: ShownRun) -> _Made:
    table = run.tables.get("claims")
    if table is None:
        return None
    return _table(
        "claims",
        "Claims of the paper on this model",
        "From capa-probe confirm.",
        table,
        {
            "claim": ("claim", str),
            "where": ("where", str),
            "verdict": ("verdict", str),
            "numbers": ("numbers", str),
        },
    )


def _all_last(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Layer -1 stands for all layers."""
    return table.assign(**{column: ["all" if layer < 0 else int(layer) for layer in table[column]]})


def _cosine(value: float) -> str:
    return f"{value:.4f}"


def _count(value: int) -> str:
    return f"{value:,}"


def _share(value: float) -> str:
    return f"{value:.3f}"


_ACCURACY: dict[str, tuple[str, _Show]] = {
    "stage": ("stage", str),
    "layer": ("before layer", str),
    "keep": ("kept", words.percent),
    "score": ("by", lambda name: str(name).replace("_", " ")),
    "correct": ("accuracy", _share),
    "correct_low": ("low", _share),
    "correct_high": ("high", _share),
    "agrees": ("same answer", _share),
    "n": ("n", _count),
}


def columns_of(listing: Listing) -> Iterator[tuple[str, bool]]:
    """Headings, and whether each column holds numbers."""
    for place, heading in enumerate(listing.columns):
        cells: Sequence[Cell] = [row[place] for row in listing.rows]
        yield heading, all(cell.numeric for cell in cells)

"""The comparison in Markdown: one table, a column for each model, and where their verdicts differ."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd

from capa_probe.benchmark.claims import FAILS, HOLDS, UNKNOWN
from capa_probe.comparison.rows import CLAIMS

_NOTHING = "-"
_SIGNS = {HOLDS: "✓", FAILS: "✗", UNKNOWN: "?"}
#: Of the numbers, what a short table shows: rows that begin so.
_BRIEF = (
    "layers whose FFN is redundant for visual tokens",
    "sinks, of all visual tokens",
    "accuracy, all kept",
    "accuracy, 25% kept",
)
_COSTS = "Costs are differences in accuracy. "
_HOW_TO_READ = (
    "Beside a claim stands the difference between the first and the second that it "
    "compares, with its 95 % interval: in accuracy where it speaks of accuracy, in rank correlation where it speaks of "
    "ranking, else in Hellinger distance. Whether accuracy is lost is judged by that interval, with 0.02 allowed; all "
    "else by p-values corrected for the number of tests, so an interval may leave out 0 where nothing can be judged. "
    "The intervals of the other numbers are in the CSV file."
)


def page(table: pd.DataFrame) -> str:
    """A comparison as one Markdown table, and a list of what the models disagree on.

    Args:
        table: as :func:`capa_probe.comparison.compare` returns it.
    """
    lines = _table(table, _cell)
    costs = _COSTS if table["row"].str.startswith("cost of").any() else ""
    explained = costs + (_HOW_TO_READ if (table["section"] == CLAIMS).any() else "")
    if explained:
        lines += ["", explained.strip()]
    judged = table.loc[table["section"] == CLAIMS, "model"].nunique()
    if judged > 1:
        lines += _listed(
            "Claims on which they disagree:",
            [
                f"{row.row} ({row.part}): holds on {row.holds}, does not hold on {row.fails}."
                for row in differences(table).itertuples()
            ],
            "No claim holds on one and fails on another.",
        )
    if judged:
        lines += _listed(
            "Claims of the paper that fail wherever they can be judged:",
            [f"{row.row} ({row.part}): does not hold on {row.fails}." for row in refuted(table).itertuples()],
            "No claim of the paper fails wherever it can be judged.",
        )
    return "\n".join(lines) + "\n"


def brief(table: pd.DataFrame) -> str:
    """The same in few lines: redundant layers, sinks, what a quarter of the tokens keeps, and a sign for each verdict.

    Args:
        table: as :func:`capa_probe.comparison.compare` returns it.
    """
    claims = table[table["section"] == CLAIMS]
    lines = _table(table[table["row"].str.startswith(_BRIEF)], _cell)
    if len(claims):
        signs = ", ".join(f"{sign} {verdict}" for verdict, sign in _SIGNS.items())
        said = f"{signs}: one sign for each layer to prune before, from early to late, or for all together."
        summary = "<details><summary>Every claim of the paper</summary>"
        lines += ["", summary, "", *_table(claims, _signs), "", said, "", "</details>"]
    return "\n".join(lines) + "\n"


def _table(table: pd.DataFrame, cell: Callable[[pd.DataFrame, str, list[str]], str]) -> list[str]:
    """Lines of Markdown: a heading for each section, a line for each row, a cell for each model."""
    names = table[["model", "family"]].drop_duplicates()
    models = list(names["model"])
    heads = [f"{row.model} ({row.family})" for row in names.itertuples()]
    lines = [_line(["", *heads]), _line(["---"] * (1 + len(heads)))]
    for section, of in table.groupby("section", sort=False):
        lines.append(_line([f"**{section}**", *([""] * len(models))]))
        for row, entries in of.groupby("row", sort=False):
            parts = list(entries["part"].drop_duplicates())
            label = str(row)
            if section != CLAIMS and parts != [""]:
                label += f": {' / '.join(parts)}"
            lines.append(_line([label, *(cell(entries, model, parts) for model in models)]))
    return lines


def _listed(title: str, items: list[str], otherwise: str) -> list[str]:
    return ["", title, "", *(f"- {item}" for item in items)] if items else ["", otherwise]


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Claims that hold on one model and do not hold on another, at the same place.

    Args:
        table: as :func:`capa_probe.comparison.compare` returns it.

    Returns:
        ``row``, ``part``, ``holds`` and ``fails``: the models, with commas between.
    """
    found = _by_place(table)
    return found[(found["holds"] != "") & (found["fails"] != "")].reset_index(drop=True)


def refuted(table: pd.DataFrame) -> pd.DataFrame:
    """Claims that hold on no model and do not hold on one or more, at the same place.

    Args:
        table: as :func:`capa_probe.comparison.compare` returns it.

    Returns:
        As :func:`differences`; ``holds`` is empty.
    """
    found = _by_place(table)
    return found[(found["holds"] == "") & (found["fails"] != "")].reset_index(drop=True)


def _by_place(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each claim and place: the models on which it holds, and does not."""
    claims = table[table["section"] == CLAIMS]
    found = [
        (row, part, *(", ".join(of.loc[of["verdict"] == verdict, "model"]) for verdict in (HOLDS, FAILS)))
        for (row, part), of in claims.groupby(["row", "part"], sort=False)
    ]
    return pd.DataFrame(found, columns=["row", "part", "holds", "fails"])


def _cell(entries: pd.DataFrame, model: str, parts: list[str]) -> str:
    own = entries[entries["model"] == model].drop_duplicates("part").set_index("part")
    if own.empty:
        return _NOTHING
    if (own["verdict"] != "").any():
        return "<br>".join(_verdict(str(part), row) for part, row in own.iterrows())
    return " / ".join(str(own.loc[part, "text"]) if part in own.index else _NOTHING for part in parts)


def _signs(entries: pd.DataFrame, model: str, _parts: list[str]) -> str:
    own = entries[entries["model"] == model]
    return " ".join(_SIGNS[verdict] for verdict in own["verdict"]) or _NOTHING


def _verdict(part: str, row: pd.Series) -> str:
    said = f"{part}: **{row['verdict']}**"
    if not math.isnan(row["value"]):
        return f"{said} {_signed(row['value'], row['low'], row['high'])}"
    return said if row["verdict"] == UNKNOWN else f"{said}, {row['text']}"


def _signed(value: float, low: float, high: float) -> str:
    """With as many digits as it takes to see that an interval is not 0; without one where there is none."""
    known = [end for end in (value, low, high) if not math.isnan(end)]
    digits = 3 if max(map(abs, known[-2:])) >= 0.001 else 5
    first, *ends = (f"{round(end, digits) + 0:+.{digits}f}" for end in known)  # no -0.000
    return f"{first} [{', '.join(ends)}]" if ends else f"{first} (one image)"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

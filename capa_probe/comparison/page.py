"""The comparison in Markdown: one table, a column for each model, and where their verdicts differ."""

from __future__ import annotations

import math

import pandas as pd

from capa_probe.benchmark.claims import FAILS, HOLDS, UNKNOWN
from capa_probe.comparison.rows import CLAIMS

_NOTHING = "-"
_HOW_TO_READ = (
    "Costs are differences in accuracy. Beside a claim stands the difference that decides it, with its 95 % interval; "
    "the intervals of the other numbers are in the CSV file."
)


def page(table: pd.DataFrame) -> str:
    """A comparison as one Markdown table, and a list of what the models disagree on.

    Args:
        table: as :func:`capa_probe.comparison.compare` returns it.
    """
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
            lines.append(_line([label, *(_cell(entries, model, parts) for model in models)]))
    lines += ["", _HOW_TO_READ]
    apart = [
        f"- {row.row} ({row.part}): holds on {row.holds}, does not hold on {row.fails}."
        for row in differences(table).itertuples()
    ]
    if len(models) > 1:
        lines += [
            "",
            "Claims on which they disagree:" if apart else "No claim holds on one and fails on another.",
        ]
        lines += ["", *apart] if apart else []
    return "\n".join(lines) + "\n"


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Claims that hold on one model and do not hold on another, at the same place.

    Args:
        table: as :func:`capa_probe.comparison.compare` returns it.

    Returns:
        ``row``, ``part``, ``holds`` and ``fails``: the models, with commas between.
    """
    found = []
    claims = table[table["section"] == CLAIMS]
    for (row, part), of in claims.groupby(["row", "part"], sort=False):
        holds, fails = (", ".join(of.loc[of["verdict"] == verdict, "model"]) for verdict in (HOLDS, FAILS))
        if holds and fails:
            found.append({"row": row, "part": part, "holds": holds, "fails": fails})
    return pd.DataFrame(found, columns=["row", "part", "holds", "fails"])


def _cell(entries: pd.DataFrame, model: str, parts: list[str]) -> str:
    own = entries[entries["model"] == model].drop_duplicates("part").set_index("part")
    if own.empty:
        return _NOTHING
    if (own["verdict"] != "").any():
        return "<br>".join(_verdict(str(part), row) for part, row in own.iterrows())
    return " / ".join(str(own.loc[part, "text"]) if part in own.index else _NOTHING for part in parts)


def _verdict(part: str, row: pd.Series) -> str:
    said = f"{part}: **{row['verdict']}**"
    if not math.isnan(row["value"]):
        return f"{said} {row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
    return said if row["verdict"] == UNKNOWN else f"{said}, {row['text']}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

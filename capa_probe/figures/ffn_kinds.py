"""What becomes of the answers where FFNs are a Hadamard product for visual tokens, or are skipped for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from capa_probe.figures.entry import ModelTables, Source
from capa_probe.figures.grid import finish, grid, sentences, span
from capa_probe.figures.reading import (
    MEASURE_NAMES,
    SHARES_BARS,
    ends,
    interval_columns,
    measured,
    notes,
    overall,
    per_cent,
    sizes_of,
    wanted,
)
from capa_probe.figures.style import FFN, RULE, styled

_COLUMNS = ["group", "layers", "ffn", "task", "n", "n_images"]
_COLUMNS += interval_columns("correct", "agrees", "hellinger")
#: Kinds of FFN, in words.
KIND_NAMES = {"full": "full FFN", "hadamard": "Hadamard product", "skip": "skipped"}
_GROUPS = ("redundant", "as many redundant", "as many others", "nearest others")
_WORDS = {
    "redundant": "all redundant",
    "as many redundant": "most redundant",
    "as many others": "least redundant",
    "nearest others": "others, nearest\nto redundant",
}
_SHIFT = 0.17
_TITLE = "FFNs of visual tokens: in full, as a Hadamard product, skipped"


def ffn_kinds_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`ffn_kinds` draws, from a confirmation: all tasks together, and why it may be empty."""
    table = overall(wanted(source.tables, "ffn_redundancy", _COLUMNS))
    remarks = wanted(source.tables, "ffn_redundancy_notes", ["note"])
    return {
        "ffn_redundancy": table[_COLUMNS].reset_index(drop=True),
        "ffn_redundancy_notes": remarks[["note"]],
    }


@styled
def ffn_kinds(models: ModelTables) -> Figure:
    """Accuracy and Hellinger distance with FFNs in full, as a Hadamard product and skipped, by group of layers.

    Args:
        models: name of a model -> ``ffn_redundancy`` and ``ffn_redundancy_notes`` of its confirmation (experiment 4).

    Raises:
        CapaProbeError: a table or a column is missing, or there are too many models.
    """
    found = {name: overall(wanted(tables, "ffn_redundancy", _COLUMNS)) for name, tables in models.items()}
    filled = {name: table for name, table in found.items() if len(table)}
    said = notes(
        {name: models[name] for name in found if name not in filled}, "ffn_redundancy_notes", len(found) > 1
    )
    if not filled:
        return sentences(_TITLE, said or "No layer was looked at.")
    figure, axes = grid(filled, 2, size=(9.6, 2.5))
    for row, table in zip(axes, filled.values(), strict=True):
        for panel, measure in zip(row, (measured(table), "hellinger"), strict=True):
            _panel(panel, table, measure)
    high = span([0, *(panel.get_ylim()[1] for panel in axes[:, 1])], 0)[1]
    for panel in axes[:, 1]:
        panel.set_ylim(-0.03 * high, high)
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=6.5, linewidth=1.1, label=KIND_NAMES[kind])
        for kind, (colour, marker) in FFN.items()
    ]
    finish(
        figure, axes, filled, _TITLE,
        f"{sizes_of(filled)}; {SHARES_BARS}; each group of layers (named by number, from 0) is "
        "changed as a whole, and no token is pruned\nHellinger distance: of the next-token distribution at the last "
        f"prompt token, from the unchanged model's\n{said}".rstrip(),
        handles, wspace=0.24, below=0.6, gap=0.85, named=len(found) > 1,
    )  # fmt: skip
    return figure


def _panel(panel: Any, table: pd.DataFrame, measure: str) -> None:
    groups = [group for group in _GROUPS if (table["group"] == group).any()]
    groups += [group for group in table["group"].unique() if group not in groups]
    kinds = [kind for kind in FFN if measure != "hellinger" or kind != "full"]  # 0 from itself
    for number, kind in enumerate(kinds):
        rows = table[table["ffn"] == kind].drop_duplicates("group").set_index("group").reindex(groups)
        colour, marker = FFN[kind]
        panel.errorbar(
            np.arange(len(groups)) + _SHIFT * (number - (len(kinds) - 1) / 2), rows[measure], yerr=ends(rows, measure),
            fmt=marker, color=colour, markersize=6.5, elinewidth=1.1, label=kind,
        )  # fmt: skip
    layers = table.drop_duplicates("group").set_index("group")["layers"]
    names = [f"{_WORDS.get(group, group)}\n({str(layers[group]).replace('+', ', ')})" for group in groups]
    panel.set_xticks(range(len(groups)), names, fontsize=8.5)
    panel.set_xlim(-0.5, len(groups) - 0.5)
    for between in range(len(groups) - 1):
        panel.axvline(between + 0.5, color=RULE, linewidth=0.7, zorder=0)
    panel.grid(visible=False, axis="x")
    panel.set_ylabel(MEASURE_NAMES[measure])
    if measure == "hellinger":
        shown = table[table["ffn"] != "full"]
        panel.set_ylim(0, span([0, *shown["hellinger_high"], *shown["hellinger"]])[1])
        panel.set_title("Distance from the model itself", loc="left", fontweight="bold")
    else:
        per_cent(panel.yaxis, high=1.05)
        panel.set_title("Answers", loc="left", fontweight="bold")

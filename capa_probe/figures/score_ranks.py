"""How well each score ranks visual tokens by what knocking them out really does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from capa_probe.figures.entry import ModelTables, Source
from capa_probe.figures.grid import finish, grid
from capa_probe.figures.reading import ends, filled, interval_columns, sizes_of
from capa_probe.figures.style import INK, QUIET, SCORES, styled

_COLUMNS = [
    "layer",
    "scored_at",
    "effect",
    "score",
    "task",
    "n",
    "n_images",
    *interval_columns("spearman"),
]
#: What a token's true effect is taken to be: how far the next-token distribution moves.
EFFECT = "hellinger"
_SCORED_AT = {
    "previous": "scored one layer before, as CAPA does",
    "same": "scored at the layer itself",
}
_SHIFT = 0.15


def score_ranks_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`score_ranks` draws, from a confirmation: all tasks together, effect on the distribution."""
    table = filled(source.tables, "knockout", _COLUMNS)
    return {"knockout": table.loc[table["effect"] == EFFECT, _COLUMNS].reset_index(drop=True)}


@styled
def score_ranks(models: ModelTables) -> Figure:
    """Spearman's rank correlation of each score with the knock-out effect, by layer and by where it is scored.

    Args:
        models: name of a model -> ``knockout`` of its confirmation (experiment 2).

    Raises:
        CapaProbeError: a table or a column is missing, or there are too many models.
    """
    found = {}
    for name, tables in models.items():
        table = filled(tables, "knockout", _COLUMNS)
        found[name] = table[table["effect"] == EFFECT]
    figure, axes = grid(found, 2, size=(10.4, 2.7), sharey=True)
    for row, table in zip(axes, found.values(), strict=True):
        for panel, (scored_at, title) in zip(row, _SCORED_AT.items(), strict=True):
            _panel(panel, table[table["scored_at"] == scored_at])
            panel.set_title(title[0].upper() + title[1:], loc="left", fontweight="bold")
        row[0].set_ylabel("Spearman's ρ with\nthe knock-out effect")
    for panel in axes[-1]:
        panel.set_xlabel("knocked out from this decoder layer on (from 0)")
    drawn = set.union(*(set(table["score"]) for table in found.values()))
    handles = [
        Line2D(
            [], [], color=colour, marker=marker, markersize=6.5, linewidth=1.2, label=score.replace("_", " ")
        )
        for score, (colour, marker) in SCORES.items()
        if score in drawn
    ]
    size = sizes_of(found)
    finish(
        figure, axes, found, "How well each score foretells what a visual token does",
        f"Mean over samples of the rank correlation over a sample's visual tokens; {size}; bars: 95 % bootstrap over "
        "images\nKnock-out effect: Hellinger distance of the next-token distribution when that one token is gone",
        handles, wspace=0.07,
    )  # fmt: skip
    return figure


def _panel(panel: Any, table: pd.DataFrame) -> None:
    layers = sorted(table["layer"].unique())
    scores = [score for score in SCORES if (table["score"] == score).any()]
    panel.axhline(0, color=QUIET, linewidth=0.8, zorder=1)
    for number, score in enumerate(scores):
        rows = table[table["score"] == score].set_index("layer").reindex(layers)
        x = np.arange(len(layers)) + _SHIFT * (number - (len(scores) - 1) / 2)
        colour, marker = SCORES[score]
        panel.errorbar(
            x, rows["spearman"], yerr=ends(rows, "spearman"), fmt=marker, color=colour, markersize=6.5, elinewidth=1.1,
            label=score,
        )  # fmt: skip
    panel.set_xticks(range(len(layers)), [str(layer) for layer in layers], color=INK)
    panel.set_xlim(-0.55, len(layers) - 0.45)
    panel.grid(visible=False, axis="x")

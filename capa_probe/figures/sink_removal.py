"""What removing Probability Dumps or Structural Anchors does, beside as many other visual tokens."""

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
    wanted,
)
from capa_probe.figures.style import INK, QUIET, ROLE_NAMES, ROLES, RULE, SCORES, count, styled

_COLUMNS = ["layer", "role", "removed", "task", "n", "n_images"]
_COLUMNS += interval_columns("correct", "agrees", "hellinger")
_COUNTS = ["layer", "n_dump", "n_anchor"]
#: What is removed in a role's place, in words, with a marker.
_INSTEAD = {
    "non_sinks": ("as many non-sinks, at random", "o"),
    "visual": ("as many visual tokens, at random", "D"),
}
_SHIFT = 0.2
_TITLE = "Removing Probability Dumps, Structural Anchors, or as many other visual tokens"


def sink_removal_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`sink_removal` draws, from a confirmation: all tasks together, sinks per layer, and remarks."""
    table = overall(wanted(source.tables, "dumps_anchors", _COLUMNS))
    return {
        "dumps_anchors": table[_COLUMNS].reset_index(drop=True),
        "dumps_anchors_counts": wanted(source.tables, "dumps_anchors_counts", _COUNTS)[_COUNTS],
        "dumps_anchors_notes": wanted(source.tables, "dumps_anchors_notes", ["note"])[["note"]],
    }


@styled
def sink_removal(models: ModelTables) -> Figure:
    """Accuracy and Hellinger distance with all sinks of a role removed, or as many others, by layer and role.

    Args:
        models: name of a model -> ``dumps_anchors`` and, with them, ``dumps_anchors_counts`` and
            ``dumps_anchors_notes`` of its confirmation (experiment 1).

    Raises:
        CapaProbeError: a table or a column is missing, or there are too many models.
    """
    found = {name: overall(wanted(tables, "dumps_anchors", _COLUMNS)) for name, tables in models.items()}
    filled = {name: table for name, table in found.items() if len(table)}
    said = notes(models, "dumps_anchors_notes", len(found) > 1)
    if not filled:
        return sentences(_TITLE, said or "No sinks were found.")
    figure, axes = grid(filled, 2, size=(10.4, 2.5))
    for row, (name, table) in zip(axes, filled.items(), strict=True):
        counts = models[name].get("dumps_anchors_counts", pd.DataFrame(columns=_COUNTS)).set_index("layer")
        for panel, measure in zip(row, (measured(table), "hellinger"), strict=True):
            _panel(panel, table, counts, measure)
    removed = {role for table in filled.values() for role in table["role"]}
    handles = [
        Line2D([], [], linestyle="", color=colour, marker=marker, markersize=7, label=f"all {ROLE_NAMES[role]}s")
        for role, (colour, marker) in ROLES.items()
        if role in removed
    ] + [
        Line2D([], [], linestyle="", color=SCORES["random"].colour, marker=marker, markersize=6, label=name)
        for name, marker in _INSTEAD.values()
    ]  # fmt: skip
    finish(
        figure, axes, filled, _TITLE,
        "Only samples that have such sinks at that layer (n, of which a handful says little); gone from that layer on; "
        f"{SHARES_BARS}\n"
        "Hellinger distance: of the next-token distribution at the last prompt token, from the model itself\n"
        f"{said}".rstrip(),
        handles, wspace=0.22, below=0.72, gap=0.95, named=len(found) > 1,
    )  # fmt: skip
    return figure


def _panel(panel: Any, table: pd.DataFrame, counts: pd.DataFrame, measure: str) -> None:
    groups = sorted(
        set(zip(table["layer"], table["role"], strict=True)),
        key=lambda group: (list(ROLES).index(group[1]), group[0]),
    )
    for x, (layer, role) in enumerate(groups):
        rows = table[(table["layer"] == layer) & (table["role"] == role)].set_index("removed")
        colour, marker = ROLES[role]
        looks = {"role": (colour, marker, 7.5)}
        looks |= {name: (SCORES["random"].colour, shape, 6.0) for name, (_, shape) in _INSTEAD.items()}
        for place, (removed, (hue, shape, size)) in enumerate(looks.items()):
            if removed in rows.index:
                own = rows.loc[[removed]]
                panel.errorbar(
                    [x + _SHIFT * (place - 1)], own[measure], yerr=ends(own, measure), fmt=shape, color=hue,
                    markersize=size, elinewidth=1.1, label=f"{layer} {role} {removed}",
                )  # fmt: skip
    names = []
    for layer, role in groups:
        own = table[(table["layer"] == layer) & (table["role"] == role)]
        number = count(int(counts.loc[layer, f"n_{role}"]), role) if layer in counts.index else f"{role}s"
        names.append(f"layer {layer}\n{number}\nn = {int(own['n'].iloc[0])}")
    panel.set_xticks(range(len(groups)), names, fontsize=8, color=INK)
    panel.set_xlim(-0.5, len(groups) - 0.5)
    for between in range(len(groups) - 1):
        panel.axvline(between + 0.5, color=RULE, linewidth=0.7, zorder=0)
    panel.grid(visible=False, axis="x")
    panel.set_ylabel(MEASURE_NAMES[measure])
    panel.tick_params(axis="x", color=QUIET)
    if measure == "hellinger":
        panel.set_ylim(
            -0.03 * np.nanmax(table["hellinger_high"].fillna(table["hellinger"])),
            span([0, *table["hellinger_high"], *table["hellinger"]])[1],
        )
        panel.set_title("Distance from the model itself", loc="left", fontweight="bold")
    else:
        per_cent(panel.yaxis, high=1.05)
        panel.set_title("Answers", loc="left", fontweight="bold")

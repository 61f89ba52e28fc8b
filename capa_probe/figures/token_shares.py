"""What visual tokens, sinks and text have of attention and contribution by layer, and where that changes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from capa_probe.analysis import layer_shares, published_layers, transition_layers, visipruner_stages
from capa_probe.analysis.stages import STAGES
from capa_probe.errors import CapaProbeError
from capa_probe.figures.entry import ModelTables, Source, Tables
from capa_probe.figures.grid import empty, finish, grid
from capa_probe.figures.reading import check_columns, per_cent
from capa_probe.figures.style import (
    FIRST_TEXT,
    INK,
    QUIET,
    ROLE_NAMES,
    ROLES,
    TEXT,
    VISUAL,
    count,
    styled,
)

#: From the bottom of a stack to its top: colour and name of each part.
_PARTS = {
    **{role: (colour, ROLE_NAMES[role]) for role, (colour, _) in ROLES.items()},
    "visual": (VISUAL, "visual tokens (other)"),
    "text": (TEXT, "text tokens"),
    "first": (FIRST_TEXT, "first token of the prompt"),
}
_TITLES = {
    "attention": "Share of attention",
    "contribution": "Share of contribution",
    "change": "Change of the contribution map",
}
#: Shades of VisiPruner's stages, light to dark with depth.
_STAGES = dict(zip(STAGES, ("#eef0f2", "#ccd1d7", "#9aa2ab"), strict=True))
_NEEDED = {
    "shares": ("quantity", "layer", *_PARTS, "all_visual", "n_samples"),
    "transitions": (
        "layer",
        "distance",
        "low",
        "high",
        "p",
        "null_high",
        "transition",
        "n_samples",
        "n_images",
    ),
    "published": ("model", "layer", "scaled"),
}


def token_shares_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`token_shares` draws, from a profile.

    Raises:
        CapaProbeError: the run is no profile, or lacks attention, contribution or its visual token rows.
    """
    if source.prof is None:
        raise CapaProbeError(
            "A figure of token shares was asked for of a run that is no profile; give a profile."
        )
    prof = source.prof
    published = published_layers(prof.manifest)
    tables = {
        "shares": layer_shares(prof, source.tables.get("sinks")),
        "transitions": transition_layers(prof),
        "published": pd.DataFrame(
            {
                "model": published.model if published else "",
                "layer": np.array(published.layers if published else (), dtype=np.int32),
                "scaled": published.scaled if published else False,
            }
        ),
    }
    with suppress(CapaProbeError):  # without the last prompt token's row, the rest is still known
        tables["stages"] = visipruner_stages(prof)
    return tables


@styled
def token_shares(models: ModelTables) -> Figure:
    """Shares of attention and contribution by layer, and the change of the contribution distribution: a row per model.

    Transition layers are marked in all panels; in the last one, VisiPruner's three stages lie along the top, and
    triangles show where the paper prunes.

    Args:
        models: name of a model -> ``shares`` (:func:`capa_probe.analysis.layer_shares`), ``transitions``
            (:func:`capa_probe.analysis.transition_layers`), ``published`` (``model``, ``layer``, ``scaled``; may be
            empty) and, where known, ``stages`` (:func:`capa_probe.analysis.visipruner_stages`).

    Raises:
        CapaProbeError: a table or a column is missing, or there are too many models.
    """
    for name, tables in models.items():
        check_columns(tables, _NEEDED, "what token_shares_tables made of a profile", name)
    figure, axes = grid(models, 3, ratios=(1, 1, 1.25), size=(11.6, 2.5))
    for row, tables in zip(axes, models.values(), strict=True):
        n_layers = int(tables["shares"]["layer"].max()) + 1
        for panel, quantity in zip(row[:2], ("attention", "contribution"), strict=True):
            _stack(panel, tables, quantity)
        _change(row[2], tables)
        for panel in row:
            panel.set_xlim(-0.5, n_layers - 0.5)
            panel.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
            panel.grid(visible=False, axis="x")
    for panel, title in zip(axes[0], _TITLES.values(), strict=True):
        panel.set_title(title, loc="left", fontweight="bold", pad=8)
    for panel in axes[-1]:
        panel.set_xlabel("decoder layer (from 0)")
    finish(
        figure, axes, models, "Where the last prompt token's attention goes, and where that changes",
        _subtitle(models), _handles(models), wspace=0.2,
    )  # fmt: skip
    return figure


def _stack(axes: Any, tables: Tables, quantity: str) -> None:
    own = tables["shares"]
    own = own[own["quantity"] == quantity].sort_values("layer")
    per_cent(axes.yaxis, 0, 1)
    if own.empty:
        empty(axes, f"{quantity} was not measured")
        return
    layers = own["layer"].to_numpy()
    # A layer is as wide as any other, a model of one layer included.
    x = np.repeat(layers, 2) + np.tile([-0.5, 0.5], len(layers))
    base = np.zeros(len(x))
    for part, (colour, _) in _PARTS.items():
        top = base + np.repeat(np.maximum(own[part].fillna(0).to_numpy(np.float64), 0), 2)
        axes.fill_between(x, base, top, color=colour, linewidth=0, alpha=0.9, zorder=1)
        base = top
    visual = np.repeat(own["all_visual"].to_numpy(np.float64), 2)
    axes.plot(x, visual, color="white", linewidth=1.2, zorder=2)
    _mark(axes, tables["transitions"])


def _mark(axes: Any, transitions: pd.DataFrame, up_to: float = 1.0) -> None:
    for layer in transitions.loc[transitions["transition"], "layer"]:
        axes.axvline(layer - 0.5, 0, up_to, color="white", linewidth=2.6, zorder=2.2)
        axes.axvline(layer - 0.5, 0, up_to, color=INK, linewidth=1.1, linestyle=(0, (3, 2)), zorder=2.3)


def _change(axes: Any, tables: Tables) -> None:
    table, published = tables["transitions"].sort_values("layer"), tables["published"]
    if table.empty:
        empty(axes, "one layer: nothing to compare")
        return
    x = table["layer"].to_numpy(np.float64) - 0.5
    distance = table["distance"].to_numpy(np.float64)
    ends = table[["distance", "high", "null_high"]].replace(np.inf, np.nan).max().max()
    ceiling = 1.3 * max(float(ends), 0.05)
    axes.fill_between(x, table["low"], table["high"], color=INK, alpha=0.18, linewidth=0, zorder=2)
    axes.plot(x, distance, color=INK, linewidth=1.5, zorder=3)
    peak = table["transition"].to_numpy(bool)
    axes.plot(x[~peak], distance[~peak], "o", mec=INK, mfc="white", markersize=5, zorder=4)
    axes.plot(x[peak], distance[peak], "o", color=INK, markersize=6.5, zorder=4)
    axes.plot(x, table["null_high"], color=QUIET, linewidth=1.1, linestyle=(0, (1, 1.4)), zorder=2.5)
    for at, value, layer in zip(x[peak], distance[peak], table["layer"][peak], strict=True):
        axes.annotate(
            f"{int(layer) - 1}→{int(layer)}", (at, value), (6, 3), textcoords="offset points", ha="left",
            fontsize=8.5, color=INK, zorder=5,
        )  # fmt: skip
    _mark(axes, table, 0.9)
    axes.set_ylim(0, ceiling)
    axes.set_ylabel("Hellinger distance", labelpad=2)
    if "stages" in tables:
        _stages(axes, tables["stages"], ceiling)
    if len(published):
        axes.plot(
            published["layer"] - 0.5, np.full(len(published), 0.035 * ceiling), "^", color=QUIET, markersize=7,
            mec="white", mew=0.6, zorder=6,
        )  # fmt: skip


def _stages(axes: Any, stages: pd.DataFrame, ceiling: float) -> None:
    named = stages.sort_values("layer")["stage"].tolist()
    for stage, colour in _STAGES.items():
        own = [layer for layer, name in enumerate(named) if name == stage]
        if own:
            axes.fill_between(
                [own[0] - 0.5, own[-1] + 0.5], 0.91 * ceiling, ceiling, color=colour, linewidth=0, zorder=1
            )
            if len(own) / len(named) > 0.14:
                axes.text(
                    (own[0] + own[-1]) / 2, 0.955 * ceiling, stage, ha="center", va="center", fontsize=8,
                    color=INK, zorder=6,
                )  # fmt: skip


def _subtitle(models: ModelTables) -> str:
    lines = []
    for name, tables in models.items():
        table = tables["transitions"]
        found = [str(layer) for layer in table.loc[table["transition"], "layer"]]
        if table.empty or table["p"].isna().all():
            said = "nothing to tell transition layers by (too few layers or images)"
        elif found:
            said = f"contribution moves to other visual tokens at layer{'s' * (len(found) > 1)} {', '.join(found)}"
        else:
            said = "no layer at which contribution moves more than the null allows"
        n = int(tables["shares"]["n_samples"].iloc[0])
        images = f" of {count(int(table['n_images'].iloc[0]), 'image')}" if len(table) else ""
        most = tables["shares"][list(ROLES)].sum(axis=1).max()
        none = f"; sinks have at most {100 * most:.2g} %" if most > 0 else "; no sinks"
        who = f"{name}: " if len(models) > 1 else ""
        said = said if who else said[0].upper() + said[1:]
        lines.append(f"{who}{said} ({count(n, 'sample')}{images}{none})")
    published = [tables["published"] for tables in models.values() if len(tables["published"])]
    if published:
        listed = ", ".join(dict.fromkeys(str(table["model"].iloc[0]) for table in published))
        scaled = ", scaled to depth" if any(table["scaled"].iloc[0] for table in published) else ""
        lines.append(f"The paper's pruning layers: those for {listed}{scaled}")
    lines.append(
        "Band: 95 % bootstrap over images; null: all changes as large as their mean, p = 0.05 over all layers"
    )
    return "\n".join(lines)


def _handles(models: ModelTables) -> list[Any]:
    shares = pd.concat([tables["shares"] for tables in models.values()])
    handles: list[Any] = [
        Patch(color=colour, alpha=0.9, linewidth=0, label=label)
        for part, (colour, label) in _PARTS.items()
        if part not in (*ROLES, "first") or (shares[part].fillna(0) > 0).any()
    ]
    handles += [
        Line2D([], [], color=INK, linewidth=1.1, linestyle=(0, (3, 2)), label="transition layer"),
        Line2D([], [], color=INK, linewidth=1.5, marker="o", mfc="white", markersize=5, label="mean change"),
        Line2D([], [], color=QUIET, linewidth=1.1, linestyle=(0, (1, 1.4)), label="null, p = 0.05"),
    ]
    if any(len(tables["published"]) for tables in models.values()):
        label = "where the paper prunes"
        handles.append(Line2D([], [], linestyle="", marker="^", color=QUIET, markersize=7, label=label))
    if any("stages" in tables for tables in models.values()):
        handles.append(Patch(color=_STAGES["middle"], linewidth=0, label="VisiPruner's stages"))
    return handles

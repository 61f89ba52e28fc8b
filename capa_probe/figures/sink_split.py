"""How much sinks contribute, layer by layer, with the split into roles, and whether there are two modes at all."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from capa_probe.analysis.bimodality import ALL_LAYERS
from capa_probe.analysis.reading import FIRST_LAYER
from capa_probe.figures.entry import ModelTables, Tables
from capa_probe.figures.grid import finish, grid, sentences
from capa_probe.figures.reading import check_columns
from capa_probe.figures.style import INK, QUIET, ROLE_NAMES, ROLES, count, styled

_TITLE = "What sinks contribute, and whether that parts them in two"
_C = "contribution C\n(L2 norm)"
#: How far points of a layer spread sideways.
_WIDTH = 0.62
_NEEDED = {
    "points": ("layer", "role", "value"),
    "bins": ("layer", "role", "low", "high", "n"),
    "splits": ("layer", "value"),
    "bimodality": ("layer", "n", "n_tokens", "dip_p", "ashman_d", "ashman_d_needed", "verdict"),
    "facts": (
        "n_samples",
        "n_layers",
        "tau",
        "split",
        "relative",
        "n_sinks",
        "n_left_out",
        "strongest",
        "at",
    ),
}


@styled
def sink_split(models: ModelTables) -> Figure:
    """Log contribution of sinks by layer and role, with the split, and its distribution over all layers.

    Args:
        models: name of a model -> what :func:`split_tables` returned; each that has sinks has a row
            of panels.

    Raises:
        CapaProbeError: a table or a column is missing, or there are too many models.
    """
    for name, tables in models.items():
        check_columns(tables, _NEEDED, "what split_tables made", name)
    filled = {name: tables for name, tables in models.items() if len(tables["points"])}
    if not filled:
        return sentences(_TITLE, _subtitle(models))
    figure, axes = grid(filled, 2, ratios=(2.6, 1), size=(9.6, 2.9))
    for row, tables in zip(axes, filled.values(), strict=True):
        _by_layer(row[0], tables)
        _overall(row[1], tables)
        limits = _limits(tables)
        for panel in row:
            panel.set_yscale("log")
            panel.set_ylim(*limits)
            decades = np.log10(limits[1] / limits[0])
            subs = (1, 2, 5) if decades < 2.5 else (1,)
            panel.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
            panel.yaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=50))
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        row[1].tick_params(labelleft=False)
        unit = "C / median C of non-sinks\n(no unit)" if tables["facts"]["relative"].iloc[0] else _C
        row[0].set_ylabel(unit)
    axes[0, 0].set_title("Sinks by layer", loc="left", fontweight="bold")
    axes[0, 1].set_title("All layers", loc="left", fontweight="bold")
    axes[-1, 0].set_xlabel("decoder layer (from 0)")
    axes[-1, 1].set_xlabel("sinks")
    finish(
        figure, axes, filled, _TITLE, _subtitle(models), _handles(filled), wspace=0.06, named=len(models) > 1
    )  # fmt: skip
    return figure


def _by_layer(axes: Any, tables: Tables) -> None:
    points = tables["points"]
    for role, (colour, marker) in ROLES.items():
        own = points[points["role"] == role]
        axes.scatter(
            own["layer"] + _sideways(own["layer"].to_numpy()), own["value"], color=colour, marker=marker, s=17,
            alpha=0.6, linewidth=0, rasterized=True, zorder=3,
        )  # fmt: skip
    for layer, value in tables["splits"].itertuples(index=False):
        axes.plot([layer - 0.45, layer + 0.45], [value, value], color=INK, linewidth=1.4, zorder=4)
    table = tables["bimodality"].set_index("layer")
    n_layers = max(int(tables["facts"]["n_layers"].iloc[0]), int(points["layer"].max()) + 1)
    shown = sorted(points["layer"].unique())
    every = max(1, -(-len(shown) // 14))
    for number, layer in enumerate(shown):
        if layer in table.index:
            d = table.loc[layer, "ashman_d"]
            verdict = str(table.loc[layer, "verdict"])
            said = verdict if np.isnan(d) else f"{verdict}\nD {d:.1f}"
            if verdict == "too few":
                said = f"too few\n({int(table.loc[layer, 'n_tokens'])})"
            if number % every == 0:
                axes.annotate(
                    said, (layer, 1), (0, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                    ha="center", va="top", fontsize=7, color=INK if verdict == "bimodal" else QUIET,
                )  # fmt: skip
    axes.set_xlim(FIRST_LAYER - 0.6, max(n_layers - 0.4, FIRST_LAYER + 0.6))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")


def _sideways(layers: Any) -> Any:
    """Even steps across each layer, in an order that does not follow the value."""
    shift = np.zeros(len(layers))
    for layer in np.unique(layers):
        own = np.flatnonzero(layers == layer)
        golden = (np.arange(len(own)) * 0.6180339887) % 1.0
        shift[own] = _WIDTH * (golden - 0.5) if len(own) > 1 else 0.0
    return shift


def _overall(axes: Any, tables: Tables) -> None:
    bins = tables["bins"]
    low, high = (np.sort(bins[end].unique()) for end in ("low", "high"))
    base = dict.fromkeys(low.tolist(), 0.0)
    for role, (colour, _) in ROLES.items():
        sums = bins[bins["role"] == role].groupby("low")["n"].sum()
        at = sums.index.to_numpy(np.float64)
        end = high[np.searchsorted(low, at)]
        left = [base[float(x)] for x in at]
        axes.barh(
            10**at, sums.to_numpy(), 10**end - 10**at, left=left, align="edge", color=colour, alpha=0.85,
            linewidth=0, zorder=2,
        )  # fmt: skip
        for x, n in zip(at.tolist(), sums.tolist(), strict=True):
            base[x] += n
    if tables["facts"]["relative"].iloc[0]:
        axes.axhline(1.0, color=INK, linewidth=1.4, zorder=4)
    overall = tables["bimodality"]
    overall = overall[overall["layer"] == ALL_LAYERS]
    if len(overall):
        row = overall.iloc[0]
        if row["verdict"] == "too few":
            said = f"too few tokens to judge ({int(row['n_tokens'])})"
        else:
            said = (
                f"{row['verdict']}: dip p {_p(row['dip_p'])}\n"
                f"D = {row['ashman_d']:.1f} (needed: {row['ashman_d_needed']:.1f})"
            )
        axes.annotate(
            said,
            (1, 1),
            (-3, -2),
            "axes fraction",
            "offset points",
            ha="right",
            va="top",
            fontsize=8,
            color=QUIET,
        )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.grid(visible=False, axis="y")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"


def _limits(tables: Tables) -> tuple[float, float]:
    values = np.concatenate([tables["points"]["value"], tables["splits"]["value"]]).astype(np.float64)
    low, high = np.log10(values.min()), np.log10(values.max())
    room = max(high - low, 0.5)
    # Above, the verdicts have room.
    return float(10 ** (low - 0.06 * room)), float(10 ** (high + 0.28 * room))


def _subtitle(models: ModelTables) -> str:
    lines = []
    for name, tables in models.items():
        text = _found(tables)
        lines.append(f"{name}: {text}" if len(models) > 1 else text[0].upper() + text[1:])
    if any(len(tables["points"]) for tables in models.values()):
        lines.append(
            "At the top: whether log C has two modes, by Hartigan's dip test and Ashman's D together; a token counts "
            "once"
        )
    return "\n".join(lines)


def _found(tables: Tables) -> str:
    """How many sinks there are; where there are none, how strong the strongest token is."""
    facts = tables["facts"].iloc[0]
    tau = "" if np.isnan(facts["tau"]) else f" at τ = {facts['tau']:g}"
    text = f"{count(int(facts['n_sinks']), 'sink') if facts['n_sinks'] else 'no sinks'}{tau}"
    overall = tables["bimodality"]
    overall = overall[overall["layer"] == ALL_LAYERS]
    if facts["n_sinks"] and len(overall):
        text += f" ({count(int(overall['n_tokens'].iloc[0]), 'different token')})"
    if facts["n_samples"]:
        text += f"; {count(int(facts['n_samples']), 'sample')}"
    if not facts["n_sinks"] and not np.isnan(facts["strongest"]):
        text += (
            f"; largest sink strength of a visual token outside offset dimensions: {facts['strongest']:.3g} "
            f"(layer {facts['at']:.0f})"
        )
    if facts["n_left_out"]:
        text += f"; {int(facts['n_left_out']):,} with nothing to compare with, or C = 0, left out"
    return text


def _handles(models: ModelTables) -> list[Any]:
    found = {role for tables in models.values() for role in tables["points"]["role"]}
    handles: list[Any] = [
        Line2D([], [], linestyle="", color=ROLES[role][0], marker=ROLES[role][1], label=ROLE_NAMES[role])
        for role in ROLES
        if role in found
    ]
    splits = {str(tables["facts"]["split"].iloc[0]) for tables in models.values()}
    handles.append(Line2D([], [], color=INK, linewidth=1.4, label=f"split ({', '.join(sorted(splits))})"))
    return handles

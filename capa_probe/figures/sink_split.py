"""How much sinks contribute, layer by layer, with the split into roles, and whether there are two modes at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from capa_probe.analysis import sink_bimodality
from capa_probe.analysis.bimodality import ALL_LAYERS
from capa_probe.analysis.reading import FIRST_LAYER, strongest
from capa_probe.analysis.splits import OTHERS
from capa_probe.errors import CapaProbeError
from capa_probe.figures.entry import ModelTables, Source, Tables
from capa_probe.figures.grid import empty, finish, grid
from capa_probe.figures.style import FAINT, INK, QUIET, ROLE_NAMES, ROLES, count, styled

#: Points kept per layer and role.
MAX_POINTS = 300
N_BINS = 40
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


def sink_split_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`sink_split` draws, from a profile with classified sinks.

    Raises:
        CapaProbeError: the run is no profile, or its sinks could not be classified.
    """
    if source.prof is None or "sinks" not in source.tables:
        raise CapaProbeError(
            "This run holds no table of sinks; profile with attention, contribution and sink_strength among the "
            'probes and rows="visual" or "all".'
        )
    sinks = source.tables["sinks"]
    found = split_tables(sinks, source.tables.get("bimodality"))
    facts = found["facts"]
    facts["n_samples"] = int(source.prof.manifest["n_samples"])
    if sinks.empty:
        largest = strongest(source.prof, sinks.attrs.get("offsets"))
        if largest is not None:
            facts["strongest"], facts["at"] = largest[0], float(largest[1])
    return found


def split_tables(
    sinks: pd.DataFrame, bimodality: pd.DataFrame | None = None, most: int = MAX_POINTS
) -> dict[str, pd.DataFrame]:
    """The small tables behind :func:`sink_split`.

    Args:
        sinks: what ``classify_sinks(prof)`` returned; it may be empty.
        bimodality: what ``sink_bimodality(sinks)`` returned; made here if not given.
        most: points kept per layer and role, evenly from the table.

    Returns:
        ``points`` (``layer``, ``role``, ``value``), ``bins`` (distribution of all sinks over log10 of the value, by
        layer and role), ``splits`` (by layer, the value that parts the roles), ``bimodality``, and ``facts``. The
        value is C divided by the median C of the other visual tokens of the same sample and layer where that is the
        split ("non-sink-median", so that it parts at 1), and C itself for the others.
    """
    relative = sinks.attrs.get("split", "non-sink-median") == "non-sink-median"
    own, others = (sinks[name].to_numpy(np.float64) for name in ("contribution", OTHERS))
    value = own.copy()
    if relative:
        value = np.divide(own, others, out=np.full(len(own), np.nan), where=others > 0)
    table = pd.DataFrame({"layer": sinks["layer"], "role": sinks["role"].astype(str), "value": value})
    known = table[table["value"] > 0].sort_values(["layer", "role", "value"], kind="stable")
    thinned = [
        rows.iloc[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int))]
        for _, rows in known.groupby(["layer", "role"])
    ]
    facts = {
        "n_samples": int(sinks["sample"].nunique()),
        "n_layers": len(sinks.attrs.get("n_visual", [])),
        "tau": sinks.attrs.get("tau", np.nan),
        "split": str(sinks.attrs.get("split", "non-sink-median")),
        "relative": relative,
        "n_sinks": len(sinks),
        "n_left_out": len(table) - len(known),
        "strongest": np.nan,
        "at": np.nan,
    }
    return {
        "points": pd.concat(thinned, ignore_index=True) if thinned else known,
        "bins": _bins(known),
        "splits": _splits(known, relative),
        "bimodality": sink_bimodality(sinks) if bimodality is None else bimodality,
        "facts": pd.DataFrame([facts]),
    }


def _bins(known: pd.DataFrame) -> pd.DataFrame:
    logs = np.log10(known["value"].to_numpy(np.float64))
    rows = []
    if len(logs):
        room = 0.0 if logs.max() > logs.min() else 0.5
        edges = np.linspace(logs.min() - room, logs.max() + room, N_BINS + 1)
        for (layer, role), own in known.groupby(["layer", "role"]):
            counts, _ = np.histogram(np.log10(own["value"]), bins=edges)
            rows += [
                (layer, role, edges[at], edges[at + 1], counts[at]) for at in np.flatnonzero(counts).tolist()
            ]
    return pd.DataFrame(rows, columns=["layer", "role", "low", "high", "n"])


def _splits(known: pd.DataFrame, relative: bool) -> pd.DataFrame:
    """Where the roles part in each layer: at 1, or halfway (in log) between the highest dump and the lowest anchor."""
    rows = []
    for layer, own in known.groupby("layer"):
        dumps, anchors = (own.loc[own["role"] == role, "value"] for role in ("dump", "anchor"))
        if relative:
            rows.append((layer, 1.0))
        elif len(dumps) and len(anchors):
            rows.append((layer, float(np.sqrt(dumps.max() * anchors.min()))))
    return pd.DataFrame(rows, columns=["layer", "value"])


@styled
def sink_split(models: ModelTables) -> Figure:
    """Log contribution of sinks by layer and role, with the split, and its distribution over all layers.

    Args:
        models: name of a model -> what :func:`split_tables` returned; each has a row of panels.

    Raises:
        CapaProbeError: a table or a column is missing, or there are too many models.
    """
    for name, tables in models.items():
        for table, columns in _NEEDED.items():
            missing = [column for column in columns if column not in tables.get(table, pd.DataFrame())]
            if missing:
                raise CapaProbeError(
                    f"The table {table} of {name} lacks the columns {', '.join(missing)}; give what split_tables made."
                )
    figure, axes = grid(models, 2, ratios=(2.6, 1), size=(9.6, 2.9))
    for row, tables in zip(axes, models.values(), strict=True):
        facts = tables["facts"].iloc[0]
        if tables["points"].empty:
            empty(row[0], _no_sinks(facts))
            row[1].set_axis_off()
            continue
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
        unit = "C / median C of non-sinks\n(no unit)" if facts["relative"] else "contribution C\n(L2 norm)"
        row[0].set_ylabel(unit)
    axes[0, 0].set_title("Sinks by layer", loc="left", fontweight="bold")
    axes[0, 1].set_title("All layers", loc="left", fontweight="bold")
    filled = [row for row, tables in zip(axes, models.values(), strict=True) if len(tables["points"])]
    if filled:
        filled[-1][0].set_xlabel("decoder layer (from 0)")
        filled[-1][1].set_xlabel("sinks")
    finish(
        figure, axes, models, "What sinks contribute, and whether that parts them in two",
        _subtitle(models), _handles(models), wspace=0.06,
    )  # fmt: skip
    return figure


def _no_sinks(facts: pd.Series[Any]) -> str:
    tau = "" if np.isnan(facts["tau"]) else f" at τ = {facts['tau']:g}"
    if facts["n_sinks"]:
        return f"None of the {int(facts['n_sinks']):,} sinks{tau} has a contribution that can be compared."
    strongest = (
        ""
        if np.isnan(facts["strongest"])
        else f"\nlargest sink strength of a visual token, offset dimensions left out: {facts['strongest']:.3g}, "
        f"in layer {facts['at']:.0f}"
    )
    return f"No sinks{tau}{strongest}"


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
        facts = tables["facts"].iloc[0]
        tau = "" if np.isnan(facts["tau"]) else f" at τ = {facts['tau']:g}"
        found = count(int(facts["n_sinks"]), "sink") if facts["n_sinks"] else "no sinks"
        overall = tables["bimodality"]
        overall = overall[overall["layer"] == ALL_LAYERS]
        tokens = f" ({count(int(overall['n_tokens'].iloc[0]), 'different token')})" if len(overall) else ""
        text = f"{found}{tau}{tokens if facts['n_sinks'] else ''}"
        text += f"; {count(int(facts['n_samples']), 'sample')}" if facts["n_samples"] else ""
        if facts["n_left_out"]:
            text += f"; {int(facts['n_left_out']):,} with nothing to compare with, or C = 0, left out"
        lines.append(f"{name}: {text}" if len(models) > 1 else text[0].upper() + text[1:])
    lines.append(
        "At the top: whether log C has two modes, by Hartigan's dip test and Ashman's D together; a token counts once"
    )
    return "\n".join(lines)


def _handles(models: ModelTables) -> list[Any]:
    found = {role for tables in models.values() for role in tables["points"]["role"]}
    handles: list[Any] = [
        Line2D([], [], linestyle="", color=ROLES[role][0], marker=ROLES[role][1], label=ROLE_NAMES[role])
        for role in ROLES
        if role in found
    ]
    if not handles:
        return [Line2D([], [], linestyle="", color=FAINT, label="no sinks to show")]
    splits = {str(tables["facts"]["split"].iloc[0]) for tables in models.values()}
    handles.append(Line2D([], [], color=INK, linewidth=1.4, label=f"split ({', '.join(sorted(splits))})"))
    return handles

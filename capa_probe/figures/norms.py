"""Value norms by layer, and what attention and FFN add to the residual stream: how much, and how far it turns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from capa_probe.errors import CapaProbeError
from capa_probe.figures.cosine_axis import TICKS, cosine_limits, drawable, from_nines, nines
from capa_probe.figures.entry import ModelTables, Source
from capa_probe.figures.grid import finish, grid
from capa_probe.figures.style import (
    INK,
    ROLE_NAMES,
    ROLES,
    TEXT,
    VISUAL,
    count,
    styled,
)

#: Panel: what it shows, its title, and the stream that it is added to.
_PANELS = (
    ("value_norm", "Value vectors", None),
    ("attn_update_norm", "Added by attention", "resid_pre_norm"),
    ("ffn_update_norm", "Added by the FFN", "resid_mid_norm"),
    ("attn_cosine", "Cosine: attention", None),
    ("ffn_cosine", "Cosine: FFN", None),
)
_STATISTICS = ("p05", "p50", "p95")
_VALUES = [name for value, _, stream in _PANELS for name in (value, stream) if name]
_COLUMNS = [f"{name}_{statistic}" for name in _VALUES for statistic in _STATISTICS]
_KINDS = {"text": (TEXT, "s", "text tokens"), "visual": (VISUAL, "o", "visual tokens")}
#: Round cosines that a low panel has no room for.
_CROWDED = (-1.0, 0.5, 0.98, 0.998)
_STREAM: Any = (0, (1, 1.4))


def norms(layers_df: pd.DataFrame, sinks: pd.DataFrame | None = None) -> Figure:
    """Median norms of value vectors and residual updates, and cosines, per layer, for visual and text tokens.

    Medians, since a massive token or two would carry a mean away. Norms are on a log axis, cosines (of the residual
    stream before and after the update) on one that is logarithmic in ``1 - cosine``.

    Args:
        layers_df: ``prof.layers``; decode steps are passed over. What was not measured has no panel.
        sinks: what ``classify_sinks(prof)`` returned, to show the median value norm of each role as well.

    Raises:
        CapaProbeError: columns are missing, or none of the norms was measured.
    """
    return norms_compared({"": norm_summary(layers_df, sinks)})


def norm_summary(layers_df: pd.DataFrame, sinks: pd.DataFrame | None = None) -> dict[str, pd.DataFrame]:
    """The small tables behind :func:`norms`.

    Args:
        layers_df: as there.
        sinks: as there.

    Returns:
        ``norms``: by ``kind`` and ``layer``, the 5th, 50th and 95th percentile of each quantity over a sample's
        tokens, averaged over samples, so that a sample counts once, however long it is; ``n_samples`` and
        ``n_tokens`` of the kind. ``roles``: median ``value_norm`` of the sinks by ``role`` and ``layer``.

    Raises:
        CapaProbeError: as :func:`norms`.
    """
    needed = ["step", "layer", "kind", "n_tokens", "sample", *_COLUMNS]
    missing = [name for name in needed if name not in layers_df]
    if missing:
        raise CapaProbeError(
            f"The table of layers lacks the columns {', '.join(missing)}; give prof.layers of a profile."
        )
    table = layers_df.loc[layers_df["step"] == 0, needed]
    if table[[f"{name}_p50" for name, _, _ in _PANELS[:3]]].isna().all(axis=None):
        raise CapaProbeError(
            "This profile holds neither value norms nor residual updates; profile with the probes value_norm and "
            "residual."
        )
    by = table.groupby(["kind", "layer"])
    means = by[_COLUMNS].mean().assign(n_samples=by["sample"].nunique(), n_tokens=by["n_tokens"].sum())
    roles = pd.DataFrame({"role": [], "layer": [], "value_norm": []})
    if sinks is not None and len(sinks):
        roles = sinks.groupby(["role", "layer"])["value_norm"].median().dropna().reset_index()
    n_samples = table["sample"].nunique()
    return {"norms": means.reset_index().assign(n_all=n_samples), "roles": roles}


def norms_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`norms_compared` draws, from a profile.

    Raises:
        CapaProbeError: the run is no profile, or holds none of the norms.
    """
    if source.prof is None:
        raise CapaProbeError("A figure of norms was asked for of a run that is no profile; give a profile.")
    return norm_summary(source.prof.layers, source.tables.get("sinks"))


@styled
def norms_compared(models: ModelTables) -> Figure:
    """The same for several models, a row of panels each.

    Args:
        models: name of a model -> what :func:`norm_summary` returned.

    Raises:
        CapaProbeError: there are too many models.
    """
    panels = [
        panel
        for panel in _PANELS
        if any(tables["norms"][f"{panel[0]}_p50"].notna().any() for tables in models.values())
    ]
    figure, axes = grid(models, len(panels), size=(max(2.32 * len(panels), 7.8), 2.5))
    for row, tables in zip(axes, models.values(), strict=True):
        for panel, (name, _, stream) in zip(row, panels, strict=True):
            _draw(panel, tables, name, stream)
        sized = [panel for panel, (_, _, stream) in zip(row, panels, strict=True) if stream]
        _share_limits(sized)
        for panel, (name, _, _) in zip(row, panels, strict=True):
            if not name.endswith("cosine"):
                _ticks(panel)
        turns = [panel for panel, (name, _, _) in zip(row, panels, strict=True) if name.endswith("cosine")]
        _share_turns(turns)
        for same in (sized, turns):
            for panel in same[1:]:
                panel.tick_params(labelleft=False)
        row[0].set_ylabel("L2 norm (activation units)")
    for panel, (_, title, _) in zip(axes[0], panels, strict=True):
        panel.set_title(title, loc="left", fontweight="bold")
    for panel in axes[-1]:
        panel.set_xlabel("decoder layer (from 0)")
    finish(
        figure, axes, models, "How large values and residual updates are, and how far they turn the stream",
        _subtitle(models), _handles(models, panels), wspace=0.36,
    )  # fmt: skip
    return figure


def _draw(axes: Any, tables: Any, name: str, stream: str | None) -> None:
    table = tables["norms"]
    if name.endswith("cosine"):
        axes.set_yscale("function", functions=(nines, from_nines))
    else:
        axes.set_yscale("log")
    for kind, (colour, marker, _) in _KINDS.items():
        own = table[table["kind"] == kind].sort_values("layer").set_index("layer")
        if len(own):
            _line(axes, own, name, stream, colour, marker)
    if name == "value_norm":
        for role, (colour, marker) in ROLES.items():
            own = tables["roles"][tables["roles"]["role"] == role]
            axes.plot(
                own["layer"],
                own["value_norm"],
                marker,
                color=colour,
                markersize=6.5,
                mec="white",
                mew=0.6,
                zorder=4,
            )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")


def _line(axes: Any, means: pd.DataFrame, name: str, stream: str | None, colour: str, marker: str) -> None:
    layers = means.index.to_numpy()
    low, middle, high = (means[f"{name}_{statistic}"].to_numpy(float) for statistic in _STATISTICS)
    if name.endswith("cosine"):
        low, middle, high = drawable(low), drawable(middle), drawable(high)
    axes.fill_between(layers, low, high, color=colour, alpha=0.16, linewidth=0, zorder=1)
    axes.plot(layers, middle, marker=marker, color=colour, markersize=4.5, linewidth=1.7, zorder=3)
    if stream:
        axes.plot(layers, means[f"{stream}_p50"], color=colour, linewidth=1.5, linestyle=_STREAM, zorder=2.5)


def _share_turns(panels: list[Any]) -> None:
    """One scale for the panels of cosines, and ticks at round ones."""
    drawn = [np.asarray(line.get_ydata(), float) for axes in panels for line in axes.lines]
    bands = [path.vertices[:, 1] for axes in panels for c in axes.collections for path in c.get_paths()]
    values = np.concatenate([*drawn, *bands]) if drawn else np.array([])
    if not np.isfinite(values).any():
        return
    for axes in panels:
        cosine_limits(axes, values, tuple(tick for tick in TICKS if tick not in _CROWDED))
        axes.tick_params(axis="y", labelsize=7.5)


def _share_limits(panels: list[Any]) -> None:
    if panels:
        limits = np.array([axes.get_ylim() for axes in panels])
        for axes in panels:
            axes.set_ylim(limits[:, 0].min(), limits[:, 1].max())


def _ticks(axes: Any) -> None:
    low, high = axes.get_ylim()
    decades = np.log10(high / low)
    # Within a decade or two, 10, 100, ... would leave the axis bare.
    subs = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if decades < 0.8 else (1, 2, 5) if decades < 2.5 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=30))
    axes.yaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=50))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _subtitle(models: ModelTables) -> str:
    lines = []
    for name, tables in models.items():
        table = tables["norms"].groupby("kind")[["n_tokens", "n_all"]].first()
        size = " and ".join(
            count(int(table["n_tokens"][kind]), f"{kind} token")
            for kind in ("visual", "text")
            if kind in table.index
        )
        who = f"{name}: " if len(models) > 1 else ""
        lines.append(f"{who}{count(int(table['n_all'].iloc[0]), 'sample')} with {size}")
    marks = (
        "; marks on their own: median of sinks"
        if any(len(tables["roles"]) for tables in models.values())
        else ""
    )
    lines.append(
        "Lines: median over a sample's tokens; bands: 5th to 95th percentile; both averaged over samples"
        f"{marks}\nCosine (no unit): of the stream before and after the update"
    )
    return "\n".join(lines)


def _handles(models: ModelTables, panels: Any) -> list[Any]:
    kinds = [
        Line2D([], [], color=colour, marker=marker, markersize=4.5, linewidth=1.7, label=label)
        for colour, marker, label in reversed(_KINDS.values())
    ]
    if any(stream for _, _, stream in panels):
        label = "residual stream that it is added to"
        kinds.append(Line2D([], [], color=INK, linewidth=1.5, linestyle=_STREAM, label=label))
    found = {role for tables in models.values() for role in tables["roles"]["role"]}
    return kinds + [
        Line2D([], [], linestyle="", color=ROLES[role][0], marker=ROLES[role][1], label=ROLE_NAMES[role])
        for role in ROLES
        if role in found and panels[0][0] == "value_norm"
    ]

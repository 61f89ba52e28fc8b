"""Cosine of FFN input and output by layer, for visual and for text tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from capa_probe.analysis import layer_ranges
from capa_probe.errors import CapaProbeError
from capa_probe.figures.style import FAINT, INK, TEXT, VISUAL, NotebookFigure, count, headline, styled

COLUMNS = (
    "layer",
    *(f"{kind}_{what}" for kind in ("visual", "text") for what in ("cosine", "low", "high")),
    "n_samples",
    "n_visual",
    "n_text",
    "redundant",
    "visual_only",
)
_TICKS = (-1.0, 0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999)
#: Nearer to 1 than this is drawn here.
_NEAREST = 3e-5


@styled
def ffn_cosine(layers_table: pd.DataFrame, eta: float = 0.96) -> Figure:
    """Mean ``cos(x, x + FFN(norm(x)))`` per layer with intervals, the eta line, and the redundant layers marked.

    The axis is logarithmic in ``1 - cosine``, since what matters is how near to 1 the cosine is.

    Args:
        layers_table: what ``redundant_layers(prof, eta)`` returned.
        eta: the threshold that it was called with.

    Raises:
        CapaProbeError: the table is empty or lacks columns.
    """
    missing = [name for name in COLUMNS if name not in layers_table]
    if missing or layers_table.empty:
        what = f"lacks the columns {', '.join(missing)}" if missing else "is empty"
        raise CapaProbeError(f"The table of layers {what}; give what redundant_layers returned.")
    table = layers_table.sort_values("layer")
    layers = table["layer"].to_numpy()

    figure = NotebookFigure(figsize=(max(7.8, min(0.3 * len(table) + 2, 12.0)), 4.5))
    axes = figure.add_subplot()
    axes.set_yscale("function", functions=(_nines, _from_nines))

    for kind, colour, marker in (("text", TEXT, "s"), ("visual", VISUAL, "o")):
        mean, low, high = (table[f"{kind}_{what}"].to_numpy(float) for what in ("cosine", "low", "high"))
        axes.fill_between(layers, low, high, color=colour, alpha=0.22, linewidth=0, zorder=2)
        axes.plot(layers, mean, color=colour, linewidth=1.8, zorder=3)
        if kind == "visual":
            above = table["redundant"].to_numpy(bool)
            axes.plot(layers[above], mean[above], marker, color=colour, markersize=6.5, zorder=4)
            axes.plot(layers[~above], mean[~above], marker, mec=colour, mfc="white", markersize=6.5, zorder=4)
        else:
            axes.plot(layers, mean, marker, color=colour, markersize=4.5, zorder=3.5)
    axes.axhline(eta, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=2.5)

    _limits(axes, table, eta)
    for layer in table.loc[table["redundant"], "layer"]:
        only = bool(table.loc[table["layer"] == layer, "visual_only"].iloc[0])
        axes.axvspan(
            layer - 0.5, layer + 0.5, color=VISUAL if only else FAINT, alpha=0.13, linewidth=0, zorder=0.5
        )
    axes.set_xlim(layers.min() - 0.5, layers.max() + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=18, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")
    # In the margin, where no curve can run through it.
    axes.annotate(
        f"η = {eta:g}",
        (1, eta),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=INK,
    )
    axes.set_xlabel("decoder layer (from 0)")
    axes.set_ylabel("cosine of FFN input and output\n(no unit; 1: direction unchanged)")

    top = headline(figure, "What the FFN does to visual and to text tokens", _subtitle(table, eta))
    _legend(figure, table, top)
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=0.95 / width, right=1 - 0.75 / width, top=1 - (top + 0.38) / height, bottom=0.58 / height
    )
    return figure


def _subtitle(table: pd.DataFrame, eta: float) -> str:
    redundant = table.loc[table["redundant"], "layer"].tolist()
    only = table.loc[table["visual_only"], "layer"].tolist()
    finding = f"Redundant FFN (visual cosine above {eta:g}): {_named(redundant)}"
    if redundant:
        finding += f"; not so for text tokens: {_named(only)}"
    first = table.iloc[0]
    text = count(int(first["n_text"]), "text token")
    size = f"{count(int(first['n_samples']), 'sample')} with {int(first['n_visual']):,} visual and {text}"
    if table[["visual_low", "text_low"]].isna().all(axis=None):
        return f"{finding}\n{size}; no intervals from a single sample"
    confidence = table.attrs.get("confidence")
    share = "" if confidence is None else f"{100 * confidence:g} % "
    return f"{finding}\n{size}; bands: {share}bootstrap over samples"


def _named(layers: list[int]) -> str:
    return f"layer{'' if len(layers) == 1 else 's'} {layer_ranges(layers)}" if layers else "none"


def _legend(figure: Figure, table: pd.DataFrame, top: float) -> None:
    handles: list[Any] = [
        Line2D([], [], color=VISUAL, marker="o", markersize=6.5, linewidth=1.8, label="visual tokens"),
        Line2D([], [], color=TEXT, marker="s", markersize=4.5, linewidth=1.8, label="text tokens"),
    ]
    both = table["redundant"] & ~table["visual_only"]
    if both.any():
        handles.append(Patch(color=FAINT, alpha=0.3, linewidth=0, label="redundant for both"))
    if table["visual_only"].any():
        handles.append(Patch(color=VISUAL, alpha=0.2, linewidth=0, label="redundant for visual tokens only"))
    width, height = figure.get_size_inches()
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.06 / width, 1 - (top + 0.02) / height),
        ncols=len(handles),
        borderaxespad=0,
        columnspacing=1.6,
        handlelength=1.8,
    )


def _limits(axes: Any, table: pd.DataFrame, eta: float) -> None:
    """Room around all means and bands, and ticks at round cosines in it."""
    names = [f"{kind}_{what}" for kind in ("visual", "text") for what in ("cosine", "low", "high")]
    values = _nines(np.append(table[names].to_numpy(float).ravel(), eta))
    low, high = np.nanmin(values), np.nanmax(values)
    margin = 0.08 * max(high - low, 0.5)
    axes.set_ylim(*_from_nines(np.array([low - margin, high + margin])))
    axis = axes.yaxis
    shown = [tick for tick in _TICKS if low - margin <= _nines(np.array(tick)) <= high + margin]
    axis.set_major_locator(FixedLocator(shown))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _nines(cosine: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 at cosine 0, 1 at 0.9, 2 at 0.99, ..."""
    return -np.log10(np.maximum(1 - np.asarray(cosine, dtype=float), _NEAREST))


def _from_nines(nines: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 - 10.0 ** -np.asarray(nines, dtype=float)

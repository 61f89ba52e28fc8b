"""Several models side by side: up to which layer each looks at the image, and how many visual tokens it can spare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from capa_probe.errors import CapaProbeError
from capa_probe.figures.style import INK, NotebookFigure, headline, run_looks, styled

_STAYS = {
    "all": "all",
    "others_removed": "all but\nothers",
    "region_removed": "all but\nregion",
    "region_kept": "region\nonly",
    "others_kept": "others\nonly",
}


@styled
def depth_compared(models: Mapping[str, Mapping[str, pd.DataFrame]], layer: int = 2) -> Figure:
    """Accuracy over all tasks, a line for each model: all tokens gone, a random share kept, regions removed or kept.

    Args:
        models: name of a model -> the tables of its run of ``capa-probe depth``.
        layer: from which on tokens stay or go, in the second and third panel; every run must have it.

    Raises:
        CapaProbeError: there are too few models or too many, a run measured something other than accuracy, or lacks
            the layer, or two runs kept other shares of the tokens.
    """
    looks = run_looks(models)
    for name, tables in models.items():
        if tables["depth_gone"].get("correct", pd.Series(dtype=float)).isna().all():
            raise CapaProbeError(f"the run of {name} holds no accuracy; give questions with known answers.")
        layers = sorted(set(tables["depth_kept"]["layer"].tolist()))
        if layer not in layers:
            raise CapaProbeError(f"layer={layer} was given, but the run of {name} has the layers {layers}.")
    shares = {name: _shares(tables, layer) for name, tables in models.items()}
    if len({tuple(keeps) for keeps in shares.values()}) > 1:
        raise CapaProbeError(
            f"the runs kept other shares of the tokens at layer {layer}: {shares}; give runs with the same ones."
        )
    figure = NotebookFigure(figsize=(11.6, 4.9))
    gone, kept, regions = figure.subplots(1, 3, sharey=True, width_ratios=(1.1, 0.9, 1.2))
    for number, (name, tables) in enumerate(models.items()):
        colour, marker = looks[name]
        look = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.8}
        _gone(gone, tables, name, look)
        _kept(kept, tables, layer, look)
        _regions(regions, tables, layer, look, (number - (len(models) - 1) / 2) * 0.16)
    gone.set_title("All visual tokens gone", loc="left", fontweight="bold")
    gone.set_xlabel("gone before this share of the decoder layers")
    gone.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: "never" if np.isclose(value, 1) else f"{value:g}")
    )
    gone.set_ylabel("accuracy, all tasks")
    kept.set_title(f"Some kept at random from layer {layer}", loc="left", fontweight="bold")
    kept.set_xlabel("visual tokens that stay")
    regions.set_title(f"Region asked about, from layer {layer}", loc="left", fontweight="bold")
    regions.set_xlabel("visual tokens that stay (others: as many, at random)")
    regions.set_xticks(range(len(_STAYS)), list(_STAYS.values()))
    for axes in (gone, kept, regions):
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.grid(visible=False, axis="x")
    top = headline(
        figure, "Up to which layer the image is read", "Bands and bars: 95 % bootstrap over images"
    )
    width, height = figure.get_size_inches()
    lines = len(models)
    figure.subplots_adjust(
        left=0.75 / width,
        right=1 - 0.15 / width,
        top=1 - (top + 0.4) / height,
        bottom=(0.9 + 0.2 * lines) / height,
        wspace=0.06,
    )
    handles, labels = gone.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.75 / width - 0.01, 0.01), ncols=1)
    return figure


def _of_all(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["task"] == "all"]


def _at_random(tables: Mapping[str, pd.DataFrame], layer: int) -> pd.DataFrame:
    table = _of_all(tables["depth_kept"])
    own = table[(table["layer"] == layer) & (table["score"] == "random")]
    return own.sort_values("keep", ascending=False)


def _shares(tables: Mapping[str, pd.DataFrame], layer: int) -> list[float]:
    return [float(keep) for keep in _at_random(tables, layer)["keep"]]


def _gone(axes: Any, tables: Mapping[str, pd.DataFrame], name: str, look: dict[str, Any]) -> None:
    own = _of_all(tables["depth_gone"]).sort_values("layer")
    x = own["layer"] / own["layer"].max()
    n, images = (int(tables["depth"].iloc[0][column]) for column in ("n", "n_images"))
    axes.fill_between(
        x, own["correct_low"], own["correct_high"], color=look["color"], alpha=0.15, linewidth=0
    )
    axes.plot(x, own["correct"], label=f"{name} (n = {n:,} questions about {images:,} images)", **look)


def _kept(axes: Any, tables: Mapping[str, pd.DataFrame], layer: int, look: dict[str, Any]) -> None:
    own, verdict = _at_random(tables, layer), tables["depth"].iloc[0]
    none = _of_all(tables["depth_gone"]).set_index("layer").loc[layer]
    ends = {
        end: [
            float(share) for share in (verdict[f"whole{end}"], *own[f"correct{end}"], none[f"correct{end}"])
        ]
        for end in ("", "_low", "_high")
    }
    x = np.arange(len(own) + 2)
    axes.fill_between(x, ends["_low"], ends["_high"], color=look["color"], alpha=0.15, linewidth=0)
    axes.plot(x, ends[""], **look)
    axes.set_xticks(x, ["all", *(f"{100 * keep:g} %" for keep in own["keep"]), "none"])


def _regions(
    axes: Any, tables: Mapping[str, pd.DataFrame], layer: int, look: dict[str, Any], shift: float
) -> None:
    table = tables.get("depth_regions", pd.DataFrame())
    if table.empty:
        return
    table = _of_all(table)
    rows = table[(table["layer"] == layer) | (table["tokens"] == "all")]
    rows = rows.drop_duplicates("tokens").set_index("tokens").loc[list(_STAYS)]
    middle = rows["correct"].to_numpy(dtype=float)
    ends = np.abs(rows[["correct_low", "correct_high"]].to_numpy(dtype=float).T - middle)
    axes.errorbar(
        np.arange(len(_STAYS)) + shift,
        middle,
        yerr=ends,
        fmt=look["marker"],
        color=look["color"],
        ecolor=INK,
        elinewidth=0.8,
        markersize=6.5,
    )

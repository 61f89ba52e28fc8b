"""Attention, contribution, removal effect and sink role of every visual token, drawn over the image it comes from."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from capa_probe.analysis.reading import FIRST_LAYER
from capa_probe.errors import CapaProbeError
from capa_probe.figures.entry import ModelTables, Tables
from capa_probe.figures.overlay_tables import QUANTITIES
from capa_probe.figures.reading import check_columns
from capa_probe.figures.style import (
    INK,
    ROLE_NAMES,
    ROLES,
    NotebookFigure,
    count,
    headline,
    headline_height,
    styled,
)
from capa_probe.patches import PLACE, Layout, layouts

#: What stands beside a row.
_WORDS = {
    "attention": "Attention\n(probability)",
    "contribution": "Contribution\n(L2 norm)",
    "removal_effect": "Removal effect\n(L2 norm)",
    "role": "Sinks",
}
_HEAT = colormaps["inferno"]
_TITLE = "Where in the image attention, contribution and sinks lie"
_NEEDED = {
    "tokens": ("layer", *PLACE, "role"),
    "picture": (
        "sample",
        "image",
        "n_images",
        "question",
        "answer",
        "grid_rows",
        "grid_cols",
        "tile_rows",
        "tile_cols",
        "png",
        "sinks_known",
    ),
}
#: Inches: at the sides, between panels, beside rows for their names, below the image for the scale, and at the bottom.
_EDGE, _GAP, _BESIDE, _SCALE, _BELOW = 0.12, 0.1, 0.62, 0.62, 0.3
_NOTE = {"boxstyle": "square,pad=0.15", "facecolor": INK, "alpha": 0.65, "linewidth": 0}


@dataclass(frozen=True)
class _Row:
    """One quantity, or the roles, in one way in which the tokens cover the image."""

    what: str
    layout: Layout


@styled
def overlays(tables: Tables) -> Figure:
    """One image with what its visual tokens get and give laid over it: a column per layer, a row per quantity.

    Colours go with the square root of the value, from 0 to the largest one of the quantity and layer; the largest one
    of a panel stands in its corner. Where the model tiles, the tiles and the thumbnail have rows of their own on the
    same scale. Sinks have a row where there are any.

    Args:
        tables: what :func:`capa_probe.figures.overlay_tables.overlay_tables` returned.

    Raises:
        CapaProbeError: a table or a column is missing, or places and grid do not match.
    """
    check_columns(tables, _NEEDED, "what overlay_tables returned")
    facts = tables["picture"].iloc[0]
    # A place is the same token in every layer.
    by_layer = {
        int(str(layer)): own.sort_values("position", ignore_index=True)
        for layer, own in tables["tokens"].groupby("layer")
    }
    rows = _rows(by_layer, facts)
    picture = Image.open(io.BytesIO(facts["png"])).convert("RGB")
    ratio = picture.height / picture.width
    side = min(2.1, 2.1 / ratio)  # width of a panel, in inches
    left = _EDGE + side + _BESIDE
    width = max(left + len(by_layer) * (side + _GAP), 7.8)
    figure = NotebookFigure(figsize=(width, 10))
    subtitle = _subtitle(tables["tokens"], facts)
    top = headline_height(width, subtitle) + 0.32
    height = top + max(len(rows) * (side * ratio + _GAP), side * ratio + _SCALE) + _BELOW
    figure.set_size_inches(width, height)
    headline(figure, _TITLE, subtitle)

    def panel(x: float, row: int) -> Any:
        bottom = height - top - (row + 1) * (side * ratio + _GAP) + _GAP
        return figure.add_axes((x / width, bottom / height, side / width, side * ratio / height))

    image = panel(_EDGE, 0)
    _picture(image, picture, dimmed=False)
    image.set_title("Image", loc="left", fontsize=9)
    _scale(figure, (_EDGE / width, 1 - (top + side * ratio + 0.24) / height, side / width, 0.11 / height))
    for number, row in enumerate(rows):
        for column, (layer, tokens) in enumerate(by_layer.items()):
            axes = panel(left + column * (side + _GAP), number)
            _picture(axes, picture, dimmed=True)
            if number == 0:
                axes.set_title(f"Layer {layer}", loc="left", fontsize=9, fontweight="bold")
            if row.what == "role":
                _roles(axes, picture, row.layout, tokens)
            else:
                values = tokens[row.what].to_numpy(np.float64)
                _heat(axes, picture, row.layout.spread(values), values)
            if column == 0:
                axes.set_ylabel(
                    _WORDS[row.what] + (f"\n{row.layout.label}" if row.layout.label else ""), fontsize=8.5
                )
    found = [role for role in ROLES if (tables["tokens"]["role"] == role).any()]
    if found:
        handles = [
            Line2D([], [], linestyle="", marker="s", mfc="none", mec=ROLES[role][0], mew=2, label=ROLE_NAMES[role])
            for role in found
        ]  # fmt: skip
        figure.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(left / width, 0.06 / height), ncols=3, borderaxespad=0
        )  # fmt: skip
    return figure


def overlays_of_model(models: ModelTables) -> Figure:
    """:func:`overlays` of one model.

    Raises:
        CapaProbeError: there is not exactly one, or as :func:`overlays`.
    """
    if len(models) != 1:
        raise CapaProbeError(f"{len(models)} models were given; overlays show one model at a time.")
    (tables,) = models.values()
    return overlays(tables)


def _rows(by_layer: dict[int, pd.DataFrame], facts: pd.Series[Any]) -> list[_Row]:
    tokens = next(iter(by_layer.values()))
    grid = (int(facts["grid_rows"]), int(facts["grid_cols"]))
    ways = layouts(tokens, int(facts["image"]), grid, (int(facts["tile_rows"]), int(facts["tile_cols"])))
    rows = [_Row(name, layout) for name in QUANTITIES if name in tokens for layout in ways]
    sinks = np.any([own["role"].to_numpy() != "" for own in by_layer.values()], axis=0)
    return rows + [_Row("role", layout) for layout in ways if sinks[layout.tokens].any()]


def _picture(axes: Any, picture: Image.Image, dimmed: bool) -> None:
    pixels = np.asarray(picture.convert("L") if dimmed else picture)
    if dimmed:
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255 / 0.55, aspect="auto")
    else:
        axes.imshow(pixels, aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _colours(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """RGBA of shares of the largest value."""
    root = np.sqrt(np.clip(np.nan_to_num(share), 0, 1))
    colours = np.array(_HEAT(root))
    colours[..., 3] = np.where(np.isnan(share), 0.0, 0.3 + 0.48 * root)
    return colours


def _heat(axes: Any, picture: Image.Image, cells: NDArray[np.float64], scale: NDArray[np.float64]) -> None:
    largest, own = (
        float(np.nanmax(values)) if np.isfinite(values).any() else np.nan for values in (scale, cells)
    )
    axes.imshow(
        _colours(cells / (largest if largest > 0 else 1.0)),
        extent=(-0.5, picture.width - 0.5, picture.height - 0.5, -0.5), interpolation="nearest", aspect="auto",
    )  # fmt: skip
    _note(axes, "not measured" if np.isnan(own) else f"max {own:.2g}")


def _scale(figure: Figure, place: tuple[float, float, float, float]) -> None:
    """What a colour stands for, on the grey that a panel has below it."""
    axes = figure.add_axes(place)
    axes.set_facecolor("#808080")
    share = np.linspace(0, 1, 200)[None] ** 2
    axes.imshow(_colours(share), extent=(0, 1, 0, 1), aspect="auto")
    axes.set_xticks(np.sqrt([0, 0.1, 0.25, 0.5, 1]), ["0", "10", "25", "50", "100 %"], fontsize=7.5)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.set_xlabel("of the largest in the layer", fontsize=8)


def _roles(axes: Any, picture: Image.Image, layout: Layout, tokens: pd.DataFrame) -> None:
    width, height = picture.width / layout.shape[1], picture.height / layout.shape[0]
    roles = tokens["role"].to_numpy(object)[layout.tokens]
    for row, col, role in zip(layout.row.tolist(), layout.col.tolist(), roles, strict=True):
        if role:
            axes.add_patch(
                Rectangle(
                    (col * width - 0.5, row * height - 0.5), width, height, facecolor=(ROLES[role][0], 0.35),
                    edgecolor=ROLES[role][0], linewidth=1.6,
                )
            )  # fmt: skip
    n = int((roles != "").sum())
    layer = int(tokens["layer"].iloc[0])
    _note(
        axes,
        count(n, "sink") if n else "no sinks" if layer >= FIRST_LAYER else f"from layer {FIRST_LAYER} on",
    )


def _note(axes: Any, text: str) -> None:
    axes.annotate(
        text, (1, 0), (-2, 2), "axes fraction", "offset points", ha="right", va="bottom", fontsize=7.5,
        color="white", bbox=_NOTE,
    )  # fmt: skip


def _subtitle(tokens: pd.DataFrame, facts: pd.Series[Any]) -> str:
    which = f", image {int(facts['image']) + 1} of {int(facts['n_images'])}" if facts["n_images"] > 1 else ""
    # A question may hold the model's own line breaks.
    question = " ".join(str(facts["question"]).split())
    question = question if len(question) <= 90 else f"{question[:89]}…"
    n = int((tokens["layer"] == tokens["layer"].iloc[0]).sum())
    n_sinks = int((tokens["role"] != "").sum())
    if not facts["sinks_known"]:
        sinks = "sinks were not classified"
    else:
        tau = "" if np.isnan(facts["tau"]) else f" at τ = {facts['tau']:g}"
        sinks = f"{count(n_sinks, 'sink')}{tau}" if n_sinks else f"no sinks{tau} in the layers shown"
    what = f"{count(n, 'visual token')} per layer; {sinks}; what the last prompt token takes from each"
    lines = [
        f"Sample {facts['sample']}{which}: “{question}” — the model answers “{facts['answer']}”",
        f"{what}; in the corners: the largest value",
    ]
    if "removal_effect" not in tokens:
        lines.append("Removal effect: not in this profile (it is measured with --probes all)")
    return "\n".join(lines)

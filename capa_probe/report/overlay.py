"""Measured values of visual tokens drawn over the image that they come from.

Everything is placed in pixels of the kept image, which shows exactly what the grid of visual tokens covers.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from capa_probe.errors import CapaProbeError
from capa_probe.examples import ExampleImage

#: Token columns that are read for overlays.
COLUMNS = (
    "sample",
    "layer",
    "position",
    "image",
    "tile",
    "row",
    "col",
    "attention",
    "contribution",
)
#: Column to its unit.
QUANTITIES = {"attention": "probability", "contribution": "L2 norm"}
#: Bytes that the pictures of one example may take: four examples, as by default, stay under 6 MB.
BUDGET = 1_500_000
#: Tile number of a thumbnail.
_THUMBNAIL = -1
#: A cell of the heat map becomes so many pixels that the map has about this many a side.
_HEAT_SIDE = 240
_COLOURS = colormaps["inferno"]
#: How opaque the colour of the smallest and of the largest value is.
_OPACITY = (0.3, 0.78)
#: The picture under a heat map is without colour and darker by this factor, so that what is bright is a large value.
_DIMMED = 0.55


@dataclass(frozen=True)
class Mark:
    """Outline of a sink, in pixels of the kept image."""

    x: float
    y: float
    width: float
    height: float
    role: str
    position: int


@dataclass(frozen=True)
class Panel:
    """One quantity of one layer over one picture.

    Attributes:
        quantity: which column of the token table.
        unit: its unit.
        largest: the value that the brightest colour stands for.
        heat: the heat map, as a data URI.
    """

    quantity: str
    unit: str
    largest: float
    heat: str


@dataclass(frozen=True)
class Row:
    """The panels of one layer."""

    layer: int
    panels: tuple[Panel, ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class View:
    """One picture, whole or as its thumbnail, with the layers drawn over it.

    Attributes:
        label: which image of how many, and whether tiles or thumbnail.
        image: the picture in colour, as a data URI.
        grey: the picture without colour, to draw over.
        width, height: its size in pixels.
        grid: rows and columns of visual tokens over all of it.
        rows: one per layer.
    """

    label: str
    image: str
    grey: str
    width: int
    height: int
    grid: tuple[int, int]
    rows: tuple[Row, ...]

    @property
    def n_bytes(self) -> int:
        """What it adds to a page, but for tags."""
        heat = sum(len(panel.heat) for row in self.rows for panel in row.panels)
        return len(self.image) + len(self.grey) + heat


def views(
    images: Sequence[ExampleImage],
    folder: Path,
    tokens: pd.DataFrame | None,
    sinks: pd.DataFrame | None,
    layers: Sequence[int],
    budget: int = BUDGET,
) -> tuple[list[View], list[str]]:
    """The pictures of one example: as many of its images, in order, as the budget has room for, the first in any case.

    An image over which nothing can be drawn is shown as it is.

    Args:
        images: the example's images.
        folder: where their files lie.
        tokens: the sample's visual tokens at prefill, with the columns of ``COLUMNS``; None to draw over no image.
        sinks: the sample's sinks; None where they are not known.
        layers: layers to draw.
        budget: bytes that all pictures together may take.

    Returns:
        The pictures, and sentences that say what is missing.
    """
    found: list[View] = []
    missing: dict[str, list[str]] = {}
    size = left_out = 0
    for index, image in enumerate(images):
        name = f"image {index + 1} of {len(images)}" if len(images) > 1 else ""
        own: list[View] = []
        try:
            if tokens is None:
                own = [plain(name, folder / image.file)]
            else:
                here = tokens[tokens["image"] == index]
                own, why = _over(name, folder / image.file, image, here, sinks, layers)
                if why:
                    missing.setdefault(why, []).append(name)
        except CapaProbeError as error:
            missing.setdefault(str(error), []).append(name)
        size += sum(view.n_bytes for view in own)
        if found and size > budget:
            left_out = len(images) - index
            break
        found += own
    said = [
        why if len(names) == len(images) else f"{', '.join(names).capitalize()}: {why}"
        for why, names in missing.items()
    ]
    if left_out:
        more = "1 more image" if left_out == 1 else f"{left_out:,} more images"
        said.append(
            f"{more} of this sample {'is' if left_out == 1 else 'are'} left out, to keep the report small."
        )
    return found, said


def _over(
    name: str,
    file: Path,
    image: ExampleImage,
    tokens: pd.DataFrame,
    sinks: pd.DataFrame | None,
    layers: Sequence[int],
) -> tuple[list[View], str]:
    """The pictures of one image; where nothing can be drawn over it, the image as it is, and why."""
    own = tokens[tokens["row"] >= 0]
    if image.grid is None or image.tile_grid is None or own.empty:
        return [plain(name, file)], "It is not known where in the image its visual tokens lie."
    tiled = image.tile_grid != (1, 1)
    found = []
    for tile_grid, chosen, what in (
        (image.tile_grid, own[own["tile"] >= 0], f"{image.tile_grid[0]} × {image.tile_grid[1]} tiles"),
        ((1, 1), own[own["tile"] == _THUMBNAIL].assign(tile=0), "thumbnail"),
    ):
        if len(chosen):
            label = ", ".join(part for part in (name, what if tiled else "") if part)
            try:
                place = places(chosen, image.grid, tile_grid)
            except CapaProbeError as error:
                return [plain(name, file)], str(error)
            found.append(_view(label, file, image.grid, tile_grid, chosen, place, sinks, layers))
    return found, ""


def plain(label: str, file: Path) -> View:
    """A picture with nothing drawn over it.

    Raises:
        CapaProbeError: it cannot be opened.
    """
    picture = _open(file)
    return View(label, data_uri(picture), "", *picture.size, (0, 0), ())


def _view(
    label: str,
    file: Path,
    grid: tuple[int, int],
    tile_grid: tuple[int, int],
    tokens: pd.DataFrame,
    place: tuple[NDArray[np.int64], NDArray[np.int64]],
    sinks: pd.DataFrame | None,
    layers: Sequence[int],
) -> View:
    picture = _open(file)
    shape = (grid[0] * tile_grid[0], grid[1] * tile_grid[1])
    width, height = picture.width / shape[1], picture.height / shape[0]
    rows = []
    for layer in layers:
        here = (tokens["layer"] == layer).to_numpy()
        panels = []
        for quantity, unit in QUANTITIES.items():
            values = np.full(shape, np.nan)
            values[place[0][here], place[1][here]] = tokens.loc[here, quantity]
            if not np.isnan(values).all():
                panels.append(Panel(quantity, unit, float(np.nanmax(values)), data_uri(heat_map(values))))
        where = zip(*(axis[here].tolist() for axis in place), tokens.loc[here, "position"], strict=True)
        roles = _roles(sinks, layer)
        marks = tuple(
            Mark(col * width, row * height, width, height, roles[position], int(position))
            for row, col, position in where
            if position in roles
        )
        rows.append(Row(layer, tuple(panels), marks))
    return View(label, data_uri(picture), data_uri(dimmed(picture)), *picture.size, shape, tuple(rows))


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError):  # Pillow says of a broken PNG that its syntax is wrong
        raise CapaProbeError(f"The image {file.name} of the example is missing or cannot be read.") from None


def places(
    tokens: pd.DataFrame, grid: tuple[int, int], tile_grid: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each token in the grid over the whole image, tiles in reading order: (token,) each.

    Raises:
        CapaProbeError: one lies outside of it.
    """
    tile, row, col = (tokens[name].to_numpy(np.int64) for name in ("tile", "row", "col"))
    inside = (tile < tile_grid[0] * tile_grid[1]) & (row < grid[0]) & (col < grid[1])
    if not inside.all():
        raise CapaProbeError("The image that is kept and the visual tokens of this sample do not match.")
    return tile // tile_grid[1] * grid[0] + row, tile % tile_grid[1] * grid[1] + col


def dimmed(picture: Image.Image) -> Image.Image:
    """The picture as it lies under a heat map."""
    return picture.convert("L").point([round(_DIMMED * level) for level in range(256)])


def heat_map(values: NDArray[np.float64]) -> Image.Image:
    """Values of a grid (row, column) as colours to lay over an image; where there is no value, nothing.

    The colour goes with the square root of the value, from 0 to the largest one, so that the many small values of an
    attention row can be told apart; the larger the value, the brighter and the less transparent.
    """
    largest = np.nanmax(values)
    share = np.sqrt(np.clip(np.nan_to_num(values) / (largest if largest > 0 else 1.0), 0, 1))
    colours = np.rint(255 * shades(share)).astype(np.uint8)
    colours[np.isnan(values), 3] = 0
    # Enlarged here: browsers differ in how they enlarge a few pixels.
    factor = max(1, round(_HEAT_SIDE / max(values.shape)))
    return Image.fromarray(colours.repeat(factor, axis=0).repeat(factor, axis=1))


def shades(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colour (red, green, blue, opacity) for shares of the colour scale, each from 0 to 1."""
    colours: NDArray[np.float64] = np.array(_COLOURS(share))
    colours[..., 3] = _OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * share
    return colours


def colour_bar(n: int = 12) -> str:
    """The colour scale as a CSS gradient, from 0 on the left to the largest value on the right.

    As it looks over a picture of middle grey; linear in the value.
    """
    stops = []
    for value in np.linspace(0, 1, n) ** 2:  # closer where the colour changes faster
        *rgb, opacity = shades(np.array(np.sqrt(value)))
        colour = ", ".join(f"{255 * (opacity * part + (1 - opacity) * _DIMMED / 2):.0f}" for part in rgb)
        stops.append(f"rgb({colour}) {100 * value:.1f}%")
    return f"linear-gradient(to right, {', '.join(stops)})"


def data_uri(image: Image.Image) -> str:
    """An image as a ``data:`` URI: PNG where that is small, as heat maps and drawings are, otherwise JPEG."""
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    content, kind = png.getvalue(), "png"
    if image.mode != "RGBA" and len(content) > 30_000:
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=85, optimize=True)
        if jpeg.tell() < len(content):
            content, kind = jpeg.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def spread(n_layers: int, most_sinks: int | None, n: int = 4) -> list[int]:
    """Layers to draw: ``n`` over the whole depth, first and last among them, and the one with most sinks."""
    chosen: Iterable[Any] = np.linspace(0, n_layers - 1, min(n, n_layers)).round().astype(int).tolist()
    return sorted({*chosen, *([] if most_sinks is None else [most_sinks])})


def _roles(sinks: pd.DataFrame | None, layer: int) -> dict[int, str]:
    if sinks is None:
        return {}
    here = sinks[sinks["layer"] == layer]
    return dict(zip(here["position"].astype(int), here["role"].astype(str), strict=True))

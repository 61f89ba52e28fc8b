"""The images of an example, and which of its visual tokens lies in which cell of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from capa_probe.display import data_uri
from capa_probe.errors import CapaProbeError
from capa_probe.examples import ExampleImage
from capa_probe.patches import layouts

_COLOURS = colormaps["inferno"]
#: A PNG of more bytes is tried as JPEG as well.
_LARGE = 30_000


@dataclass(frozen=True)
class Picture:
    """One picture, whole or as its thumbnail, and its cells.

    Attributes:
        label: which image of how many, and whether tiles or thumbnail; "" where there is only one.
        image: as a data URI; "" for that of the picture before it, of which this is the thumbnail.
        width, height: its size in pixels.
        grid: rows and columns of cells over all of it; (0, 0) where it is not known how tokens lie on it.
        cells: for each cell in reading order, the token's index among the sample's visual tokens; -1 for none.
    """

    label: str
    image: str
    width: int
    height: int
    grid: tuple[int, int]
    cells: tuple[int, ...]


def pictures(
    images: Sequence[ExampleImage], folder: Path, tokens: pd.DataFrame | None, room: float
) -> tuple[list[Picture], list[str]]:
    """The pictures of one example: as many of its images, in order, as there is room for, the first in any case.

    An image whose tokens cannot be placed is shown as it is.

    Args:
        images: the example's images.
        folder: where their files lie.
        tokens: the sample's visual tokens with the columns of ``PLACE``, one row each in the order of their
            positions; None where none are known.
        room: characters that all pictures together may take.

    Returns:
        The pictures, and sentences that say what is missing.
    """
    found: list[Picture] = []
    missing: dict[str, list[str]] = {}
    size = left_out = 0
    for index, image in enumerate(images):
        name = f"image {index + 1} of {len(images)}" if len(images) > 1 else ""
        try:
            own, why = _of_image(name, folder / image.file, image, tokens, index)
        except CapaProbeError as error:
            own, why = [], str(error)
        if why:
            missing.setdefault(why, []).append(name)
        size += sum(len(picture.image) + 5 * len(picture.cells) for picture in own)
        if found and size > room:
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


def _of_image(
    name: str, file: Path, image: ExampleImage, tokens: pd.DataFrame | None, index: int
) -> tuple[list[Picture], str]:
    if tokens is None:
        return [plain(name, file)], ""
    try:
        found = layouts(tokens, index, image.grid, image.tile_grid)
    except CapaProbeError as error:
        return [plain(name, file)], str(error)
    picture = _open(file)
    uri, indices = data_uri(picture, _LARGE), np.arange(len(tokens))
    return [
        Picture(
            ", ".join(part for part in (name, layout.label) if part),
            "" if number else uri,
            *picture.size,
            layout.shape,
            tuple(layout.spread(indices, -1).ravel().tolist()),
        )
        for number, layout in enumerate(found)
    ], ""


def plain(label: str, file: Path) -> Picture:
    """A picture without cells.

    Raises:
        CapaProbeError: it cannot be opened.
    """
    picture = _open(file)
    return Picture(label, data_uri(picture, _LARGE), *picture.size, (0, 0), ())


def colours() -> NDArray[np.uint8]:
    """The colour scale of heat maps, dark to bright: (256, 3)."""
    return np.rint(255 * np.array(_COLOURS(np.linspace(0, 1, 256)))[:, :3]).astype(np.uint8)


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError):  # Pillow says of a broken PNG that its syntax is wrong
        raise CapaProbeError(f"The image {file.name} of the example is missing or cannot be read.") from None

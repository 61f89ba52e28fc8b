"""Where in an image its visual tokens lie: in the grid of its tiles, of its thumbnail, or of the image as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from capa_probe.errors import CapaProbeError

#: Columns of the token table that say where a token lies.
PLACE = ("position", "image", "tile", "row", "col")
#: Tile number of a thumbnail.
THUMBNAIL = -1


@dataclass(frozen=True)
class Layout:
    """One way in which visual tokens cover an image.

    Attributes:
        label: "2 × 3 tiles" or "thumbnail" where the model tiles; "" where it does not.
        shape: rows and columns of tokens over the whole image.
        tokens: bool (token,), which of the tokens given lie in it.
        row, col: (token in it,) places in ``shape``.
    """

    label: str
    shape: tuple[int, int]
    tokens: NDArray[np.bool_]
    row: NDArray[np.int64]
    col: NDArray[np.int64]

    def spread(self, values: ArrayLike, fill: Any = np.nan) -> NDArray[Any]:
        """Values of all tokens given, as a picture: (row, column), with ``fill`` where there is no token."""
        own = np.asarray(values)[self.tokens]
        dtype = np.result_type(own, np.min_scalar_type(fill)) if len(own) else np.float64
        cells = np.full(self.shape, fill, dtype=dtype)
        cells[self.row, self.col] = own
        return cells


def layouts(
    tokens: pd.DataFrame,
    image: int,
    grid: tuple[int, int] | None,
    tile_grid: tuple[int, int] | None,
) -> list[Layout]:
    """How the visual tokens of one image cover it: one layout, or two where there are tiles and a thumbnail.

    Args:
        tokens: visual tokens of one sample, with the columns of ``PLACE``; those of other images are passed over.
        image: index of the image.
        grid: rows and columns of tokens, of each tile where the model tiles; None where unknown.
        tile_grid: rows and columns of tiles, (1, 1) unless the model tiles; None where unknown.

    Raises:
        CapaProbeError: it is not known where the tokens lie, or one lies outside of the grid.
    """
    here = ((tokens["image"] == image) & (tokens["row"] >= 0)).to_numpy(bool)
    if grid is None or tile_grid is None or not here.any():
        raise CapaProbeError("It is not known where in the image its visual tokens lie.")
    tile, row, col = (tokens[name].to_numpy(np.int64) for name in ("tile", "row", "col"))
    tiled = tuple(tile_grid) != (1, 1)
    found = []
    for own, (rows, cols), label in (
        (here & (tile >= 0), tile_grid, f"{tile_grid[0]} × {tile_grid[1]} tiles"),
        (here & (tile == THUMBNAIL), (1, 1), "thumbnail"),
    ):
        if not own.any():
            continue
        at = np.maximum(tile[own], 0)  # tiles are numbered in reading order
        if not ((at < rows * cols) & (row[own] < grid[0]) & (col[own] < grid[1])).all():
            raise CapaProbeError("The image that is kept and the visual tokens of this sample do not match.")
        found.append(
            Layout(
                label if tiled else "",
                (grid[0] * rows, grid[1] * cols),
                own,
                at // cols * grid[0] + row[own],
                at % cols * grid[1] + col[own],
            )
        )
    return found

"""What a scene's visual tokens show, as indices: what the tower learns to tell, and what symbols stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from capa_probe.demo.drawing import Mark
from capa_probe.demo.scenes import Scene
from capa_probe.demo.worlds import CHARACTERS, COLORS, SHAPES, World
from demo_training.families.base import Grid, Layout

_COLORS = tuple(COLORS)
#: The first four fields of a token that shows nothing.
NOTHING = (len(SHAPES), len(COLORS), len(CHARACTERS), len(CHARACTERS))
_SHAPE, _COLOR, _TEXT = 0, 1, 2
#: Share of a token, in each direction, that a mark must lie over to count as shown there.
_OVERLAP = 0.25
#: Share of its reach that a shape is taken to fill in every direction: the corners of its box are mostly empty.
_FILLED = 0.75

#: Indices by token and field: see :func:`field_sizes`.
Sketch = list[list[int]]


def field_sizes(world: World, untold: bool = False) -> dict[str, int]:
    """How many values each field takes; the last of the first four is "none".

    Args:
        world: what is drawn.
        untold: whether there are tokens that tell no place; "none" is then the last value of row and column as well.
    """
    return {
        "shape": NOTHING[0] + 1,
        "color": NOTHING[1] + 1,
        "character 1": NOTHING[2] + 1,
        "character 2": NOTHING[3] + 1,
        "row": world.largest_board + untold,
        "column": world.largest_board + untold,
    }


def token_cells(scene: Scene, layout: Layout) -> list[int]:
    """For each token, the cell of the board that its middle lies in; -1 for a thumbnail's."""
    found = []
    for grid in layout.grids:
        for place in grid.order:
            row, col = divmod(place, grid.cols)
            cell_row = (2 * row + 1) * scene.rows // (2 * grid.rows)
            cell_col = (2 * col + 1) * scene.cols // (2 * grid.cols)
            found.append(cell_row * scene.cols + cell_col if grid.told else -1)
    return found


def sketch_patches(scene: Scene, marks: Sequence[Mark], layout: Layout) -> Sketch:
    """Every token tells what it shows itself: shape and color of the object, and which character.

    Where cells say where they lie, a token tells the place of what it shows, even if more of it lies in another cell.
    """
    rows, first = _empty(scene, layout), 0
    for grid in layout.grids:
        token = {place: first + at for at, place in enumerate(grid.order)}
        first += len(grid.order)
        if grid.told:
            _tell_marks(rows, scene, marks, grid, token)
    return rows


def sketch_symbols(
    scene: Scene, layout: Layout, n: int, rng: np.random.Generator, most: int = 3
) -> tuple[Sketch, list[int]]:
    """A scene as some of its tokens, without drawing it: those that show something, and empty ones up to ``n``.

    Args:
        scene: the board.
        layout: the visual tokens of its image.
        n: tokens; all of them where the image has fewer.
        rng: draws the tokens.
        most: an object has one to so many tokens, unless shape and color lie apart.

    Returns:
        A row for each token, and which of the image's it is, in their order.
    """
    cells = token_cells(scene, layout)
    own: dict[int, list[int]] = {cell: [] for cell in range(scene.rows * scene.cols)}
    for token, cell in enumerate(cells):
        if cell >= 0:
            own[cell].append(token)
    across = _tokens_across(scene, layout)
    chosen: dict[int, tuple[int, tuple[str, ...], str]] = {}  # token -> cell, fields, characters
    for cell in scene.objects:
        if scene.world.apart:
            for token, field in zip(rng.permutation(own[cell])[:2], ("color", "shape"), strict=True):
                chosen[int(token)] = (cell, (field,), "")
        else:
            for token in rng.permutation(own[cell])[: rng.integers(1, most + 1)]:
                chosen[int(token)] = (cell, ("shape", "color"), "")
    for cell, text in scene.texts.items():
        lines = [line for line in across if cells[line[0]] == cell]
        line = lines[int(rng.integers(len(lines)))]
        for place, character in enumerate(text):
            token = line[min(place, len(line) - 1)]  # in a narrow cell, one token shows both
            _, shows, told = chosen.get(token, (cell, (), ""))
            chosen[token] = (cell, (*shows, str(place)), told + character)
    if scene.world.label_size:
        # How large the board is, which its last cell says.
        chosen.setdefault(own[max(own)][-1], (max(own), (), ""))
    free = np.setdiff1d(np.arange(layout.n_tokens), list(chosen))
    tokens = sorted([*chosen, *rng.permutation(free)[: max(0, n - len(chosen))].tolist()])
    rows = _empty(scene, layout)
    for token, (cell, shows, characters) in chosen.items():
        if characters:
            for place, character in zip(shows, characters, strict=True):
                rows[token][_TEXT + int(place)] = CHARACTERS.index(character)
        elif shows:
            _tell_object(rows[token], scene, cell, shows)
    return [rows[token] for token in tokens], tokens


def _empty(scene: Scene, layout: Layout) -> Sketch:
    nowhere = scene.world.largest_board
    return [
        [*NOTHING, *(divmod(cell, scene.cols) if cell >= 0 else (nowhere, nowhere))]
        for cell in token_cells(scene, layout)
    ]


def _tokens_across(scene: Scene, layout: Layout) -> list[list[int]]:
    """The tokens that lie side by side in one cell, line by line of each grid."""
    found: dict[tuple[int, int, int], list[int]] = {}
    cells, token = token_cells(scene, layout), 0
    for at, grid in enumerate(layout.grids):
        for place in grid.order:
            if grid.told:
                found.setdefault((at, place // grid.cols, cells[token]), []).append(token)
            token += 1
    return [line for _, line in sorted(found.items())]


def _tell_marks(
    rows: Sketch, scene: Scene, marks: Sequence[Mark], grid: Grid, token: Mapping[int, int]
) -> None:
    """Write into the rows of a grid's tokens what the marks show there."""
    shown: list[tuple[float, int, Mark, int]] = []  # distance of the middles, token, mark, which character
    for mark in marks:
        parts = len(scene.texts[mark.cell]) if "text" in mark.shows else 1
        filled = _FILLED if "shape" in mark.shows else 1.0
        for part in range(parts):
            x = mark.x + (part - 0.5) * mark.reach[0] if "text" in mark.shows else mark.x
            reach = filled * mark.reach[0] / parts, filled * mark.reach[1]
            shown += [
                (_distance(scene, grid, at, x, mark.y), token[at], mark, part)
                for at in _reached(scene, grid, x, mark.y, reach)
            ]
    owner: dict[int, int] = {}
    for _, at, mark, _ in sorted(shown, key=lambda each: each[0]):
        owner.setdefault(at, mark.cell)
    for _, at, mark, part in shown:
        if scene.world.label_size and owner[at] != mark.cell:
            continue
        if "text" in mark.shows:
            rows[at][_TEXT + part] = CHARACTERS.index(scene.texts[mark.cell][part])
        else:
            _tell_object(rows[at], scene, mark.cell, mark.shows)
        if scene.world.label_size:
            rows[at][-2:] = divmod(mark.cell, scene.cols)


def _distance(scene: Scene, grid: Grid, place: int, x: float, y: float) -> float:
    """From a point to the middle of a place of the grid, in pixels."""
    (height, width), (row, col) = scene.image_shape, divmod(place, grid.cols)
    return math.hypot((col + 0.5) * width / grid.cols - x, (row + 0.5) * height / grid.rows - y)


def _tell_object(row: list[int], scene: Scene, cell: int, shows: Sequence[str]) -> None:
    shape, color = scene.objects[cell]
    if "shape" in shows:
        row[_SHAPE] = SHAPES.index(shape)
    if "color" in shows:
        row[_COLOR] = _COLORS.index(color)


def _reached(scene: Scene, grid: Grid, x: float, y: float, reach: tuple[float, float]) -> list[int]:
    """Places of a grid that a mark lies over far enough, and always the one that its middle lies in."""
    height, width = scene.image_shape
    lines = []
    for middle, half, n, size in (
        (y, reach[1], grid.rows, height / grid.rows),
        (x, reach[0], grid.cols, width / grid.cols),
    ):
        over = [
            k
            for k in range(n)
            if min(middle + half, (k + 1) * size) - max(middle - half, k * size) > _OVERLAP * size
        ]
        lines.append(sorted({*over, int(middle // size)}))
    return [row * grid.cols + col for row in lines[0] for col in lines[1]]

"""What a scene's patches show, as indices: what the tower learns to tell, and what symbols stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from capa_probe.demo.drawing import Mark
from capa_probe.demo.scenes import Scene
from capa_probe.demo.worlds import CHARACTERS, COLORS, SHAPES, World
from demo_training.vocabulary import N_PATCHES, PATCHES_PER_SIDE

_COLORS = tuple(COLORS)
#: The first four fields of a patch that shows nothing.
NOTHING = (len(SHAPES), len(COLORS), len(CHARACTERS), len(CHARACTERS))
_SHAPE, _COLOR, _TEXT = 0, 1, 2
#: Share of a patch, in each direction, that a mark must lie over to count as shown there.
_OVERLAP = 0.25
#: Share of its reach that a shape is taken to fill in every direction: the corners of its box are mostly empty.
_FILLED = 0.75

#: Indices by patch and field: see :func:`field_sizes`.
Sketch = list[list[int]]


def field_sizes(world: World) -> dict[str, int]:
    """How many values each field takes; the last of the first four is "none"."""
    return {
        "shape": NOTHING[0] + 1,
        "color": NOTHING[1] + 1,
        "character 1": NOTHING[2] + 1,
        "character 2": NOTHING[3] + 1,
        "row": world.largest_board,
        "column": world.largest_board,
    }


def patch_cell(patch: int, board: int) -> int:
    """The cell that the middle of a patch lies in."""
    row, col = divmod(patch, PATCHES_PER_SIDE)
    return (2 * row + 1) * board // (2 * PATCHES_PER_SIDE) * board + (2 * col + 1) * board // (
        2 * PATCHES_PER_SIDE
    )


def sketch_patches(scene: Scene, marks: Sequence[Mark]) -> Sketch:
    """Every patch tells what it shows itself: shape and color of the object, and which character."""
    rows = _empty(scene)
    for mark in marks:
        if "text" in mark.shows:
            for place, character in enumerate(scene.texts[mark.cell]):
                middle = mark.x + (place - 0.5) * mark.reach[0]
                for patch in _reached(scene.world, middle, mark.y, (mark.reach[0] / 2, mark.reach[1])):
                    rows[patch][_TEXT + place] = CHARACTERS.index(character)
        else:
            filled = _FILLED if "shape" in mark.shows else 1.0
            reach = filled * mark.reach[0], filled * mark.reach[1]
            for patch in _reached(scene.world, mark.x, mark.y, reach):
                _tell_object(rows[patch], scene, mark.cell, mark.shows)
    return rows


def sketch_symbols(scene: Scene, n: int, rng: np.random.Generator, most: int = 3) -> tuple[Sketch, list[int]]:
    """A scene as some of its patches, without drawing it: those that show something, and empty ones up to ``n``.

    Args:
        scene: the board; its world's boards divide the patches evenly.
        n: tokens.
        rng: draws the patches.
        most: an object has one to so many tokens, unless shape and color lie apart.

    Returns:
        A row for each token, and its patch, in the order of the patches.
    """
    side = PATCHES_PER_SIDE // scene.board
    chosen: dict[int, tuple[int, tuple[str, ...], str]] = {}  # patch -> cell, fields, character
    for cell in scene.objects:
        patches = _patches_of(cell, scene.board)
        if scene.world.apart:
            for patch, field in zip(rng.permutation(patches)[:2], ("color", "shape"), strict=True):
                chosen[int(patch)] = (cell, (field,), "")
        else:
            for patch in rng.permutation(patches)[: rng.integers(1, most + 1)]:
                chosen[int(patch)] = (cell, ("shape", "color"), "")
    for cell, text in scene.texts.items():
        left = _patches_of(cell, scene.board)[side * int(rng.integers(side))]
        for place in range(len(text)):
            chosen[left + place] = (cell, (str(place),), text[place])
    free = np.setdiff1d(np.arange(N_PATCHES), list(chosen))
    patches = sorted([*chosen, *rng.permutation(free)[: n - len(chosen)].tolist()])[:n]
    rows = _empty(scene)
    for patch, (cell, shows, character) in chosen.items():
        if character:
            rows[patch][_TEXT + int(shows[0])] = CHARACTERS.index(character)
        else:
            _tell_object(rows[patch], scene, cell, shows)
    return [rows[patch] for patch in patches], patches


def _empty(scene: Scene) -> Sketch:
    cells = (divmod(patch_cell(patch, scene.board), scene.board) for patch in range(N_PATCHES))
    return [[*NOTHING, row, col] for row, col in cells]


def _tell_object(row: list[int], scene: Scene, cell: int, shows: Sequence[str]) -> None:
    shape, color = scene.objects[cell]
    if "shape" in shows:
        row[_SHAPE] = SHAPES.index(shape)
    if "color" in shows:
        row[_COLOR] = _COLORS.index(color)


def _patches_of(cell: int, board: int) -> list[int]:
    side, (row, col) = PATCHES_PER_SIDE // board, divmod(cell, board)
    return [(row * side + i) * PATCHES_PER_SIDE + col * side + j for i in range(side) for j in range(side)]


def _reached(world: World, x: float, y: float, reach: tuple[float, float]) -> list[int]:
    """Patches that a mark lies over far enough, and always the one that its middle lies in."""
    size = world.image_size / PATCHES_PER_SIDE
    lines = []
    for middle, half in ((y, reach[1]), (x, reach[0])):
        own = int(middle // size)
        over = [
            k
            for k in range(PATCHES_PER_SIDE)
            if min(middle + half, (k + 1) * size) - max(middle - half, k * size) > _OVERLAP * size
        ]
        lines.append(sorted({*over, own}))
    return [row * PATCHES_PER_SIDE + col for row in lines[0] for col in lines[1]]

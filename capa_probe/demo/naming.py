"""How questions name what is on a board."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from capa_probe.demo.phrasings import LONG_PLACES, PARTS, PLACES
from capa_probe.demo.scenes import Scene

T = TypeVar("T")

#: Share of the references by color and shape of which neither alone would do, where the scene offers such.
_HARD = 0.8


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, each as likely as the next."""
    return options[int(rng.integers(len(options)))]


def place_name(scene: Scene, cell: int, rng: np.random.Generator, way: int | None = None) -> str:
    """The name of a cell; ``way`` chooses one of several."""
    if not scene.world.long_places:
        return PLACES[cell]
    row, col = divmod(cell, scene.cols)
    words = pick(rng, LONG_PLACES) if way is None else LONG_PLACES[way]
    return words.format(row=row + 1, col=col + 1)


def board_parts(rows: int, cols: int) -> Mapping[str, frozenset[int]]:
    """Words for part of a board -> its cells; an odd side has no halves."""
    row, col = np.divmod(np.arange(rows * cols), cols)
    halves = (2 * row < rows, 2 * row >= rows, 2 * col < cols, 2 * col >= cols)
    outer = (row == 0, row == rows - 1, col == 0, col == cols - 1)
    whole = (rows % 2 == 0, rows % 2 == 0, cols % 2 == 0, cols % 2 == 0, True, True, True, True)
    return {
        words: frozenset(np.flatnonzero(inside).tolist())
        for words, inside, there in zip(PARTS, (*halves, *outer), whole, strict=True)
        if there
    }


def single_shapes(scene: Scene) -> list[int]:
    """Cells whose shape is on the board once, so that naming it is clear."""
    shapes = Counter(shape for shape, _ in scene.objects.values())
    return [cell for cell, (shape, _) in sorted(scene.objects.items()) if shapes[shape] == 1]


def named_objects(scene: Scene, rng: np.random.Generator) -> dict[int, str]:
    """Cells whose color and shape together are on the board once -> these words.

    Mostly only those of which another object has the shape and another the color, if there are such.
    """
    things = Counter(scene.objects.values())
    shapes = Counter(shape for shape, _ in scene.objects.values())
    colors = Counter(color for _, color in scene.objects.values())
    named = {cell: thing for cell, thing in sorted(scene.objects.items()) if things[thing] == 1}
    hard = {cell: (s, c) for cell, (s, c) in named.items() if shapes[s] > 1 and colors[c] > 1}
    chosen = hard if rng.random() < _HARD and hard else named
    return {cell: f"{color} {shape}" for cell, (shape, color) in chosen.items()}


def comparable_objects(scene: Scene) -> list[int]:
    """Cells of the objects that can be named without their color."""
    return sorted(scene.objects) if scene.world.twin_by_place else single_shapes(scene)


def comparable_name(scene: Scene, cell: int, rng: np.random.Generator) -> str:
    """The name of such an object."""
    return f"shape in {place_name(scene, cell, rng)}" if scene.world.twin_by_place else scene.objects[cell][0]

"""ShapesQA scenes: colored shapes and short printed texts in the cells of a board."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from capa_probe.demo.worlds import CHARACTERS, COLORS, RICH, SHAPES, TEXT_LENGTH, World

#: Left, top, right and bottom in pixels; right and bottom are the first ones outside.
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """What is on the board.

    Attributes:
        objects: cell -> (shape, color), in cell order; cell ``c`` lies in row ``c // board`` and column ``c % board``.
        texts: cell -> what is printed there, in cell order; these cells hold no shape.
        seed: decides everything that questions do not ask for: background, sizes, places in the cell, noise.
        board: cells per side.
        world: what the scene is one of.
    """

    objects: Mapping[int, tuple[str, str]]
    texts: Mapping[int, str]
    seed: int
    board: int = 3
    world: World = RICH

    def neighbor(self, cell: int, step: tuple[int, int]) -> int | None:
        """The cell a step in (row, column) away, or None beyond the edge."""
        row, col = cell // self.board + step[0], cell % self.board + step[1]
        return row * self.board + col if 0 <= row < self.board and 0 <= col < self.board else None

    def cell_box(self, cell: int) -> Box:
        """Where a cell lies in the image, in whole pixels."""
        side = self.world.image_size / self.board
        row, col = divmod(cell, self.board)
        return round(col * side), round(row * side), round((col + 1) * side), round((row + 1) * side)


def random_scene(rng: np.random.Generator, world: World = RICH) -> Scene:
    """A scene of a world: boards, numbers of objects, shapes, colors and cells each drawn evenly."""
    boards = tuple(world.objects)
    board = boards[int(rng.integers(len(boards)))] if len(boards) > 1 else boards[0]
    fewest, most = world.objects[board]
    n_objects = int(rng.integers(fewest, most + 1))
    n_texts = int(rng.integers(world.texts[0], world.texts[1] + 1)) if world.texts[1] > 1 else world.texts[0]
    cells = [int(cell) for cell in rng.permutation(board**2)]
    colors = tuple(COLORS)
    objects = {
        cell: (SHAPES[rng.integers(len(SHAPES))], colors[rng.integers(len(colors))])
        for cell in sorted(cells[:n_objects])
    }
    texts = {
        cell: "".join(CHARACTERS[i] for i in rng.integers(len(CHARACTERS), size=TEXT_LENGTH))
        for cell in sorted(cells[n_objects : n_objects + n_texts])
    }
    return Scene(objects, texts, int(rng.integers(2**31)), board, world)

"""Questions that are asked in training only, because harder ones are learned from them.

No task asks for a shape by its color, or for all things of a kind; counting, comparing and finding the other shape of
a color take both.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from capa_probe.demo.naming import comparable_name
from capa_probe.demo.phrasings import plural
from capa_probe.demo.questions import Question
from capa_probe.demo.scenes import Scene


def stepping_stone(scene: Scene, rng: np.random.Generator, twins: float = 0.0) -> Question:
    """Which is the only shape of a color, or a list of all things of one color or one shape.

    Args:
        scene: the board.
        rng: draws the question.
        twins: share of lists of a color that is not named, but is that of an object, named as in comparisons (see
            :func:`comparable_name`). Any object may be taken, also one whose shape is on the board twice: named by
            its shape, it is then not clear which is meant.
    """
    if twins and rng.random() < twins:
        here = int(rng.permutation(sorted(scene.objects))[0])
        cells = tuple(
            cell for cell in sorted(scene.objects) if scene.objects[cell][1] == scene.objects[here][1]
        )
        name = f"shapes in the color of the {comparable_name(scene, here, rng)}"
        return Question("twins", f"describe the {name}.", _told(scene, cells, 0), cells)
    colors = Counter(color for _, color in scene.objects.values())
    single = sorted(color for color, n in colors.items() if n == 1)
    if single and rng.random() < 0.4:
        color = single[rng.integers(len(single))]
        cell = next(cell for cell, thing in scene.objects.items() if thing[1] == color)
        return Question("shape_of", f"which shape is {color}?", scene.objects[cell][0], (cell,))
    field = int(rng.integers(2))  # 0: things of a shape, told by their colors; 1: the other way round
    kinds = sorted({thing[field] for thing in scene.objects.values()})
    kind = kinds[rng.integers(len(kinds))]
    cells = tuple(cell for cell, thing in sorted(scene.objects.items()) if thing[field] == kind)
    name = f"{kind} shapes" if field else plural(kind)
    return Question("list", f"describe the {name}.", _told(scene, cells, 1 - field), cells)


def _told(scene: Scene, cells: tuple[int, ...], field: int) -> str:
    return " , ".join(
        f"{cell // scene.board + 1} {cell % scene.board + 1} {scene.objects[cell][field]}" for cell in cells
    )

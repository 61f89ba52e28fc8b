"""Questions that take several looks, or join two conditions.

Each function draws one question about a scene: the words for the slots of its phrasing, the answer, and the cells that
the answer hangs on; None where the scene offers none.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TypeAlias, TypeVar

import numpy as np

from capa_probe.demo.naming import board_parts, comparable_name, comparable_objects, named_objects, pick
from capa_probe.demo.phrasings import STEPS, plural
from capa_probe.demo.scenes import Scene
from capa_probe.demo.worlds import COLORS, SHAPES

Answered: TypeAlias = tuple[dict[str, str], str, tuple[int, ...]]
N = TypeVar("N")

#: Counts are asked for that are at most so high, each as often as the next where scenes allow.
HIGHEST_COUNT = 4
#: Share of the counts in part of the board where counting the whole board would give another answer.
_PART_MATTERS = 0.8


def relation_color(scene: Scene, rng: np.random.Generator) -> Answered | None:
    """The color of the neighbor of an object."""
    return _beside(scene, rng, 1)


def relation_shape(scene: Scene, rng: np.random.Generator) -> Answered | None:
    """The shape of the neighbor of an object."""
    return _beside(scene, rng, 0)


def read_next(scene: Scene, rng: np.random.Generator) -> Answered | None:
    """The text printed next to an object."""
    options = _steps(scene, named_objects(scene, rng), scene.texts)
    if not options:
        return None
    cell, name, step, neighbor = pick(rng, options)
    return {"r": pick(rng, STEPS[step]), "x": name}, scene.texts[neighbor], (cell, neighbor)


def comparison(scene: Scene, rng: np.random.Generator) -> Answered | None:
    """Whether another object has the color of a named one; yes and no equally often where scenes allow."""
    options: dict[bool, list[tuple[int, tuple[int, ...]]]] = {True: [], False: []}
    for cell in comparable_objects(scene):
        others = _others_in_its_color(scene, cell)
        options[bool(others)].append((cell, others))
    yes = bool(rng.random() < 0.5)
    if not options[yes]:
        yes = not yes
    if not options[yes]:
        return None
    cell, others = pick(rng, options[yes])
    return {"x": comparable_name(scene, cell, rng)}, "yes" if yes else "no", (cell, *others)


def same_color(scene: Scene, rng: np.random.Generator) -> Answered | None:
    """The shape of the one other object in the color of a named one."""
    options = _partners(scene)
    if not options:
        return None
    cell, other = pick(rng, options)
    return {"x": comparable_name(scene, cell, rng)}, scene.objects[other][0], (cell, other)


def chain(scene: Scene, rng: np.random.Generator) -> Answered | None:
    """The shape of the neighbor of the one other object in the color of a named one: three looks."""
    options = []
    for cell, other in _partners(scene):
        for step in STEPS:
            neighbor = scene.neighbor(other, step)
            if neighbor is not None and neighbor in scene.objects and neighbor != cell:
                options.append((cell, other, step, neighbor))
    if not options:
        return None
    cell, other, step, neighbor = pick(rng, options)
    slots = {"r": pick(rng, STEPS[step]), "x": comparable_name(scene, cell, rng)}
    return slots, scene.objects[neighbor][0], (cell, other, neighbor)


def count_kind(scene: Scene, rng: np.random.Generator) -> Answered:
    """How many objects have a shape, or a color."""
    name, cells = _pick_by_count(rng, _kinds(scene))
    return {"k": name}, str(len(cells)), cells


def count_where(scene: Scene, rng: np.random.Generator) -> Answered:
    """How many objects in part of the board have a shape, or a color."""
    parts = board_parts(scene.rows, scene.cols)
    everywhere: list[tuple[tuple[str, str], tuple[int, ...]]] = []
    elsewhere_too = []
    for name, cells in _kinds(scene):
        for words, part in parts.items():
            inside = tuple(cell for cell in cells if cell in part)
            everywhere.append(((name, words), inside))
            if len(inside) < len(cells):
                elsewhere_too.append(everywhere[-1])
    options = elsewhere_too if rng.random() < _PART_MATTERS and elsewhere_too else everywhere
    (name, words), cells = _pick_by_count(rng, options)
    return {"k": name, "w": words}, str(len(cells)), cells


def _pick_by_count(
    rng: np.random.Generator, options: Sequence[tuple[N, tuple[int, ...]]]
) -> tuple[N, tuple[int, ...]]:
    """First a count that some option has, then one of these options."""
    counts = sorted({len(cells) for _, cells in options if len(cells) <= HIGHEST_COUNT})
    wanted = pick(rng, counts)
    return pick(rng, [option for option in options if len(option[1]) == wanted])


def _kinds(scene: Scene) -> list[tuple[str, tuple[int, ...]]]:
    """Every shape and color, in the plural, and the cells that hold it."""
    things = sorted(scene.objects.items())
    shapes = [(plural(shape), tuple(cell for cell, (s, _) in things if s == shape)) for shape in SHAPES]
    colors = [(f"{color} shapes", tuple(cell for cell, (_, c) in things if c == color)) for color in COLORS]
    return shapes + colors


def _others_in_its_color(scene: Scene, cell: int) -> tuple[int, ...]:
    color = scene.objects[cell][1]
    return tuple(other for other, (_, c) in sorted(scene.objects.items()) if c == color and other != cell)


def _partners(scene: Scene) -> list[tuple[int, int]]:
    """Cells of objects that share their color with exactly one other object, and that object's cell."""
    found = []
    for cell in comparable_objects(scene):
        others = _others_in_its_color(scene, cell)
        if len(others) == 1:
            found.append((cell, others[0]))
    return found


def _steps(
    scene: Scene, named: dict[int, str], wanted: Container[int]
) -> list[tuple[int, str, tuple[int, int], int]]:
    """(cell, its name, step, neighbor) for each neighbor of a named object that is wanted."""
    found = []
    for cell, name in named.items():
        for step in STEPS:
            neighbor = scene.neighbor(cell, step)
            if neighbor is not None and neighbor in wanted:
                found.append((cell, name, step, neighbor))
    return found


def _beside(scene: Scene, rng: np.random.Generator, field: int) -> Answered | None:
    options = _steps(scene, named_objects(scene, rng), scene.objects)
    if not options:
        return None
    cell, name, step, neighbor = pick(rng, options)
    return {"r": pick(rng, STEPS[step]), "x": name}, scene.objects[neighbor][field], (cell, neighbor)

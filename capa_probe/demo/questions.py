"""ShapesQA questions: seven tasks with exact answers, each in several phrasings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from capa_probe.demo.scenes import BOARD, COLORS, PLACES, SHAPES, Scene

#: The six tasks that the demo model is held to.
MAIN_TASKS = ("existence", "color", "shape_at", "color_at", "count", "read")
#: ``relation`` is reported apart: it takes two steps, finding a shape and then its neighbor.
TASKS = (*MAIN_TASKS, "relation")

#: {x} is what is asked about, {r} a direction.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "existence": (
        "is there a {x}?",
        "do you see a {x}?",
        "does the picture show a {x}?",
        "can you find a {x}?",
    ),
    "color": (
        "what color is the {x}?",
        "which color has the {x}?",
        "name the color of the {x}.",
        "tell me the color of the {x}.",
    ),
    "shape_at": (
        "what shape is at the {x}?",
        "which shape is at the {x}?",
        "name the shape at the {x}.",
        "what do you see at the {x}?",
    ),
    "color_at": (
        "what color is at the {x}?",
        "which color is at the {x}?",
        "name the color at the {x}.",
        "what color has the shape at the {x}?",
    ),
    "count": (
        "how many shapes are there?",
        "how many shapes do you see?",
        "count the shapes.",
        "what is the number of shapes?",
    ),
    "read": ("what does the text say?", "read the text.", "what is written?", "which text is printed?"),
    "relation": (
        "what color is {r} the {x}?",
        "which color is {r} the {x}?",
        "name the color {r} the {x}.",
        "what color has the shape {r} the {x}?",
    ),
}
#: Direction -> step in (row, column) from the named shape to the one asked about.
DIRECTIONS = {"left-of": (0, -1), "right-of": (0, 1), "above": (-1, 0), "below": (1, 0)}

#: Share of the "no" questions whose color and shape are both on the board, only not together.
_RECOMBINED = 0.7

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A question about a scene and its one answer."""

    task: str
    text: str
    answer: str


def ask(scene: Scene, task: str, rng: np.random.Generator, easy: float = 0.0) -> Question | None:
    """A random question of a task, or None where the scene offers none.

    Args:
        scene: the board.
        task: one of ``TASKS``.
        rng: draws phrasing and object.
        easy: share of the existence questions that name a shape only ("is there a circle?"): a stepping stone
            for training, not part of the shipped questions.
    """
    answered = _ANSWERERS[task](scene, rng) if task != "existence" else _existence(scene, rng, easy)
    if answered is None:
        return None
    slots, answer = answered
    text = _pick(rng, PHRASINGS[task]).format(**slots)
    return Question(task, text.replace(" a orange", " an orange"), answer)


def describe(scene: Scene) -> Question:
    """The whole board as one long answer, a stepping stone for training."""
    objects = (f"{PLACES[cell]} {color} {shape}" for cell, (shape, color) in sorted(scene.objects.items()))
    return Question("describe", "describe the picture.", " , ".join(objects))


_Answered = tuple[dict[str, str], str]


def _existence(scene: Scene, rng: np.random.Generator, easy: float) -> _Answered:
    present = sorted(set(scene.objects.values()))
    shapes = sorted({shape for shape, _ in present})
    colors = sorted({color for _, color in present})
    yes = bool(rng.random() < 0.5)
    if rng.random() < easy:
        absent = [shape for shape in SHAPES if shape not in shapes]
        return {"x": _pick(rng, shapes if yes else absent)}, "yes" if yes else "no"
    if yes:
        shape, color = _pick(rng, present)
    else:
        recombined = [(s, c) for s in shapes for c in colors if (s, c) not in present]
        near = [(s, c) for s in SHAPES for c in colors if (s, c) not in present]
        shape, color = _pick(rng, recombined if recombined and rng.random() < _RECOMBINED else near)
    return {"x": f"{color} {shape}"}, "yes" if yes else "no"


def _color(scene: Scene, rng: np.random.Generator) -> _Answered | None:
    single = _cells_of_single_shapes(scene)
    if not single:
        return None
    shape, color = scene.objects[_pick(rng, single)]
    return {"x": shape}, color


def _shape_at(scene: Scene, rng: np.random.Generator) -> _Answered:
    cell = _pick(rng, sorted(scene.objects))
    return {"x": PLACES[cell]}, scene.objects[cell][0]


def _color_at(scene: Scene, rng: np.random.Generator) -> _Answered:
    cell = _pick(rng, sorted(scene.objects))
    return {"x": PLACES[cell]}, scene.objects[cell][1]


def _count(scene: Scene, rng: np.random.Generator) -> _Answered:
    return {}, str(len(scene.objects))


def _read(scene: Scene, rng: np.random.Generator) -> _Answered:
    return {}, scene.text


def _relation(scene: Scene, rng: np.random.Generator) -> _Answered | None:
    options = []
    for cell in _cells_of_single_shapes(scene):
        for direction, (down, right) in DIRECTIONS.items():
            row, col = cell // BOARD + down, cell % BOARD + right
            neighbor = row * BOARD + col
            if 0 <= row < BOARD and 0 <= col < BOARD and neighbor in scene.objects:
                options.append((direction, scene.objects[cell][0], scene.objects[neighbor][1]))
    if not options:
        return None
    direction, shape, color = _pick(rng, options)
    return {"r": direction, "x": shape}, color


_ANSWERERS = {
    "color": _color,
    "shape_at": _shape_at,
    "color_at": _color_at,
    "count": _count,
    "read": _read,
    "relation": _relation,
}


def _cells_of_single_shapes(scene: Scene) -> list[int]:
    """Cells whose shape is on the board once, so that naming it is clear."""
    shapes = [shape for shape, _ in scene.objects.values()]
    return [cell for cell, (shape, _) in sorted(scene.objects.items()) if shapes.count(shape) == 1]


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def words() -> list[str]:
    """Every word that a question, or an answer other than printed text, may hold; sorted."""
    text = " ".join(
        phrase.replace("{x}", " ").replace("{r}", " ") for group in PHRASINGS.values() for phrase in group
    )
    asked = set(f"{text} describe the picture".replace("?", " ").replace(".", " ").split())
    numbers = {str(n) for n in range(10)}
    return sorted(
        asked | set(SHAPES) | set(COLORS) | set(PLACES) | set(DIRECTIONS) | numbers | {"an", "yes", "no"}
    )

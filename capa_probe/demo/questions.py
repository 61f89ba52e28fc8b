"""ShapesQA questions: tasks with exact answers, each in several phrasings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from capa_probe.demo.naming import pick, place_name, single_shapes
from capa_probe.demo.phrasings import DESCRIBE, DIRECTIONS, LONG_PLACES, PARTS, PLACES, STEPS, plural
from capa_probe.demo.scenes import Scene
from capa_probe.demo.two_hop import (
    Answered,
    chain,
    comparison,
    count_kind,
    count_where,
    read_next,
    relation_color,
    relation_shape,
    same_color,
)
from capa_probe.demo.worlds import COLORS, RICH, SHAPES, World

#: Share of the "no" questions whose color and shape are both on the board, only not together.
_RECOMBINED = 0.7


@dataclass(frozen=True)
class Question:
    """A question about a scene and its one answer.

    Attributes:
        task: its task.
        text: the words, all lower case, closed by a mark, and then by the world's suffix.
        answer: the one answer.
        cells: the cells that the answer hangs on; none where it is that there is no such thing.
    """

    task: str
    text: str
    answer: str
    cells: tuple[int, ...] = ()


def ask(scene: Scene, task: str, rng: np.random.Generator, easy: float = 0.0) -> Question | None:
    """A random question of a task, or None where the scene offers none.

    Args:
        scene: the board.
        task: one of its world's.
        rng: draws phrasing and object.
        easy: share of the existence questions that name a shape only ("is there a circle?"): a stepping stone
            for training, not part of the shipped questions.
    """
    answered = _ANSWERERS[task](scene, rng) if task != "existence" else _existence(scene, rng, easy)
    if answered is None:
        return None
    slots, answer, cells = answered
    text = pick(rng, scene.world.phrasings[task]).format(**slots).replace(" a orange", " an orange")
    return Question(task, f"{text} {scene.world.suffix}".rstrip(), answer, cells)


def describe(scene: Scene, texts: bool = False) -> Question:
    """The whole board as one long answer, a stepping stone for training.

    "2 3 red circle" is the shortest way to say what lies in row 2, column 3.

    Args:
        scene: the board.
        texts: whether the printed texts are told as well.
    """
    things = {cell: f"{color} {shape}" for cell, (shape, color) in scene.objects.items()}
    if texts:
        things |= scene.texts
    places = [
        f"{cell // scene.board + 1} {cell % scene.board + 1}" if scene.world.long_places else PLACES[cell]
        for cell in sorted(things)
    ]
    told = (f"{place} {things[cell]}" for place, cell in zip(places, sorted(things), strict=True))
    return Question("describe", DESCRIBE, " , ".join(told), tuple(things))


def _existence(scene: Scene, rng: np.random.Generator, easy: float) -> Answered:
    present = sorted(set(scene.objects.values()))
    shapes = sorted({shape for shape, _ in present})
    colors = sorted({color for _, color in present})
    yes = bool(rng.random() < 0.5)
    absent_shapes = [shape for shape in SHAPES if shape not in shapes]
    # With every shape on the board, an easy question can only be one with the answer yes.
    if rng.random() < easy:
        shape = pick(rng, absent_shapes if absent_shapes and not yes else shapes)
        cells = tuple(cell for cell, (s, _) in scene.objects.items() if s == shape)
        return {"x": shape}, "yes" if cells else "no", cells
    if yes:
        shape, color = pick(rng, present)
    else:
        recombined = [(s, c) for s in shapes for c in colors if (s, c) not in present]
        near = [(s, c) for s in SHAPES for c in colors if (s, c) not in present]
        shape, color = pick(rng, recombined if recombined and rng.random() < _RECOMBINED else near)
    cells = tuple(cell for cell, thing in scene.objects.items() if thing == (shape, color))
    return {"x": f"{color} {shape}"}, "yes" if yes else "no", cells


def _color(scene: Scene, rng: np.random.Generator) -> Answered | None:
    single = single_shapes(scene)
    if not single:
        return None
    cell = pick(rng, single)
    shape, color = scene.objects[cell]
    return {"x": shape}, color, (cell,)


def _shape_at(scene: Scene, rng: np.random.Generator) -> Answered:
    cell = pick(rng, sorted(scene.objects))
    return _at(scene, cell, rng), scene.objects[cell][0], (cell,)


def _color_at(scene: Scene, rng: np.random.Generator) -> Answered:
    cell = pick(rng, sorted(scene.objects))
    return _at(scene, cell, rng), scene.objects[cell][1], (cell,)


def _count(scene: Scene, rng: np.random.Generator) -> Answered:
    return {}, str(len(scene.objects)), tuple(scene.objects)


def _read(scene: Scene, rng: np.random.Generator) -> Answered:
    ((cell, text),) = scene.texts.items()
    return {}, text, (cell,)


def _read_at(scene: Scene, rng: np.random.Generator) -> Answered:
    cell = pick(rng, sorted(scene.texts))
    return _at(scene, cell, rng), scene.texts[cell], (cell,)


def _at(scene: Scene, cell: int, rng: np.random.Generator) -> dict[str, str]:
    return {"p" if scene.world.long_places else "x": place_name(scene, cell, rng)}


def _relation(scene: Scene, rng: np.random.Generator) -> Answered | None:
    if scene.world.by_color_and_shape:
        return relation_color(scene, rng)
    options = []
    for cell in single_shapes(scene):
        for direction, step in DIRECTIONS.items():
            neighbor = scene.neighbor(cell, step)
            if neighbor is not None and neighbor in scene.objects:
                options.append((direction, cell, neighbor))
    if not options:
        return None
    direction, cell, neighbor = pick(rng, options)
    return {"r": direction, "x": scene.objects[cell][0]}, scene.objects[neighbor][1], (cell, neighbor)


_ANSWERERS: Mapping[str, Callable[[Scene, np.random.Generator], Answered | None]] = {
    "color": _color,
    "shape_at": _shape_at,
    "color_at": _color_at,
    "count": _count,
    "count_kind": count_kind,
    "read": _read,
    "read_at": _read_at,
    "relation": _relation,
    "relation_shape": relation_shape,
    "comparison": comparison,
    "same_color": same_color,
    "count_where": count_where,
    "read_next": read_next,
    "chain": chain,
}


def words(world: World = RICH) -> list[str]:
    """Every word that a question, or an answer other than printed text, may hold; sorted."""
    phrases = [DESCRIBE, world.suffix, *(phrase for group in world.phrasings.values() for phrase in group)]
    known = {*SHAPES, *COLORS, "an", "yes", "no", *(str(n) for n in range(10))}
    if world.long_places:
        phrases += [*LONG_PLACES, *PARTS, *(words for ways in STEPS.values() for words in ways)]
        known |= {plural(shape) for shape in SHAPES} | {"shapes"}
    else:
        known |= {*PLACES, *DIRECTIONS}
    text = " ".join(phrases)
    for slot in ("{x}", "{r}", "{p}", "{k}", "{w}", "{row}", "{col}", "?", ".", ","):
        text = text.replace(slot, " ")
    return sorted(known | set(text.split()))

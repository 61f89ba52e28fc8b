"""Answers ShapesQA questions from their words by going over every cell, with none of the generator's code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from capa_probe.demo.scenes import Scene

COLORS = "red|green|blue|yellow|purple|orange|pink|brown|black|cyan"
SHAPES = "circle|square|triangle|diamond|star|cross|ring|hexagon"
ONE_WORD_PLACES = {
    "top-left": (0, 0),
    "top": (0, 1),
    "top-right": (0, 2),
    "left": (1, 0),
    "center": (1, 1),
    "right": (1, 2),
    "bottom-left": (2, 0),
    "bottom": (2, 1),
    "bottom-right": (2, 2),
}
BESIDE = {
    r"left[- ]of": (0, -1),
    r"right[- ]of": (0, 1),
    r"above|over": (-1, 0),
    r"below|under": (1, 0),
}


@dataclass(frozen=True)
class Thing:
    row: int
    col: int
    shape: str | None = None
    color: str | None = None
    text: str | None = None


def sides(scene: Scene) -> tuple[int, int]:
    """Rows and columns of the board."""
    return scene.board if isinstance(scene.board, tuple) else (scene.board, scene.board)


def things(scene: Scene) -> list[Thing]:
    """All that is on the board."""
    found = []
    rows, cols = sides(scene)
    for row in range(rows):
        for col in range(cols):
            cell = cols * row + col
            if cell in scene.objects:
                shape, color = scene.objects[cell]
                found.append(Thing(row, col, shape, color))
            if cell in scene.texts:
                found.append(Thing(row, col, text=scene.texts[cell]))
    return found


def solve(scene: Scene, text: str) -> tuple[str, set[tuple[int, int]]]:
    """The answer, and the (row, column) of the cells that it hangs on, worked out from the words of the question."""
    text = text.removesuffix(scene.world.suffix).strip().rstrip("?.")
    everything = things(scene)
    if re.match(r"(how many|count|what is the number)", text):
        chosen = list(_counted(scene, everything, text))
        return str(len(chosen)), _cells(chosen)
    if "other" in text:
        return _about_color_twins(everything, text)
    if match := re.search(rf"\ban? (?:({COLORS}) )?({SHAPES})$", text):
        color, shape = match.groups()
        chosen = [t for t in everything if t.shape == shape and color in (None, t.color)]
        return "yes" if chosen else "no", _cells(chosen)
    looked_at = []
    if step := _step(text):
        anchor = _the_only(everything, text)
        target = _at(everything, anchor.row + step[0], anchor.col + step[1])
        looked_at = [anchor, target]
    elif place := _place(text):
        target = _at(everything, *place)
    elif re.search(rf"\b({SHAPES})$", text):
        target = _the_only(everything, text)
    else:
        (target,) = [t for t in everything if t.text]
    return _field(target, text), _cells([*looked_at, target])


def _field(thing: Thing, text: str) -> str:
    """What of a thing is asked for."""
    if thing.text:
        assert re.search(r"read|text|written", text)
        return thing.text
    assert thing.color is not None
    assert thing.shape is not None
    return thing.color if re.search(r"\bcolor\b", text) else thing.shape


def _counted(scene: Scene, everything: list[Thing], text: str) -> Iterator[Thing]:
    shape = re.search(rf"\b({SHAPES})e?s\b", text)
    color = re.search(rf"\b({COLORS}) shapes\b", text)
    for thing in everything:
        if thing.shape is None or (shape and thing.shape != shape[1]) or (color and thing.color != color[1]):
            continue
        rows, cols = sides(scene)
        inside = {
            "top half": thing.row < rows / 2,
            "bottom half": thing.row >= rows / 2,
            "left half": thing.col < cols / 2,
            "right half": thing.col >= cols / 2,
            "top row": thing.row == 0,
            "bottom row": thing.row == rows - 1,
            "left column": thing.col == 0,
            "right column": thing.col == cols - 1,
        }
        if all(holds for words, holds in inside.items() if words in text):
            yield thing


def _about_color_twins(everything: list[Thing], text: str) -> tuple[str, set[tuple[int, int]]]:
    place = _place(text)
    anchor = _at(everything, *place) if place else _the_only(everything, text)
    twins = [t for t in everything if t.color == anchor.color and t != anchor]
    if re.match(r"(is|does|do) ", text):
        return "yes" if twins else "no", _cells([anchor, *twins])
    (twin,) = twins
    if step := _step(text):
        target = _at(everything, twin.row + step[0], twin.col + step[1])
        assert target.shape is not None
        return target.shape, _cells([anchor, twin, target])
    assert twin.shape is not None
    return twin.shape, _cells([anchor, twin])


def _the_only(everything: list[Thing], text: str) -> Thing:
    """The one thing that the last words name."""
    match = re.search(rf"the (?:({COLORS}) )?({SHAPES})(?: say)?$", text)
    assert match
    color, shape = match.groups()
    (found,) = [t for t in everything if t.shape == shape and color in (None, t.color)]
    return found


def _step(text: str) -> tuple[int, int] | None:
    steps = [step for words, step in BESIDE.items() if re.search(rf"\b({words})\b", text)]
    assert len(steps) <= 1
    return steps[0] if steps else None


def _place(text: str) -> tuple[int, int] | None:
    row, col = re.search(r"row (\d)", text), re.search(r"column (\d)", text)
    if row and col:
        return int(row[1]) - 1, int(col[1]) - 1
    return ONE_WORD_PLACES.get(text.rsplit(maxsplit=1)[-1])


def _at(everything: list[Thing], row: int, col: int) -> Thing:
    (found,) = [t for t in everything if (t.row, t.col) == (row, col)]
    return found


def _cells(chosen: list[Thing]) -> set[tuple[int, int]]:
    return {(t.row, t.col) for t in chosen}

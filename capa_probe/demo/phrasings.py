"""The words of ShapesQA questions.

Slots: {x} an object, or a place where a task asks for one; {p} a place; {r} a direction; {k} a kind of objects, in the
plural; {w} part of the board.
"""

from __future__ import annotations

from collections.abc import Mapping

PHRASINGS: Mapping[str, tuple[str, ...]] = {
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
#: The same for boards whose cells are named by row and column.
RICH_PHRASINGS: Mapping[str, tuple[str, ...]] = {
    "existence": PHRASINGS["existence"],
    "color": PHRASINGS["color"],
    "shape_at": (
        "what shape is in {p}?",
        "which shape is in {p}?",
        "name the shape in {p}.",
        "what do you see in {p}?",
    ),
    "color_at": (
        "what color is in {p}?",
        "which color is in {p}?",
        "name the color in {p}.",
        "what color has the shape in {p}?",
    ),
    "count_kind": (
        "how many {k} are there?",
        "how many {k} do you see?",
        "count the {k}.",
        "what is the number of {k}?",
    ),
    "read_at": (
        "what does the text in {p} say?",
        "read the text in {p}.",
        "what is written in {p}?",
        "which text is printed in {p}?",
    ),
    "relation": (
        "what color is {r} the {x}?",
        "which color is {r} the {x}?",
        "name the color {r} the {x}.",
        "what color has the shape {r} the {x}?",
    ),
    "relation_shape": (
        "what shape is {r} the {x}?",
        "which shape is {r} the {x}?",
        "name the shape {r} the {x}.",
        "what do you see {r} the {x}?",
    ),
    "comparison": (
        "is there another shape with the color of the {x}?",
        "does any other shape have the color of the {x}?",
        "do you see another shape in the color of the {x}?",
        "is there any other shape in the color of the {x}?",
    ),
    "same_color": (
        "which other shape has the color of the {x}?",
        "what other shape is in the color of the {x}?",
        "name the other shape with the color of the {x}.",
        "find the other shape in the color of the {x}.",
    ),
    "count_where": (
        "how many {k} are {w}?",
        "how many {k} do you see {w}?",
        "count the {k} {w}.",
        "what is the number of {k} {w}?",
    ),
    "read_next": (
        "what does the text {r} the {x} say?",
        "read the text {r} the {x}.",
        "what is written {r} the {x}?",
        "which text is printed {r} the {x}?",
    ),
    "chain": (
        "what shape is {r} the other shape with the color of the {x}?",
        "which shape is {r} the other shape in the color of the {x}?",
        "name the shape {r} the other shape with the color of the {x}.",
        "what do you see {r} the other shape in the color of the {x}?",
    ),
}
DESCRIBE = "describe the picture."

#: Names of the cells of a 3 x 3 board, in order.
PLACES = (
    "top-left",
    "top",
    "top-right",
    "left",
    "center",
    "right",
    "bottom-left",
    "bottom",
    "bottom-right",
)
#: How a cell is named by its row and column, which count from 1.
LONG_PLACES = ("row {row}, column {col}", "column {col}, row {row}", "row {row} and column {col}")
#: Parts of a board: its halves, which an odd side has none of, and its outer rows and columns.
PARTS = (
    "in the top half",
    "in the bottom half",
    "in the left half",
    "in the right half",
    "in the top row",
    "in the bottom row",
    "in the left column",
    "in the right column",
)
#: Step in (row, column) from the named object to the one asked about -> the words for it.
STEPS: Mapping[tuple[int, int], tuple[str, ...]] = {
    (0, -1): ("left of", "to the left of"),
    (0, 1): ("right of", "to the right of"),
    (-1, 0): ("above", "over"),
    (1, 0): ("below", "under"),
}
#: The same in one word each.
DIRECTIONS = {"left-of": (0, -1), "right-of": (0, 1), "above": (-1, 0), "below": (1, 0)}


def plural(noun: str) -> str:
    """The plural of the name of a shape."""
    return f"{noun}es" if noun.endswith(("s", "x")) else f"{noun}s"

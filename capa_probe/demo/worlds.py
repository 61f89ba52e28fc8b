"""Worlds: what ShapesQA scenes may hold, how they are drawn, and what is asked about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from capa_probe.demo.phrasings import PHRASINGS, RICH_PHRASINGS
from capa_probe.errors import CapaProbeError

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "hexagon")
COLORS: Mapping[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (34, 139, 60),
    "blue": (35, 80, 210),
    "yellow": (235, 200, 20),
    "purple": (125, 45, 165),
    "orange": (245, 130, 25),
    "pink": (245, 120, 180),
    "brown": (120, 72, 35),
    "black": (25, 25, 25),
    "cyan": (30, 190, 205),
}
#: Characters of printed texts, without those that look alike (I 1, O 0, Q, 8 B).
CHARACTERS = "ABCDEFGHJKLMNPRSTUVWXYZ2345679"
TEXT_LENGTH = 2
#: Cells per side of a board, or its rows and columns.
Board: TypeAlias = int | tuple[int, int]
_FEWEST_CELLS, _MOST_CELLS, _MOST_OBJECTS = 3, 9, 24


def board_shape(board: Board) -> tuple[int, int]:
    """Rows and columns."""
    return board if isinstance(board, tuple) else (board, board)


@dataclass(frozen=True)
class World:
    """Options of scenes, drawing and questions.

    Attributes:
        name: of the world.
        objects: cells per side of a board, or its rows and columns (3 to 9) -> fewest and most objects on it; one of
            the boards is drawn for each scene.
        texts: fewest and most printed texts of two characters, each in a cell without a shape.
        image_size: pixels per side, whatever the board.
        cell_size: in its place, pixels per side of a cell, so that images are as large as their boards.
        label_size: height in pixels of the row and column that are printed small at the top of every cell ("23" for
            row 2, column 3); 0 prints none.
        radius: smallest and largest radius of a shape, in pixels.
        jitter: how far a shape may lie from the middle of its cell, in pixels; three pixels less than half the room
            that is left is a good value.
        text_jitter: the same for a text.
        apart: whether an object is drawn in two quarters of its cell that touch, its shape in dark ink in one and a bar
            in its color in the other, and a text in the upper or the lower half of its cell.
        font_size: of texts.
        light: how much brighter or darker than the middle the edges of an image may be, of 255.
        blotches: amplitude of large uneven spots of the background, of 255; 0 draws none.
        noise: standard deviation of the sensor noise, of 255.
        clutter: fewest and most small marks (dots and strokes in pale colors) that no question asks about.
        grid: whether the borders of the cells are drawn.
        tasks: tasks that are asked, in the order in which images go round them.
        phrasings: task -> the ways to ask.
        long_places: whether cells are named by row and column ("row 2, column 3") or, on a 3 x 3 board, by one word
            each ("top-left").
        by_color_and_shape: whether references of relations name both ("the red circle"), preferring objects of which
            neither the shape nor the color alone would do, or the shape only.
        twin_by_place: whether an object whose color is compared is named by its place, or by its shape.
        suffix: closes every prompt, such as "answer briefly.".
        questions_per_image: in data folders; fewer where there are fewer tasks, since none is asked twice of an image.
    """

    name: str
    objects: Mapping[Board, tuple[int, int]]
    tasks: tuple[str, ...]
    phrasings: Mapping[str, tuple[str, ...]] = field(repr=False)
    texts: tuple[int, int] = (1, 1)
    image_size: int = 96
    cell_size: int = 0
    label_size: int = 0
    radius: tuple[float, float] = (8.0, 13.0)
    jitter: float = 2.5
    text_jitter: float = 3.0
    apart: bool = False
    font_size: int = 16
    light: float = 10.0
    blotches: float = 0.0
    noise: float = 7.6
    clutter: tuple[int, int] = (0, 0)
    grid: bool = False
    long_places: bool = False
    by_color_and_shape: bool = False
    twin_by_place: bool = False
    suffix: str = ""
    questions_per_image: int = 3

    def __post_init__(self) -> None:
        for board, (fewest, most) in self.objects.items():
            rows, cols = board_shape(board)
            room = rows * cols - self.texts[1]
            fits = min(rows, cols) >= _FEWEST_CELLS and max(rows, cols) <= _MOST_CELLS
            if not fits or not 1 <= fewest <= most <= min(_MOST_OBJECTS, room):
                raise CapaProbeError(
                    f"objects={{{board}: ({fewest}, {most})}} was given for world {self.name!r}; boards have "
                    f"{_FEWEST_CELLS} to {_MOST_CELLS} cells per side and up to {_MOST_OBJECTS} objects, and "
                    f"{self.texts[1]} cells must be left for texts."
                )
        if not self.objects:
            raise CapaProbeError(
                f"world {self.name!r} has no board; give objects={{cells per side: (fewest, most)}}."
            )
        if not self.long_places and tuple(self.objects) != (3,):
            raise CapaProbeError(
                f"world {self.name!r} has boards {list(self.objects)}, but only the cells of a 3 x 3 board have names "
                "of one word; give long_places=True."
            )
        unknown = [task for task in self.tasks if task not in self.phrasings]
        if unknown:
            raise CapaProbeError(f"world {self.name!r} has no phrasing for {', '.join(unknown)}.")

    @property
    def plain_tasks(self) -> tuple[str, ...]:
        """Tasks that take one look at one or several objects."""
        return tuple(task for task in self.tasks if task not in TWO_HOP)

    @property
    def two_hop_tasks(self) -> tuple[str, ...]:
        """Tasks whose second look depends on what the first has found, or that join two conditions."""
        return tuple(task for task in self.tasks if task in TWO_HOP)

    @property
    def largest_board(self) -> int:
        """The most rows or columns that a board has."""
        return max(max(board_shape(board)) for board in self.objects)

    def image_shape(self, board: Board) -> tuple[int, int]:
        """Height and width in pixels of the image of a board."""
        if not self.cell_size:
            return self.image_size, self.image_size
        rows, cols = board_shape(board)
        return rows * self.cell_size, cols * self.cell_size


TWO_HOP = ("relation", "relation_shape", "comparison", "same_color", "count_where", "read_next", "chain")

#: The first world: few objects on a 3 x 3 board.
SMALL = World(
    name="small",
    objects={3: (2, 6)},
    tasks=("existence", "color", "shape_at", "color_at", "count", "read", "relation"),
    phrasings=PHRASINGS,
)
#: Many small objects, and questions that take several looks.
RICH = World(
    name="rich",
    objects={6: (8, 16)},
    tasks=(
        *("existence", "color", "shape_at", "color_at", "count_kind", "read_at"),
        *("relation", "relation_shape", "comparison", "same_color", "count_where", "read_next", "chain"),
    ),
    phrasings=RICH_PHRASINGS,
    texts=(2, 4),
    image_size=144,
    radius=(5.5, 7.5),
    jitter=3.5,
    text_jitter=1.5,
    font_size=13,
    light=14.0,
    blotches=10.0,
    clutter=(4, 12),
    grid=True,
    long_places=True,
    by_color_and_shape=True,
    suffix="answer briefly.",
    questions_per_image=6,
)
#: Boards of many sizes and shapes, in images as large as they are, for models whose visual tokens follow the image. A
#: cell says where it lies, since such models see an image in pieces. Sides are multiples of 64 pixels or of 96.
WIDE = replace(
    RICH,
    name="wide",
    objects={
        (4, 4): (6, 10),
        (3, 6): (6, 11),
        (6, 3): (6, 11),
        (3, 9): (8, 14),
        (9, 3): (8, 14),
        (6, 6): (9, 18),
        (6, 8): (10, 22),
        (8, 6): (10, 22),
    },
    cell_size=32,
    label_size=10,
    radius=(6.0, 8.0),
    jitter=2.5,
    text_jitter=1.5,
    font_size=14,
    noise=5.0,
    questions_per_image=13,
)
WORLDS = {world.name: world for world in (SMALL, RICH, WIDE)}

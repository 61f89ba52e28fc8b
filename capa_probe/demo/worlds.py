"""Worlds: what ShapesQA scenes may hold, how they are drawn, and what is asked about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class World:
    """Options of scenes, drawing and questions.

    Attributes:
        name: of the world.
        objects: cells per side of a board (3 to 6) -> fewest and most objects on it; one of the boards is drawn for
            each scene.
        texts: fewest and most printed texts of two characters, each in a cell without a shape.
        image_size: pixels per side.
        radius: smallest and largest radius of a shape, in pixels.
        jitter: how far a shape may lie from the middle of its cell, in pixels; three pixels less than half the room
            that is left is a good value.
        text_jitter: the same for a text.
        apart: whether an object is drawn in two quarters of its cell that touch, its shape in dark ink in one and a bar
            in its color in the other, and a text in the upper or the lower half of its cell.
        font_size: of texts.
        light: how much brighter or darker than the middle the edges of an image may be, of 255.
        blotches: amplitude of large uneven spots of the background, of 255; 0 draws none.
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
    objects: Mapping[int, tuple[int, int]]
    tasks: tuple[str, ...]
    phrasings: Mapping[str, tuple[str, ...]] = field(repr=False)
    texts: tuple[int, int] = (1, 1)
    image_size: int = 96
    radius: tuple[float, float] = (8.0, 13.0)
    jitter: float = 2.5
    text_jitter: float = 3.0
    apart: bool = False
    font_size: int = 16
    light: float = 10.0
    blotches: float = 0.0
    clutter: tuple[int, int] = (0, 0)
    grid: bool = False
    long_places: bool = False
    by_color_and_shape: bool = False
    twin_by_place: bool = False
    suffix: str = ""
    questions_per_image: int = 3

    def __post_init__(self) -> None:
        for board, (fewest, most) in self.objects.items():
            room = board**2 - self.texts[1]
            if not 3 <= board <= 6 or not 1 <= fewest <= most <= min(16, room):
                raise CapaProbeError(
                    f"objects={{{board}: ({fewest}, {most})}} was given for world {self.name!r}; boards have 3 to 6 "
                    f"cells per side and up to 16 objects, and {self.texts[1]} cells must be left for texts."
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
        """Cells per side of the largest board."""
        return max(self.objects)


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
WORLDS = {world.name: world for world in (SMALL, RICH)}

"""ShapesQA scenes: coloured shapes and a short printed text on a 3 x 3 board, drawn as 96 x 96 images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 96
#: Cells per side of the board; cell ``c`` lies in row ``c // BOARD`` and column ``c % BOARD``.
BOARD = 3
CELL = IMAGE_SIZE // BOARD

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
#: Names of the cells, in order.
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
#: Characters of the printed text, without those that look alike (I 1, O 0, Q, 8 B).
CHARACTERS = "ABCDEFGHJKLMNPRSTUVWXYZ2345679"
TEXT_LENGTH = 2
FEWEST_OBJECTS, MOST_OBJECTS = 2, 6

_NOISE = 7.6  # standard deviation of the sensor noise, of 255
_FONT_SIZE = 16


@dataclass(frozen=True)
class Scene:
    """What is on the board.

    Attributes:
        objects: cell -> (shape, color), in cell order.
        text: the printed characters.
        text_cell: the cell that they are printed in, which holds no shape.
        seed: decides everything that questions do not ask for: background, sizes, places in the cell, noise.
    """

    objects: Mapping[int, tuple[str, str]]
    text: str
    text_cell: int
    seed: int


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of 2-6 objects, every shape, color and cell equally likely."""
    n_objects = int(rng.integers(FEWEST_OBJECTS, MOST_OBJECTS + 1))
    cells = [int(cell) for cell in rng.permutation(BOARD * BOARD)]
    colors = tuple(COLORS)
    objects = {
        cell: (SHAPES[rng.integers(len(SHAPES))], colors[rng.integers(len(colors))])
        for cell in sorted(cells[:n_objects])
    }
    text = "".join(CHARACTERS[i] for i in rng.integers(len(CHARACTERS), size=TEXT_LENGTH))
    return Scene(objects, text, cells[n_objects], int(rng.integers(2**31)))


def render(scene: Scene) -> Image.Image:
    """The scene as a 96 x 96 RGB image; the same scene always gives the same pixels."""
    rng = np.random.default_rng(scene.seed)
    background = tuple(int(v) for v in rng.uniform(205, 250, 3))
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), background)
    draw = ImageDraw.Draw(image)
    for cell, (shape, color) in scene.objects.items():
        radius, turn = rng.uniform(8, 13), rng.uniform(-0.2, 0.2)
        x, y = _center(cell) + rng.uniform(-2.5, 2.5, 2)
        fill = tuple(int(v) for v in np.clip(COLORS[color] + rng.normal(0, 6, 3), 0, 255))
        if shape in ("circle", "ring"):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        if shape == "ring":
            hole = 0.55 * radius
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
        if shape not in ("circle", "ring"):
            draw.polygon([(x + dx, y + dy) for dx, dy in _outline(shape, radius, turn)], fill=fill)
    x, y = _center(scene.text_cell) + rng.uniform(-3, 3, 2)
    ink = tuple(int(v) for v in rng.integers(0, 70, 3))
    draw.text((x, y), scene.text, font=_font(), fill=ink, anchor="mm")
    return Image.fromarray(_as_photographed(np.asarray(image, dtype=np.float32), rng))


def blank_image() -> Image.Image:
    """A board with nothing on it, for what a model knows without looking."""
    return Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (228, 228, 228))


def _center(cell: int) -> NDArray[np.float64]:
    return np.array([cell % BOARD, cell // BOARD]) * CELL + CELL / 2


def _outline(shape: str, radius: float, turn: float) -> list[tuple[float, float]]:
    """Corners around (0, 0)."""
    if shape == "cross":
        arm = 0.36 * radius
        cos, sin = math.cos(turn), math.sin(turn)
        points = []
        for _ in range(4):
            # The corners of one arm; each further arm is the last one turned by 90 degrees.
            for a, b in ((arm, -arm), (radius, -arm), (radius, arm)):
                points.append((a * cos - b * sin, a * sin + b * cos))
            cos, sin = -sin, cos
        return points
    if shape == "star":
        corners, first, inner, width = 10, -math.pi / 2, 0.42, 1.0
    else:
        inner = 1.0
        corners, first, width = {
            "square": (4, math.pi / 4, 1.0),
            "triangle": (3, -math.pi / 2, 1.0),
            "diamond": (4, 0.0, 0.72),
            "hexagon": (6, 0.0, 1.0),
        }[shape]
    points = []
    for k in range(corners):
        angle = first + turn + 2 * math.pi * k / corners
        reach = radius * (inner if k % 2 else 1.0)
        points.append((width * reach * math.cos(angle), reach * math.sin(angle)))
    return points


def _as_photographed(pixels: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Uneven light and sensor noise."""
    ramp = np.linspace(-1, 1, IMAGE_SIZE)
    across, down = rng.uniform(-10, 10, 2)
    light = across * ramp[None, :, None] + down * ramp[:, None, None]
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * _NOISE
    return np.clip(pixels + light + noise, 0, 255).astype(np.uint8)


@cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(_FONT_SIZE)

"""Scenes as images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from capa_probe.demo.scenes import Scene
from capa_probe.demo.worlds import COLORS, RICH, World

_NOISE = 7.6  # standard deviation of the sensor noise, of 255
_INK = (52, 56, 66)  # of shapes whose color lies apart


@dataclass(frozen=True)
class Mark:
    """Something that was drawn in a cell.

    Attributes:
        cell: the cell.
        x, y: its middle, in pixels.
        reach: half its width and height, in pixels.
        shows: what it shows: fields of "shape", "color", "text".
    """

    cell: int
    x: float
    y: float
    reach: tuple[float, float]
    shows: tuple[str, ...]


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image; the same scene always gives the same pixels."""
    return render_with_marks(scene)[0]


def render_with_marks(scene: Scene) -> tuple[Image.Image, list[Mark]]:
    """The image, and what was drawn where."""
    world, size = scene.world, scene.world.image_size
    rng = np.random.default_rng(scene.seed)
    background = tuple(int(v) for v in rng.uniform(205, 250, 3))
    image = Image.new("RGB", (size, size), background)
    draw = ImageDraw.Draw(image)
    if world.grid:
        _draw_grid(draw, scene, background)
    if world.clutter[1]:
        _draw_clutter(draw, world, background, rng)
    marks = []
    for cell, (shape, color) in scene.objects.items():
        radius, turn = rng.uniform(*world.radius), rng.uniform(-0.2, 0.2)
        x, y = _center(scene, cell) + rng.uniform(-world.jitter, world.jitter, 2)
        fill = _about(COLORS[color], rng)
        if world.apart:
            (dx, dy), (bar_dx, bar_dy) = _two_quarters(scene, rng)
            bar = x + bar_dx, y + bar_dy, radius, 0.55 * radius
            _draw_bar(draw, bar, fill)
            marks.append(Mark(cell, *bar[:2], bar[2:], ("color",)))
            x, y, fill = x + dx, y + dy, _about(_INK, rng)
        _draw_shape(draw, shape, (x, y), radius, turn, fill, background)
        marks.append(Mark(cell, x, y, (radius, radius), ("shape",) if world.apart else ("shape", "color")))
    for cell, text in scene.texts.items():
        x, y = _center(scene, cell) + rng.uniform(-world.text_jitter, world.text_jitter, 2)
        if world.apart:
            y += (1 if rng.random() < 0.5 else -1) * world.image_size / scene.board / 4
        ink = tuple(int(v) for v in rng.integers(0, 70, 3))
        draw.text((x, y), text, font=_font(world.font_size), fill=ink, anchor="mm")
        marks.append(Mark(cell, x, y, (0.75 * world.font_size, 0.4 * world.font_size), ("text",)))
    return Image.fromarray(_as_photographed(np.asarray(image, dtype=np.float32), world, rng)), marks


def blank_image(world: World = RICH) -> Image.Image:
    """A board with nothing on it, for what a model knows without looking."""
    return Image.new("RGB", (world.image_size, world.image_size), (228, 228, 228))


def _center(scene: Scene, cell: int) -> NDArray[np.float64]:
    side = scene.world.image_size / scene.board
    return np.array([cell % scene.board, cell // scene.board]) * side + side / 2


def _about(color: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(v) for v in np.clip(color + rng.normal(0, 6, 3), 0, 255))


def _two_quarters(scene: Scene, rng: np.random.Generator) -> tuple[tuple[float, float], tuple[float, float]]:
    """The middles of two quarters of a cell that share a side, as seen from the middle of the cell."""
    quarter = scene.world.image_size / scene.board / 4
    side, other = (float(v) for v in rng.choice((-quarter, quarter), 2))
    return ((side, other), (-side, other)) if rng.random() < 0.5 else ((other, side), (other, -side))


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    middle: tuple[float, float],
    radius: float,
    turn: float,
    fill: tuple[int, ...],
    background: tuple[int, ...],
) -> None:
    x, y = middle
    if shape in ("circle", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    if shape == "ring":
        hole = 0.55 * radius
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
    if shape not in ("circle", "ring"):
        draw.polygon([(x + dx, y + dy) for dx, dy in _outline(shape, radius, turn)], fill=fill)


def _draw_bar(
    draw: ImageDraw.ImageDraw, bar: tuple[float, float, float, float], fill: tuple[int, ...]
) -> None:
    x, y, width, height = bar
    draw.rectangle((x - width, y - height, x + width, y + height), fill=fill)


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


def _draw_grid(draw: ImageDraw.ImageDraw, scene: Scene, background: tuple[int, ...]) -> None:
    """Thin borders of the cells, a little darker than the background."""
    size, ink = scene.world.image_size, tuple(max(0, v - 45) for v in background)
    for k in range(1, scene.board):
        at = round(k * size / scene.board)
        draw.line((at, 0, at, size), fill=ink)
        draw.line((0, at, size, at), fill=ink)


def _draw_clutter(
    draw: ImageDraw.ImageDraw, world: World, background: tuple[int, ...], rng: np.random.Generator
) -> None:
    """Pale dots and strokes, below everything else."""
    for _ in range(int(rng.integers(world.clutter[0], world.clutter[1] + 1))):
        ink = tuple(int(np.clip(v + rng.uniform(-55, 20), 0, 255)) for v in background)
        x, y = rng.uniform(0, world.image_size, 2)
        dx, dy = rng.uniform(-6, 6, 2)
        if rng.random() < 0.5:
            reach = abs(dx) / 4 + 0.7
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=ink)
        else:
            draw.line((x - dx, y - dy, x + dx, y + dy), fill=ink)


def _as_photographed(
    pixels: NDArray[np.float32], world: World, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Uneven light, spots and sensor noise."""
    ramp = np.linspace(-1, 1, world.image_size)
    across, down = rng.uniform(-world.light, world.light, 2)
    light = across * ramp[None, :, None] + down * ramp[:, None, None]
    if world.blotches:
        coarse = rng.uniform(-world.blotches, world.blotches, (5, 5)).astype(np.float32)
        spots = Image.fromarray(coarse).resize(pixels.shape[1::-1], Image.Resampling.BICUBIC)
        light = light + np.asarray(spots)[:, :, None]
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * _NOISE
    return np.clip(pixels + light + noise, 0, 255).astype(np.uint8)


@cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)

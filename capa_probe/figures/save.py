"""Writes figures to files."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageColor, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from capa_probe.figures.style import palette, styled
from capa_probe.files import replace

DPI = 150
#: No dates and no version: the same tables give the same bytes.
_METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "ModDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}

#: In an SVG: what holds coordinates in points, those of more than two decimals, and the markers of a line.
_COORDINATES, _DECIMALS = re.compile(r' (?:d|x|y)="[^"]*"|translate\([^)]*\)'), re.compile(r"\d+\.\d{3,}")
_MARKERS = re.compile(r'<g( clip-path="[^"]*")>\n((?:<use [^>]*/>\n)+)</g>')
#: Where a file says which data it was drawn from: a text chunk of a PNG, and the identifier of an SVG or PDF.
DATA_KEY, _PREFIX = "DataSHA256", "sha256:"


@styled
def save(
    figure: Figure,
    path: str | os.PathLike[str],
    pdf: bool = False,
    svg: bool = False,
    data: str | None = None,
    small: bool = False,
    dpi: int = DPI,
) -> list[Path]:
    """Write a figure as PNG and, if asked for, as PDF and SVG beside it.

    Each file is written under a temporary name and renamed; missing folders are made.

    Args:
        figure: what one of the figure functions returned.
        path: where the PNG goes; the suffix ``.png`` is added where it is missing.
        pdf: also write a PDF, for print.
        svg: also write an SVG, for pages and slides.
        data: SHA-256 of the tables that it was drawn from, in hexadecimal, to be written into the files' metadata.
        small: reduce the PNG to 256 colours, which takes a third of the room.
        dpi: pixels per inch, of the PNG and of what is drawn as pixels in the others.

    Returns:
        The files written.

    Raises:
        OSError: the folder cannot be written to.
    """
    png = Path(path)
    if png.suffix != ".png":
        png = png.with_name(f"{png.name}.png")
    png.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for kind in ("png", *["pdf"] * pdf, *["svg"] * svg):
        metadata: dict[str, str | None] = dict(_METADATA[kind])
        if data is not None:
            metadata |= {"png": {DATA_KEY: data}, "svg": {"Identifier": _PREFIX + data}}.get(
                kind, {"Keywords": _PREFIX + data}
            )
        draw = partial(figure.savefig, format=kind, dpi=dpi, metadata=metadata)
        if kind == "png" and small:
            draw = partial(_small, figure, metadata, dpi)
        elif kind == "svg":
            draw = partial(_compact, draw)
        with mpl.rc_context({"svg.hashsalt": png.stem}):
            written.append(replace(png.with_suffix(f".{kind}"), draw))
    return written


def saved_data(path: str | os.PathLike[str]) -> str | None:
    """The ``data`` that :func:`save` wrote into a PNG or SVG; None where there is none, or no such file."""
    file = Path(path)
    try:
        if file.suffix == ".png":
            with Image.open(file) as image:
                found = image.info.get(DATA_KEY)
                return None if found is None else str(found)
        text = file.read_text(encoding="utf-8")
    except (OSError, UnidentifiedImageError, UnicodeDecodeError):
        return None
    identified = re.search(rf"<dc:identifier>{_PREFIX}([0-9a-f]+)</dc:identifier>", text)
    return identified[1] if identified else None


def _compact(draw: Callable[[io.BytesIO], None], file: Path) -> None:
    """An SVG that looks the same and is smaller by a third.

    Coordinates have two decimals (of a point), no line is indented, and the markers of a line share one style.
    """
    drawn = io.BytesIO()
    draw(drawn)
    text = re.sub(r" *\n *", "\n", drawn.getvalue().decode("utf-8"))
    text = _COORDINATES.sub(
        lambda found: _DECIMALS.sub(lambda number: f"{float(number[0]):.2f}", found[0]), text
    )
    text = _MARKERS.sub(_with_one_style, text)
    file.write_text(text, encoding="utf-8", newline="\n")


def _with_one_style(group: re.Match[str]) -> str:
    styles = set(re.findall(r' style="[^"]*"', group[2]))
    if len(styles) != 1:
        return group[0]
    (style,) = styles
    return f"<g{group[1]}{style}>\n{group[2].replace(style, '')}</g>"


def _small(figure: Figure, metadata: dict[str, str | None], dpi: int, file: Path) -> None:
    drawn, info = io.BytesIO(), PngInfo()
    figure.savefig(drawn, format="png", dpi=dpi)
    for key, value in metadata.items():
        if value is not None:
            info.add_text(key, value)
    image = _with_256_colours(Image.open(drawn).convert("RGB"))
    image.save(file, "PNG", optimize=True, pnginfo=info, dpi=(dpi, dpi))


def _with_256_colours(image: Image.Image) -> Image.Image:
    """An image reduced to 256 colours; pixels in one of the figures' own keep it, however few they are."""
    pixels = np.asarray(image)
    exact = [ImageColor.getrgb(colour)[:3] for colour in palette()]
    n_others = 256 - len(exact)
    reduced = image.quantize(n_others, dither=Image.Dither.NONE)
    index = np.array(reduced)
    for number, colour in enumerate(exact, start=n_others):
        index[(pixels == colour).all(axis=2)] = number
    others = (reduced.getpalette() or [])[: 3 * n_others]
    found = Image.fromarray(index)
    found.putpalette([*others, *[0] * (3 * n_others - len(others)), *(part for own in exact for part in own)])
    return found

"""HTML for notebooks: cards of facts, tables and pictures. Whatever comes from data is escaped.

Styles are inline and colours follow the page, so that a card can be read in light and in dark notebooks and in the
pages made of them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

#: Longest side of a picture in a card, in pixels.
LONGEST_SIDE = 384
_LINE = "rgba(128, 128, 128, 0.45)"
_CELL = f"padding: 2px 10px 2px 0; border: none; border-bottom: 1px solid {_LINE}; vertical-align: top;"
# The class keeps the documentation's own style of tables, which goes by its absence, away.
_TABLE = 'class="card" style="border-collapse: collapse; border: none; font-size: 13px; color: inherit;'


@dataclass(frozen=True, repr=False)
class Html:
    """Something that shows itself in a notebook.

    Attributes:
        markup: its HTML, already escaped.
        text: what stands in for it where there is no HTML.
    """

    markup: str
    text: str

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return self.text


def card(title: str, *parts: str) -> str:
    """A frame with a title; the parts are HTML, the title is text."""
    head = f'<div style="font-weight: 600; margin-bottom: 4px;">{escape(title)}</div>'
    return (
        f'<div style="border: 1px solid {_LINE}; border-radius: 6px; padding: 8px 12px; margin: 4px 0; '
        f'max-width: 60em; font-size: 13px; line-height: 1.4; overflow-x: auto;">{head}{"".join(parts)}</div>'
    )


def facts(known: Mapping[str, object]) -> str:
    """Names and values, one pair a line; a value of None is left out."""
    rows = "".join(
        f'<tr style="background: none;"><td style="{_CELL} text-align: left; opacity: 0.7;">{escape(name)}</td>'
        f'<td style="{_CELL} text-align: left;">{escape(str(value))}</td></tr>'
        for name, value in known.items()
        if value is not None
    )
    return f'<table {_TABLE} margin: 0;"><tbody>{rows}</tbody></table>'


def short_path(name: str) -> str:
    """A name as it is; of an absolute path the last two parts, since pages made of notebooks are read elsewhere."""
    path = PurePath(name)
    return str(PurePath("...", *path.parts[-2:])) if path.is_absolute() and len(path.parts) > 3 else name


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], align: str = "right") -> str:
    """A table of values.

    Args:
        columns: its heads.
        rows: a value for each column.
        align: "right" for numbers, "left" for words.
    """
    head = "".join(f'<th style="{_CELL} text-align: {align};">{escape(name)}</th>' for name in columns)
    body = "".join(
        '<tr style="background: none;">'
        + "".join(f'<td style="{_CELL} text-align: {align};">{escape(str(value))}</td>' for value in row)
        + "</tr>"
        for row in rows
    )
    return (
        f'<table {_TABLE} margin: 6px 0 0;">'
        f'<thead><tr style="background: none;">{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def text(words: str) -> str:
    """A paragraph."""
    return f'<div style="margin: 4px 0; overflow-wrap: anywhere;">{escape(words)}</div>'


def side_by_side(parts: Iterable[str]) -> str:
    """Pictures in a row that wraps."""
    return f'<div style="display: flex; flex-wrap: wrap; gap: 12px; margin: 6px 0;">{"".join(parts)}</div>'


def picture(image: Image, drawing: str = "", label: str = "", caption: str = "") -> str:
    """An image with SVG drawn over it.

    Args:
        image: an RGB image.
        drawing: SVG in pixels of the image.
        label: what the picture shows, for readers who do not see it.
        caption: stands below it.
    """
    width, height = image.size
    scale = LONGEST_SIDE / max(width, height)
    small = image.convert("RGB")
    small.thumbnail((2 * LONGEST_SIDE, 2 * LONGEST_SIDE))  # what a fine screen shows
    said = (
        '<figcaption style="font-size: 12px; font-style: normal; text-align: left; max-width: none; margin: 2px 0 0; '
        f'opacity: 0.75;">{escape(caption)}</figcaption>'
        if caption
        else ""
    )
    return (
        '<figure style="margin: 0; width: auto;">'
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" '
        f'width="{width * scale:.0f}" height="{height * scale:.0f}" style="max-width: 100%; height: auto;">'
        f'<image href="{data_uri(small)}" width="{width}" height="{height}"/>{drawing}</svg>{said}</figure>'
    )


def data_uri(image: Image, most: int = 60_000) -> str:
    """An image as a ``data:`` URI: PNG, as drawings are small in, or JPEG where that takes more than ``most`` bytes."""
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    content, kind = png.getvalue(), "png"
    if len(content) > most:
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=85, optimize=True)
        if jpeg.tell() < len(content):
            content, kind = jpeg.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

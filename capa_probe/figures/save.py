"""Writes figures to files."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from capa_probe.figures.style import styled
from capa_probe.files import replace

DPI = 150
#: No dates and no version: the same tables give the same bytes.
_METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "ModDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}


@styled
def save(figure: Figure, path: str | os.PathLike[str], pdf: bool = False, svg: bool = False) -> list[Path]:
    """Write a figure as PNG at 150 dpi and, if asked for, as PDF and SVG beside it.

    Each file is written under a temporary name and renamed; missing folders are made.

    Args:
        figure: what one of the figure functions returned.
        path: where the PNG goes; the suffix ``.png`` is added where it is missing.
        pdf: also write a PDF, for print.
        svg: also write an SVG, for pages and slides.

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
        draw = partial(figure.savefig, format=kind, dpi=DPI, metadata=_METADATA[kind])
        with mpl.rc_context({"svg.hashsalt": png.stem}):
            written.append(replace(png.with_suffix(f".{kind}"), draw))
    return written

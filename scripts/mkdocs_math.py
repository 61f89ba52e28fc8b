"""MkDocs hook: draws ```` ```math ```` blocks as SVG, so that pages need neither scripts nor the network for formulas.

The formulas are LaTeX as far as matplotlib's mathtext knows it; GitHub shows the same blocks with its own renderer.
"""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath

#: Points of a letter, and of the margin around a formula.
SIZE, MARGIN = 20.0, 3.0
#: How many points of a letter make one em of the page.
EM = 17.0
_COMMANDS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}


def on_config(config: Any) -> Any:
    """Tell the Markdown extension for fenced blocks what a math block is."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences[:] = [fence for fence in fences if fence["name"] != "math"]
    fences.append({"name": "math", "class": "math", "format": fence})
    return config


def fence(source: str, language: str, css_class: str, options: Any, md: Any, **kwargs: Any) -> str:
    """A block as the extension asks for it: one formula, or several with an empty line between."""
    formulas = [" ".join(part.split()) for part in source.strip().split("\n\n")]
    drawn = "".join(f'<p style="overflow-x: auto;">{draw(formula)}</p>' for formula in formulas)
    return f'<div class="{css_class}">{drawn}</div>'


def draw(formula: str) -> str:
    """A formula as SVG in the colour of the text around it.

    Raises:
        ValueError: mathtext does not know what is written there.
    """
    font = FontProperties(math_fontfamily="stix")
    path = TextPath((0, 0), f"${formula}$", size=SIZE, prop=font)
    box = path.get_extents()
    parts = []
    for points, code in path.iter_segments(simplify=False, curves=True):
        xy = np.reshape(points, (-1, 2)) if code != Path.CLOSEPOLY else np.zeros((0, 2))
        parts.append(_COMMANDS[code] + " ".join(f"{x:.2f} {-y:.2f}" for x, y in xy))
    left, top = box.x0 - MARGIN, -box.y1 - MARGIN
    width, height = box.width + 2 * MARGIN, box.height + 2 * MARGIN
    return (
        f'<svg role="img" aria-label="{escape(formula)}" viewBox="{left:.2f} {top:.2f} {width:.2f} {height:.2f}" '
        f'style="width: {width / EM:.2f}em; height: {height / EM:.2f}em; fill: currentColor;">'
        f'<path d="{"".join(parts)}"/></svg>'
    )

"""How every figure looks: one place for colours, markers and fonts."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import seaborn as sns
from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

#: Okabe and Ito's palette, which readers with a colour vision deficiency can tell apart.
VISUAL, TEXT = "#0072B2", "#E69F00"
INK, QUIET, FAINT, RULE = "#222222", "#5f6670", "#a4abb3", "#e7e9ec"
#: Colour and marker of each sink role; shape says it too, for print in grey.
ROLES: dict[str, tuple[str, str]] = {
    "dump": ("#D55E00", "v"),
    "anchor": ("#009E73", "^"),
    "undetermined": ("#CC79A7", "s"),
}
#: Words of the paper for the roles.
ROLE_NAMES = {
    "dump": "Probability Dump",
    "anchor": "Structural Anchor",
    "undetermined": "undetermined sink",
}

#: What marks the title among a figure's texts, and the height that it takes, in inches.
TITLE, TITLE_HEIGHT = "title", 0.27

_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "mathtext.fontset": "dejavusans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3.5,
    "ytick.major.size": 3.5,
    "xtick.minor.size": 2,
    "ytick.minor.size": 2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,  # text stays text
}


class NotebookFigure(Figure):
    """A figure that a notebook shows as an image, whether or not pyplot has been imported there."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png", dpi=100)
        return image.getvalue()


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a function under the project's style and leave matplotlib's settings as they were."""

    @wraps(draw)
    def under_style(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context({**sns.axes_style("ticks"), **_SETTINGS}):
            return draw(*args, **kwargs)

    return under_style


def headline(figure: Figure, title: str, subtitle: str) -> float:
    """Title and quieter lines below it, wrapped to the width, at the top left of a figure.

    Returns:
        How much height they take, in inches.
    """
    width, height = figure.get_size_inches()
    room = int(14.4 * (width - 0.25))  # characters at this size
    lines = [part for line in subtitle.split("\n") for part in textwrap.wrap(line, room)]
    left, top = 0.12 / width, 0.12
    figure.text(
        left, 1 - top / height, title, ha="left", va="top", fontsize=12.5, fontweight="bold", gid=TITLE
    )
    top += TITLE_HEIGHT
    figure.text(
        left,
        1 - top / height,
        "\n".join(lines),
        ha="left",
        va="top",
        fontsize=9,
        color=QUIET,
        linespacing=1.45,
    )
    return float(top + 0.19 * len(lines))


def count(n: int, noun: str) -> str:
    """``count(1, "sample")`` is "1 sample", ``count(1200, "sample")`` "1,200 samples"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"

"""How every figure looks: one place for colours, markers and fonts."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import matplotlib as mpl
import seaborn as sns
from matplotlib.figure import Figure

from capa_probe.errors import CapaProbeError

P = ParamSpec("P")
R = TypeVar("R")

#: Okabe and Ito's palette, which readers with a colour vision deficiency can tell apart.
VISUAL, TEXT = "#0072B2", "#E69F00"
#: Text at the very start of a prompt.
FIRST_TEXT = "#F7D48A"
INK, QUIET, FAINT, RULE = "#222222", "#5f6670", "#a4abb3", "#e7e9ec"
#: Colour and marker of each sink role; shape says it too, for print in grey.
ROLES: dict[str, tuple[str, str]] = {
    "dump": ("#D55E00", "v"),
    "anchor": ("#009E73", "^"),
    "undetermined": ("#B8468C", "s"),
}
#: Words of the paper for the roles.
ROLE_NAMES = {
    "dump": "Probability Dump",
    "anchor": "Structural Anchor",
    "undetermined": "undetermined sink",
}


class Look(NamedTuple):
    """Colour and marker of one thing, in every figure the same; the marker says it too, for print in grey."""

    colour: str
    marker: str


#: What ranks visual tokens, in hues of Tol's muted palette, so that none is taken for a role or a kind of token.
SCORES: dict[str, Look] = {
    "contribution": Look("#332288", "P"),
    "attention": Look("#CC6677", "X"),
    "value_norm": Look("#999933", "*"),
    "removal_effect": Look("#56B4E9", "d"),
    "random": Look("#B0B0B0", "o"),
}
#: Ways to prune, and the model as it is; a method that ranks by a score has that score's look.
METHODS: dict[str, Look] = {
    **SCORES,
    "capa": SCORES["contribution"],
    "fastv": SCORES["attention"],
    "vision-attention": Look("#AA4499", "h"),
    "every_step": Look("#117733", "D"),
    "unpruned": Look(INK, "s"),
}
#: What becomes of a layer's FFN.
FFN: dict[str, Look] = {
    "full": Look(INK, "o"),
    "hadamard": Look("#117733", "D"),
    "skip": Look("#882255", "v"),
}
#: Operating points: light to dark with depth.
STAGES: dict[str, Look] = {
    "early": Look("#E0A800", "o"),
    "transition": Look("#2A9D8F", "s"),
    "late": Look("#264653", "^"),
}
_HUES = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#5B4B8A")
_MARKERS = "os^DvPX*<>hp"
#: Tasks of the built-in world; those that ask for the same thing share a hue and differ in the marker.
TASKS: dict[str, Look] = {
    "existence": Look(_HUES[0], "o"),
    "count": Look(_HUES[1], "D"),
    "count_kind": Look(_HUES[1], "o"),
    "count_where": Look(_HUES[1], "s"),
    "shape_at": Look(_HUES[2], "o"),
    "shape_of": Look(_HUES[2], "s"),
    "same_color": Look(_HUES[3], "^"),
    "color": Look(_HUES[3], "o"),
    "color_at": Look(_HUES[3], "s"),
    "read": Look(_HUES[4], "D"),
    "read_at": Look(_HUES[4], "o"),
    "read_next": Look(_HUES[4], "s"),
    "relation": Look(_HUES[5], "o"),
    "relation_shape": Look(_HUES[5], "s"),
    "comparison": Look(_HUES[6], "o"),
    "chain": Look(_HUES[7], "o"),
    "describe": Look("#7A828C", "X"),
    "list": Look("#7A828C", "v"),
    "twins": Look("#7A828C", "*"),
    "all": Look(INK, "p"),
}
#: Several models or runs side by side, in the order given.
_RUNS = tuple(
    Look(colour, marker)
    for colour, marker in zip(
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "os^Dvp", strict=True
    )
)
MOST_RUNS = len(_RUNS)

#: What marks the title among a figure's texts, and the height that it takes, in inches.
TITLE, TITLE_HEIGHT = "title", 0.27
#: Inches above the title.
_TOP = 0.12

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


def palette() -> list[str]:
    """Every colour that stands for something, and the white around it, once."""
    looks = [look for group in (SCORES, METHODS, FFN, STAGES, TASKS) for look in group.values()]
    plain = ["#FFFFFF", VISUAL, TEXT, FIRST_TEXT, INK, FAINT, *_HUES]
    roles = [colour for colour, _ in ROLES.values()]
    return list(dict.fromkeys([*plain, *roles, *(look.colour for look in (*looks, *_RUNS))]))


def task_looks(tasks: Iterable[str]) -> dict[str, Look]:
    """A look for each task: tasks of the built-in world have their own, others one by their place in the alphabet."""
    names = list(dict.fromkeys(tasks))
    others = sorted(set(names) - set(TASKS))
    looks = {
        name: Look(_HUES[i % len(_HUES)], _MARKERS[(i % len(_HUES) + i // len(_HUES)) % len(_MARKERS)])
        for i, name in enumerate(others)
    }
    return {name: TASKS.get(name) or looks[name] for name in names}


def run_looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each of several runs, in the order given.

    Raises:
        CapaProbeError: there are more of them than colours that can be told apart.
    """
    given = list(names)
    if not 1 <= len(given) <= MOST_RUNS:
        raise CapaProbeError(f"{len(given)} models were given; give 1 to {MOST_RUNS}.")
    return dict(zip(given, _RUNS, strict=False))


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


def headline_height(width: float, subtitle: str) -> float:
    """How much height :func:`headline` takes in a figure of this width; all in inches."""
    return _TOP + TITLE_HEIGHT + 0.19 * len(_wrapped(width, subtitle))


def headline(figure: Figure, title: str, subtitle: str) -> float:
    """Title and quieter lines below it, wrapped to the width, at the top left of a figure.

    Returns:
        How much height they take, in inches.
    """
    width, height = (float(inches) for inches in figure.get_size_inches())
    left = 0.12 / width
    figure.text(
        left, 1 - _TOP / height, title, ha="left", va="top", fontsize=12.5, fontweight="bold", gid=TITLE
    )
    figure.text(
        left,
        1 - (_TOP + TITLE_HEIGHT) / height,
        "\n".join(_wrapped(width, subtitle)),
        ha="left",
        va="top",
        fontsize=9,
        color=QUIET,
        linespacing=1.45,
    )
    return headline_height(width, subtitle)


def _wrapped(width: float, subtitle: str) -> list[str]:
    room = int(14.4 * (width - 0.25))  # characters at this size
    return [part for line in subtitle.split("\n") for part in textwrap.wrap(line, room)]


def count(n: int, noun: str) -> str:
    """``count(1, "sample")`` is "1 sample", ``count(1200, "sample")`` "1,200 samples"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"

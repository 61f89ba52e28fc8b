"""What a plot over the decoder's layers consists of, and the words that all of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from capa_probe.figures.style import count
from capa_probe.report.runs import ShownRun

#: How an axis runs: "cosine" is logarithmic in 1 - x.
Axis = Literal["linear", "log", "cosine"]
#: Kinds of tokens, in words.
KINDS = {"visual": "visual tokens", "text": "text tokens"}


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        run: number of the run that it is of.
        label: what it is, without the run's name.
        look: names its colour and dash in the style sheet.
        values: one per layer, NaN where there is none.
        low, high: ends of a band around it, which is shown where there is a single run; empty for none.
    """

    run: int
    label: str
    look: str
    values: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Chart:
    """One plot over the decoder's layers.

    Attributes:
        name: its id.
        heading: above it.
        unit: of its numbers, at the axis.
        axis: how the vertical axis runs.
        caption: what it shows, of how many samples.
        lines: in the order of the legend.
        marks: runs, values and labels of thresholds.
        shaded: layers that are marked, where there is a single run.
        missing: why there is nothing to show; "" where there is something.
    """

    name: str
    heading: str
    unit: str
    axis: Axis
    caption: str
    lines: tuple[Line, ...]
    marks: tuple[tuple[int, float, str], ...] = ()
    shaded: tuple[int, ...] = field(default=())
    missing: str = ""


def samples(runs: Sequence[ShownRun]) -> str:
    """What an average is over: how many samples, or, of several runs, those of each (the page lists their numbers)."""
    if len(runs) == 1:
        return count(int(runs[0].prof.manifest["n_samples"]), "sample")
    return "each run's samples"


def band(runs: Sequence[ShownRun], what: str = "5th to 95th percentile") -> str:
    """What the band around a line is; nothing where runs lie over each other, which are drawn without bands."""
    return f"; band: {what}" if len(runs) == 1 else ""


def floats(column: Any) -> tuple[float, ...]:
    """The values of a column."""
    return tuple(np.asarray(column, dtype=float).tolist())


def known(values: Sequence[float]) -> bool:
    """Whether there is any number among values."""
    return any(not math.isnan(value) for value in values)

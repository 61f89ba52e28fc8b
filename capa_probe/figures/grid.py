"""The layout of figures with a row of panels for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from capa_probe.errors import CapaProbeError
from capa_probe.figures.style import MOST_RUNS, NotebookFigure, headline, headline_height

#: Inches: left of the panels, right of them, and between rows.
_LEFT, _RIGHT, _GAP = 0.9, 0.15, 0.72
#: Inches that the name of a model takes, left of its row.
_NAME = 0.28
_LINE = 0.21


def grid(
    models: Mapping[str, Any],
    columns: int,
    ratios: Sequence[float] | None = None,
    size: tuple[float, float] = (11.6, 2.7),
    **subplots: Any,
) -> tuple[NotebookFigure, npt.NDArray[Any]]:
    """A figure with a row of panels for each model.

    Args:
        models: whose keys are the models' names.
        columns: panels per row.
        ratios: of their widths.
        size: width of the figure and height of a panel, in inches.
        **subplots: as ``sharey``.

    Returns:
        The figure, and its panels: (model, column). :func:`finish` sets the margins.

    Raises:
        CapaProbeError: there is no model, or there are more than can be told apart.
    """
    if not 1 <= len(models) <= MOST_RUNS:
        raise CapaProbeError(f"{len(models)} models were given to one figure; give 1 to {MOST_RUNS}.")
    figure = NotebookFigure(figsize=(size[0], size[1] * len(models)))
    axes = figure.subplots(len(models), columns, squeeze=False, width_ratios=ratios, **subplots)
    return figure, axes


def finish(
    figure: Any,
    axes: npt.NDArray[Any],
    models: Mapping[str, Any],
    title: str,
    subtitle: str,
    handles: Sequence[Any] | Mapping[str, Sequence[Any]],
    wspace: float = 0.08,
    below: float = 0.55,
    gap: float = _GAP,
    named: bool = False,
) -> None:
    """Title, names of the models where there are several, legend below, and margins that leave room for them.

    Args:
        figure: made by :func:`grid`, as high as its panels.
        axes: its panels.
        models: whose keys are the models' names.
        title: in bold.
        subtitle: below it.
        handles: of the legend; or heading -> handles, for one legend below the other.
        wspace: between panels, as a share of their width.
        below: inches for labels below the lowest panels.
        gap: inches between rows.
        named: whether even a single row has the name of its model.
    """
    named = named or len(models) > 1
    width, panels = (float(inches) for inches in figure.get_size_inches())
    left = _LEFT + (_NAME if named else 0)
    legends = dict(handles) if isinstance(handles, Mapping) else {"": handles}
    columns = {heading: _legend_columns(own, width - 0.3) for heading, own in legends.items()}
    lines = sum(n_lines + bool(heading) for heading, (_, n_lines) in columns.items())
    top = headline_height(width, subtitle)
    rows = len(axes)
    height = top + 0.42 + panels + gap * (rows - 1) + below + _LINE * lines + 0.08
    figure.set_size_inches(width, height)
    headline(figure, title, subtitle)
    figure.subplots_adjust(
        left=left / width,
        right=1 - _RIGHT / width,
        top=1 - (top + 0.42) / height,
        bottom=(below + _LINE * lines + 0.08) / height,
        wspace=wspace,
        hspace=gap * rows / panels,
    )
    if named:
        for number, name in enumerate(models):
            box = axes[number, 0].get_position()
            middle = (box.y1 + box.y0) / 2
            figure.text(0.1 / width, middle, name, rotation=90, fontweight="bold", va="center", ha="left")
    bottom = 0.05
    for heading, own in reversed(legends.items()):
        n_columns, n_lines = columns[heading]
        if not n_lines:
            continue
        legend = figure.legend(
            handles=list(own),
            loc="lower left",
            bbox_to_anchor=(0.12 / width, bottom / height),
            ncols=n_columns,
            borderaxespad=0,
            columnspacing=1.5,
            handlelength=2.0,
            labelspacing=0.35,
            title=heading or None,
            title_fontproperties={"weight": "bold", "size": 9},
            alignment="left",
        )
        figure.add_artist(legend)
        bottom += _LINE * (n_lines + bool(heading))


def sentences(title: str, subtitle: str) -> NotebookFigure:
    """A figure of words alone, where no model has anything to draw."""
    width = 9.6
    figure = NotebookFigure(figsize=(width, headline_height(width, subtitle) + 0.15))
    headline(figure, title, subtitle)
    return figure


def _legend_columns(handles: Sequence[Any], room: float) -> tuple[int, int]:
    """How many columns a legend may have in so many inches, and how many lines it then takes."""
    if not handles:
        return 1, 0
    widths = [0.72 + 0.076 * len(str(handle.get_label())) for handle in handles]
    for n in range(len(handles), 1, -1):
        # Columns are filled from top to bottom, the first ones with one more.
        if sum(max(column) for column in np.array_split(widths, n)) <= room:
            return n, -(-len(handles) // n)
    return 1, len(handles)


def empty(axes: Any, why: str) -> None:
    """Say in a panel why there is nothing in it."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", fontsize=9, wrap=True)


def span(values: npt.ArrayLike, share: float = 0.06) -> tuple[float, float]:
    """Limits of an axis around values, with some room."""
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found)]
    if not len(found):
        return 0.0, 1.0
    low, high = float(found.min()), float(found.max())
    room = share * (high - low) or 0.05 * max(abs(high), 1e-9)
    return low - room, high + room

"""An axis for cosines that is logarithmic in ``1 - cosine``, since what matters is how near to 1 they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter
from numpy.typing import NDArray

TICKS = (-1.0, 0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999, 0.99999)
#: What is nearer to 1 than this is drawn here.
_NEAREST = 3e-6
#: Of the axis, so that there is room beyond.
_END = 1e-8


def drawable(cosines: Any) -> NDArray[np.float64]:
    """Cosines, none nearer to 1 than what a figure shows."""
    return np.minimum(np.asarray(cosines, dtype=float), 1 - _NEAREST)


def nines(cosine: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 at cosine 0, 1 at 0.9, 2 at 0.99, ..."""
    return -np.log10(np.maximum(1 - np.asarray(cosine, dtype=float), _END))


def from_nines(n: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cosine again."""
    return 1 - 10.0 ** -np.asarray(n, dtype=float)


def cosine_limits(axes: Any, values: Any, ticks: tuple[float, ...] = TICKS) -> None:
    """Room around all values (cosines, NaN for none), and ticks at those of ``ticks`` that lie in it."""
    found = nines(drawable(values))
    low, high = np.nanmin(found), np.nanmax(found)
    margin = 0.08 * max(high - low, 0.5)
    axes.set_ylim(*from_nines(np.array([low - margin, high + margin])))
    shown = [tick for tick in ticks if low - margin <= nines(np.array(tick)) <= high + margin]
    axes.yaxis.set_major_locator(FixedLocator(shown))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

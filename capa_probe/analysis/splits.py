"""What makes a sink an anchor: thresholds on its contribution."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from capa_probe.analysis.redundancy import layer_ranges
from capa_probe.errors import CapaProbeError

ROLES = ("dump", "anchor", "undetermined")
#: Median contribution of the non-sink visual tokens of a sink's own sample and layer.
OTHERS = "others_contribution"
#: What ``quantile=None`` stands for with ``split="quantile"``.
QUANTILE = 0.5


@dataclass(frozen=True)
class Split:
    """How to tell anchors from dumps.

    Attributes:
        threshold: gives, for a table of all sinks and a quantile, the contribution from which on each sink is an
            anchor; NaN where that cannot be told.
        unknown_if: what a sink whose threshold is NaN has in common with others like it, for a warning.
    """

    threshold: Callable[[pd.DataFrame, float], pd.Series[float]]
    unknown_if: str


def otsu_threshold(contribution: ArrayLike) -> float:
    """Otsu's threshold on log C: the lowest contribution of the upper one of two classes.

    Of all cuts between two neighbouring distinct values it takes the one with the largest between-class variance
    (N. Otsu, *A threshold selection method from gray-level histograms*, 1979), without a histogram; the lowest one
    if several are equal. A contribution of 0 has no logarithm: it is always in the lower class and does not move the
    cut between the others.

    Args:
        contribution: (sink,), at least 0.

    Returns:
        The threshold; NaN with fewer than two distinct values.
    """
    values = np.asarray(contribution, dtype=np.float64)
    distinct, counts = np.unique(values[values > 0], return_counts=True)
    if len(distinct) < 2:
        has_zero = bool((values == 0).any())
        return float(distinct[0]) if len(distinct) and has_zero else float("nan")
    logs = np.log(distinct)
    logs -= np.average(logs, weights=counts)  # the variance does not change, and sums lose less
    below, above = np.cumsum(counts)[:-1], counts.sum() - np.cumsum(counts)[:-1]
    # With mean 0, the sum above a cut is minus that below it.
    variance = np.cumsum(logs * counts)[:-1] ** 2 * (1 / below + 1 / above)
    # Rounding must not decide between equal cuts.
    best = int(np.argmax(variance >= variance.max() * (1 - 1e-9)))
    return float(distinct[best + 1])


def _in_layer(threshold: Callable[[pd.Series[float]], float], sinks: pd.DataFrame) -> pd.Series[float]:
    """A threshold over all sinks of a layer, for each of them."""
    found = {layer: threshold(own) for layer, own in sinks.groupby("layer")["contribution"]}
    return sinks["layer"].map(found).astype(np.float64)


def _quantile(sinks: pd.DataFrame, quantile: float) -> pd.Series[float]:
    return _in_layer(lambda own: float(np.quantile(own.to_numpy(np.float64), quantile)), sinks)


#: Name of a split to what it does. A further split is one more line here.
SPLITS: dict[str, Split] = {
    "non-sink-median": Split(
        lambda sinks, _: sinks[OTHERS], "in their sample every visual token of the layer is a sink"
    ),
    "otsu": Split(
        lambda sinks, _: _in_layer(otsu_threshold, sinks), "all sinks of the layer contribute alike"
    ),
    "quantile": Split(_quantile, "their contribution is missing"),
}


def check_split(split: str, quantile: object) -> float:
    """The quantile to use.

    Raises:
        CapaProbeError: an unknown split, or a quantile that is none or that the split does not use.
    """
    if split not in SPLITS:
        raise CapaProbeError(f"split={split!r} was given; available: {', '.join(map(repr, SPLITS))}.")
    if quantile is None:
        return QUANTILE
    if split != "quantile":
        raise CapaProbeError(
            f'quantile={quantile!r} was given with split={split!r}, which has none; give split="quantile" too.'
        )
    is_number = isinstance(quantile, (int, float, np.number)) and not isinstance(quantile, bool)
    if not is_number or not 0 < float(quantile) < 1:  # type: ignore[arg-type]
        raise CapaProbeError(f"quantile={quantile!r} was given; give a number between 0 and 1, such as 0.5.")
    return float(quantile)  # type: ignore[arg-type]


def roles(sinks: pd.DataFrame, split: str, quantile: float) -> NDArray[np.object_]:
    """The role of every sink: (sink,); a warning names the layers where it cannot be told."""
    threshold = SPLITS[split].threshold(sinks, quantile).to_numpy(np.float64)
    unknown = np.isnan(threshold)
    if unknown.any():
        first = sinks.iloc[int(unknown.argmax())]
        at = sinks["layer"][unknown].unique()
        warnings.warn(
            f"The role of {int(unknown.sum())} of {len(sinks)} sinks is undetermined: at layer"
            f"{'' if len(at) == 1 else 's'} {layer_ranges(at)}, {SPLITS[split].unknown_if} (first: sample "
            f"{first['sample']!r}, layer {first['layer']}).",
            stacklevel=3,
        )
    is_anchor = sinks["contribution"].to_numpy(np.float64) >= threshold
    return np.where(unknown, "undetermined", np.where(is_anchor, "anchor", "dump")).astype(object)

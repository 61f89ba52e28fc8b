"""Is log C of the sinks bimodal, so that telling dumps from anchors is more than a convention?"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
from diptest import diptest  # type: ignore[import-untyped]
from numpy.typing import NDArray

from capa_probe.analysis.reading import FIRST_LAYER
from capa_probe.analysis.splits import OTHERS, otsu_threshold
from capa_probe.analysis.summary import check_whole

#: Fewer contributions say nothing about the shape of their distribution.
MIN_SINKS = 20
#: Largest p-value of the dip test at which unimodality is rejected.
DIP_ALPHA = 0.05
#: Ashman's D above which two components are cleanly apart (Ashman et al. 1994).
SEPARATE = 2.0
#: ``layer`` of the row for all layers together.
ALL_LAYERS = -1

#: The mixture is fitted to at most so many values.
_MOST = 2**15
_MOST_STEPS = 500
#: Smallest variance of a component, as a share of the variance of all values: none shrinks to a point.
_NARROWEST = 1e-3


def sink_bimodality(sinks: pd.DataFrame) -> pd.DataFrame:
    """Whether log C of the sinks has two modes, by layer and overall.

    Two measures that fail in different ways are taken together. Hartigan's dip test asks whether any unimodal
    distribution fits (Hartigan and Hartigan, *The dip test of unimodality*, 1985; p-value by its published table); it
    misses a small second mode. Ashman's D, ``sqrt(2) |m1 - m2| / sqrt(s1^2 + s2^2)``, says how far apart the two
    components of a Gaussian mixture are (Ashman, Bird and Zepf, *Detecting bimodality in astronomical datasets*,
    1994); for few values, or flat distributions, it is large without any second mode. The mixture is fitted by
    expectation maximisation from Otsu's classes: classes cut at a threshold would have D > 2 for any data at all,
    since cutting takes away their tails.

    Args:
        sinks: the whole table, as :func:`classify_sinks` returned it, with its ``.attrs``.

    Returns:
        One row per layer from 2 on, then one for all layers together (``layer`` -1): ``n`` sinks looked at,
        ``n_left_out`` (C is 0, or there is nothing to compare with), ``dip``, ``dip_p``, ``ashman_d``, and
        ``verdict``: "bimodal" (dip_p < 0.05 and D > 2), "unimodal" (neither), "unclear" (one of them), or "too few"
        (fewer than 20 sinks, with the measures NaN). The row for all layers looks at log (C / median C of the other
        visual tokens of the same sample and layer), since the scale of C changes from layer to layer.

    Raises:
        CapaProbeError: the table is not what :func:`classify_sinks` returned, or only some of its rows.
    """
    n_layers = len(check_whole(sinks, "sink_bimodality"))
    layer, own = sinks["layer"].to_numpy(), sinks["contribution"].to_numpy(np.float64)
    others = sinks[OTHERS].to_numpy(np.float64)
    relative = np.divide(own, others, out=np.zeros(len(own)), where=others > 0)  # NaN is not above 0
    rows = [_row(at, own[layer == at]) for at in range(FIRST_LAYER, n_layers)]
    table = pd.DataFrame([*rows, _row(ALL_LAYERS, relative)])
    return table.astype({"layer": np.int32})


def ashman_d(values: NDArray[np.float64]) -> float:
    """Ashman's D of the two components of a Gaussian mixture fitted to some values.

    Args:
        values: (value,). More than 32 768 are thinned to that many evenly spaced order statistics.

    Returns:
        D; NaN with fewer than two distinct values.
    """
    x = np.sort(values)
    if len(x) > _MOST:
        x = x[np.linspace(0, len(x) - 1, _MOST).round().astype(np.intp)]
    x = x - x.mean() if len(x) else x
    scale = x.std() if len(x) else 0.0
    cut = otsu_threshold(np.exp(x / scale)) if scale > 0 else math.nan
    if math.isnan(cut):
        return math.nan
    x = x / scale
    upper = (np.exp(x) >= cut).astype(np.float64)
    share = np.stack([1 - upper, upper])  # (component, value): of a value that a component accounts for
    last = -math.inf
    for _ in range(_MOST_STEPS):
        size = share.sum(axis=1, keepdims=True)
        if not (size > 0).all():
            return math.nan  # one component has taken all
        mean = share @ x[:, None] / size
        variance = np.maximum((share * (x - mean) ** 2).sum(axis=1, keepdims=True) / size, _NARROWEST)
        log_density = np.log(size / len(x)) - 0.5 * (
            np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance
        )
        total = np.logaddexp(*log_density)
        share = np.exp(log_density - total)
        likelihood = float(total.mean())
        if likelihood - last < 1e-8:
            break
        last = likelihood
    return float(math.sqrt(2) * abs(mean[0, 0] - mean[1, 0]) / math.sqrt(variance.sum()))


def _row(layer: int, contribution: NDArray[np.float64]) -> dict[str, object]:
    logs = np.log(contribution[contribution > 0])
    dip = p = d = math.nan
    verdict = "too few"
    if len(logs) >= MIN_SINKS:
        with warnings.catch_warnings():
            # Beyond its table the test uses the largest tabulated size, where sqrt(n) * dip has reached its limit.
            warnings.filterwarnings("ignore", message="Sample size exceeds")
            dip, p = (float(value) for value in diptest(logs))
        d = ashman_d(logs)
        signs = (p < DIP_ALPHA) + (d > SEPARATE)  # NaN is not above it
        verdict = ("unimodal", "unclear", "bimodal")[signs]
    return {
        "layer": layer,
        "n": len(logs),
        "n_left_out": len(contribution) - len(logs),
        "dip": dip,
        "dip_p": p,
        "ashman_d": d,
        "verdict": verdict,
    }

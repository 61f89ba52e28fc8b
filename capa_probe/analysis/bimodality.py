"""Is log C of the sinks bimodal, so that telling dumps from anchors is more than a convention?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping

import numpy as np
import pandas as pd
from diptest import diptest  # type: ignore[import-untyped]
from numpy.typing import NDArray

from capa_probe.analysis.images import distinct_tokens
from capa_probe.analysis.reading import FIRST_LAYER
from capa_probe.analysis.splits import OTHERS, otsu_threshold
from capa_probe.analysis.summary import check_whole

#: Fewer tokens say nothing about the shape of a distribution.
MIN_TOKENS = 20
#: Largest p-value of the dip test at which unimodality is rejected.
DIP_ALPHA = 0.05
#: Ashman's D above which two components are cleanly apart (Ashman et al. 1994).
SEPARATE = 2.0
#: Number of values to the D that 5 % of as many draws from one Gaussian exceed (400 draws each, rounded up). Neither
#: place nor scale matters to D, so that no other Gaussian has other values.
ONE_GAUSSIAN = {20: 4.8, 30: 4.5, 50: 4.5, 100: 4.0, 200: 2.9, 400: 2.3, 800: 1.7}
#: ``layer`` of the row for all layers together.
ALL_LAYERS = -1

#: The mixture is fitted to at most so many values.
_MOST = 2**15
_MOST_STEPS = 500
#: Smallest variance of a component, as a share of the variance of all values: none shrinks to a point.
_NARROWEST = 1e-3


def sink_bimodality(sinks: pd.DataFrame, groups: Mapping[str, Hashable] | None = None) -> pd.DataFrame:
    """Whether log C of the sinks has two modes, by layer and overall.

    Two measures that fail in different ways are taken together. Hartigan's dip test asks whether any unimodal
    distribution fits (Hartigan and Hartigan, *The dip test of unimodality*, 1985; p-value by its published table); it
    misses a small second mode. Ashman's D, ``sqrt(2) |m1 - m2| / sqrt(s1^2 + s2^2)``, says how far apart the two
    components of a Gaussian mixture are (Ashman, Bird and Zepf, *Detecting bimodality in astronomical datasets*,
    1994); for flat distributions it is large without any second mode, and for few values by chance: D counts only
    above 2 and above what 5 % of as many draws from one Gaussian exceed (4.8 for 20 values, 2.3 for 400; below 2 from
    some 600 on). The mixture is fitted by
    expectation maximisation from Otsu's classes: classes cut at a threshold would have D > 2 for any data at all,
    since cutting takes away their tails.

    A token counts once. Visual tokens before the question are the same for all questions about an image in a causal
    model, and a token that is a sink in many layers contributes alike in them: taken for independent, such repeats
    would make modes of single tokens. The value of a token is therefore the median of its log C over the questions
    about its image, and in the row for all layers over layers too. Different tokens of one image are taken for
    independent, as the dip test has it.

    Args:
        sinks: the whole table, as :func:`classify_sinks` returned it, with its ``.attrs``.
        groups: sample id to a key of its images, the same for samples that show the same ones (see
            :func:`role_stability`); without it, every sample stands alone.

    Returns:
        One row per layer from 2 on, then one for all layers together (``layer`` -1): ``n`` sinks looked at,
        ``n_left_out`` (C is 0, or there is nothing to compare with), ``n_tokens`` (different tokens among the ``n``,
        each one value of the tests), ``dip``, ``dip_p``, ``ashman_d``, ``ashman_d_needed`` (see above), and
        ``verdict``: "bimodal" (dip_p < 0.05 and D above what is needed), "unimodal" (neither), "unclear" (one of
        them), or "too few" (fewer than 20 tokens, with the measures NaN). The row for all layers looks at
        log (C / median C of the other
        visual tokens of the same sample and layer), since the scale of C changes from layer to layer.

    Raises:
        CapaProbeError: the table is not what :func:`classify_sinks` returned, or only some of its rows; or
            ``groups`` is no mapping to keys.
    """
    n_layers = len(check_whole(sinks, "sink_bimodality"))
    layer, own = sinks["layer"].to_numpy(), sinks["contribution"].to_numpy(np.float64)
    others = sinks[OTHERS].to_numpy(np.float64)
    relative = np.divide(own, others, out=np.zeros(len(own)), where=others > 0)  # NaN is not above 0
    token = distinct_tokens(sinks, groups)
    rows = [_row(at, own[layer == at], token[layer == at]) for at in range(FIRST_LAYER, n_layers)]
    table = pd.DataFrame([*rows, _row(ALL_LAYERS, relative, token)])
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


def needed_d(n: int) -> float:
    """D above which n values have two components: at least 2, and seldom reached by draws from one Gaussian."""
    sizes = list(ONE_GAUSSIAN)
    return max(SEPARATE, float(np.interp(math.log(n), np.log(sizes), list(ONE_GAUSSIAN.values()))))


def _row(layer: int, contribution: NDArray[np.float64], token: NDArray[np.int64]) -> dict[str, object]:
    """A row of the table, from the contribution and the token of each sink."""
    known = contribution > 0
    by_token = pd.Series(np.log(contribution[known])).groupby(token[known])
    logs: NDArray[np.float64] = np.asarray(by_token.median(), dtype=np.float64)
    dip = p = d = needed = math.nan
    verdict = "too few"
    if len(logs) >= MIN_TOKENS:
        with warnings.catch_warnings():
            # Beyond its table the test uses the largest tabulated size, where sqrt(n) * dip has reached its limit.
            warnings.filterwarnings("ignore", message="Sample size exceeds")
            dip, p = (float(value) for value in diptest(logs))
        d, needed = ashman_d(logs), needed_d(len(logs))
        signs = (p < DIP_ALPHA) + (d > needed)  # NaN is not above it
        verdict = ("unimodal", "unclear", "bimodal")[signs]
    return {
        "layer": layer,
        "n": int(known.sum()),
        "n_left_out": int((~known).sum()),
        "n_tokens": len(logs),
        "dip": dip,
        "dip_p": p,
        "ashman_d": d,
        "ashman_d_needed": needed,
        "verdict": verdict,
    }

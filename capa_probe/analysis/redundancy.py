"""FFN redundancy: in which layers does the FFN leave the direction of visual tokens as it was?"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.analysis.spread import token_spread
from capa_probe.errors import CapaProbeError
from capa_probe.schema import QUANTILES
from capa_probe.tables import LayerProfile

#: The paper's threshold on the mean FFN cosine of visual tokens (CAPA).
ETA = 0.96
#: Bootstrap resamples of an interval.
N_RESAMPLES = 2000
#: Resampled counts held at once (8 bytes each).
_COUNTS_AT_ONCE = 2**22


def redundant_layers(
    prof: LayerProfile, eta: float = ETA, confidence: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Mean FFN cosine of visual and text tokens in every layer, and the layers where the FFN is redundant.

    The cosine is ``cos(x, x + FFN(norm(x)))`` with ``x`` the residual stream entering the FFN block, averaged over
    all visual (or text) tokens of the prompts, so that a sample counts by its number of tokens (CAPA, arXiv
    2602.00247). Where the text tokens' cosine is above eta too, the layer says nothing particular about visual tokens.

    Args:
        prof: a profile with any token rows, or none: means and intervals come from its layers table.
        eta: a layer is redundant where the mean cosine of visual tokens is above it; between -1 and 1.
        confidence: of the intervals, between 0 and 1.
        seed: of the bootstrap.

    Returns:
        One row per layer: ``layer``; ``visual_cosine`` with its interval ``visual_low``, ``visual_high``; the
        quantiles ``visual_p05``, ``visual_p50``, ``visual_p95`` of single visual tokens and ``visual_share_above``,
        the share of them whose own cosine is above eta; the same of text tokens in ``text_cosine``, ``text_low``
        and so on; ``n_samples``, ``n_visual``, ``n_text`` (tokens); ``redundant`` (visual > eta) and
        ``visual_only`` (visual > eta >= text). Intervals are percentile bootstrap intervals over samples, since
        tokens of one sample are not independent; NaN where fewer than two samples have tokens of that kind.
        Quantiles and shares are NaN where the profile kept no rows of such tokens.

    Raises:
        CapaProbeError: ``eta``, ``confidence`` or ``seed`` out of range, no visual token, or a missing cosine.
    """
    _check(eta, confidence, seed)
    table = prof.layers
    table = table.loc[
        table["step"] == 0, ["sample", "layer", "kind", "n_tokens", "ffn_cosine_mean"]
    ].reset_index(drop=True)
    if not bool((table["kind"] == "visual").any()):
        raise CapaProbeError(
            "redundant_layers was given a profile without a visual token; profile samples that have an image."
        )
    missing = table[table["ffn_cosine_mean"].isna()]
    if len(missing):
        first = missing.iloc[0]
        raise CapaProbeError(
            f"ffn_cosine is missing (NaN) for the {first['kind']} tokens of sample {first['sample']!r} at layer "
            f'{first["layer"]}; profile again with "ffn_cosine" among the probes.'
        )

    layers = np.sort(table["layer"].unique())
    result = pd.DataFrame({"layer": layers.astype(np.int32)})
    sizes: dict[str, NDArray[np.int64]] = {}
    for kind in ("visual", "text"):
        tokens, cosines = _by_sample(table[table["kind"] == kind], layers)
        sizes[kind] = tokens.sum(axis=0).astype(np.int64)
        result[f"{kind}_cosine"] = _mean(tokens.sum(axis=0), (tokens * cosines).sum(axis=0))
        low, high = _interval(tokens, cosines, confidence, seed)
        result[f"{kind}_low"], result[f"{kind}_high"] = low, high
        shares, quantiles = token_spread(prof, kind, sizes[kind], layers, eta)
        for name, values in zip(QUANTILES, quantiles, strict=True):
            result[f"{kind}_{name}"] = values
        result[f"{kind}_share_above"] = shares
    result["n_samples"] = table.groupby("layer")["sample"].nunique().loc[layers].to_numpy(np.int64)
    for kind, size in sizes.items():
        result[f"n_{kind}"] = size
    result["redundant"] = result["visual_cosine"] > eta
    result["visual_only"] = result["redundant"] & (result["text_cosine"] <= eta)
    return result


def layer_ranges(layers: Iterable[int]) -> str:
    """Layers as the paper writes them: ``[2, 3, 4, 7]`` becomes ``"2-4 & 7"``, and no layers ``"none"``."""
    runs: list[list[int]] = []
    for layer in sorted({int(layer) for layer in layers}):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return " & ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs) or "none"


def _by_sample(
    table: pd.DataFrame, layers: NDArray[np.int32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Number of tokens and mean cosine, each (sample, layer); 0 where a sample has no such token."""
    sample, names = pd.factorize(table["sample"])
    place = sample, np.searchsorted(layers, table["layer"].to_numpy())
    tokens, cosines = (np.zeros((len(names), len(layers))) for _ in range(2))
    tokens[place] = table["n_tokens"].to_numpy(np.float64)
    cosines[place] = table["ffn_cosine_mean"].to_numpy(np.float64)
    return tokens, cosines


def _interval(
    tokens: NDArray[np.float64], cosines: NDArray[np.float64], confidence: float, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile bootstrap interval of the token-weighted mean, samples drawn with replacement: (layer,) each."""
    n = len(tokens)
    if n < 2:
        unknown = np.full(tokens.shape[1], np.nan)
        return unknown, unknown
    # One stream per kind of token, so that the visual interval does not depend on the text.
    rng = np.random.default_rng(seed)
    weighted = tokens * cosines
    means = []
    at_once = max(1, _COUNTS_AT_ONCE // n)
    for begin in range(0, N_RESAMPLES, at_once):
        size = min(at_once, N_RESAMPLES - begin)
        # How often each sample was drawn is multinomial: a resample is then one row of a matrix product.
        counts = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        means.append(_mean(counts @ tokens, counts @ weighted))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return low, high


def _mean(tokens: NDArray[np.float64], weighted: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(weighted, tokens, out=np.full(tokens.shape, np.nan), where=tokens > 0)


def _check(eta: object, confidence: object, seed: object) -> None:
    for name, value, low, default in (("eta", eta, -1, ETA), ("confidence", confidence, 0, 0.95)):
        number = math.nan
        if isinstance(value, (int, float, np.floating)) and not isinstance(value, bool):
            number = float(value)
        if not low < number < 1:
            raise CapaProbeError(
                f"{name}={value!r} was given; give a number between {low} and 1, such as {default:g}."
            )
    check_seed(seed)


def check_seed(seed: object) -> None:
    """Raise CapaProbeError unless the seed of a bootstrap is a whole number of at least 0."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise CapaProbeError(f"seed={seed!r} was given; give a whole number of at least 0.")

"""How the FFN cosines of single tokens spread around their mean, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.schema import QUANTILES
from capa_probe.tables import LayerProfile

#: Cosines held at once (4 bytes each).
_VALUES_AT_ONCE = 2**25


def token_spread(
    prof: LayerProfile, kind: str, n_tokens: NDArray[np.int64], layers: NDArray[np.int32], eta: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of tokens above eta, and the quantiles of their FFN cosine, at prefill.

    Quantiles over all tokens need all of them at once, so the profile is read once per block of layers that fits.

    Args:
        prof: a profile.
        kind: "visual" or "text".
        n_tokens: (layer,) number of tokens of that kind.
        layers: (layer,) the layers to look at, in rising order.
        eta: threshold on a token's own cosine.

    Returns:
        Shares (layer,) and quantiles (statistic, layer) in the order of ``QUANTILES``, by linear interpolation; NaN
        where the profile kept no rows of such tokens.
    """
    shares = np.full(len(layers), np.nan)
    quantiles = np.full((len(QUANTILES), len(layers)), np.nan)
    if prof.rows == "none" or (kind == "text" and prof.rows == "visual"):
        return shares, quantiles
    for block in _blocks(n_tokens):
        low, high = int(layers[block[0]]), int(layers[block[-1]])
        where = [("step", "==", 0), ("kind", "==", kind), ("layer", ">=", low), ("layer", "<=", high)]
        table = pd.concat(list(prof.read(["layer", "ffn_cosine"], where)), ignore_index=True)
        for layer, own in table.groupby("layer")["ffn_cosine"]:
            at = int(np.searchsorted(layers, int(str(layer))))
            cosines = own.to_numpy(np.float64)
            shares[at] = (cosines > eta).mean()
            quantiles[:, at] = np.quantile(cosines, list(QUANTILES.values()))
    return shares, quantiles


def _blocks(n_tokens: NDArray[np.int64]) -> Iterator[NDArray[np.intp]]:
    """Runs of neighbouring layers whose tokens fit in memory; a layer that does not fit stands alone."""
    before = np.cumsum(n_tokens) - n_tokens
    block = before // _VALUES_AT_ONCE
    for number in np.unique(block):
        yield np.flatnonzero(block == number)

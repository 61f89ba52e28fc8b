"""Layers whose FFN leaves visual tokens as they were (CAPA, arXiv 2602.00247)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.errors import CapaProbeError
from capa_probe.tables import LayerProfile

RESAMPLES = 2000


def redundant_layers(
    prof: LayerProfile, eta: float = 0.96, *, confidence: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """FFN input-output cosine of visual and text tokens, layer by layer, and which layers are redundant.

    The cosine is ``cos(x, x + FFN(norm(x)))`` with x the residual stream between attention and FFN, at prefill,
    averaged over tokens. Where it is above eta for text tokens too, the layer says nothing particular about visual
    ones.

    Args:
        prof: a profile; its layers table suffices.
        eta: threshold on the visual tokens' mean cosine.
        confidence: of the intervals.
        seed: of the bootstrap over samples (2000 resamples, percentile intervals).

    Returns:
        One row per layer: ``layer``, ``visual_cosine``, ``visual_low``, ``visual_high``, ``text_cosine``, ``text_low``,
        ``text_high``, ``n_samples`` (with visual tokens), ``n_visual``, ``n_text`` (tokens), ``redundant`` (visual
        > eta), ``visual_only`` (visual > eta >= text). Intervals are NaN with a single sample.

    Raises:
        CapaProbeError: eta or the confidence is out of range, or the profile has no visual tokens or no FFN cosine.
    """
    if not -1 < eta < 1:
        raise CapaProbeError(f"eta={eta} was given; give a cosine between -1 and 1, such as 0.96.")
    if not 0 < confidence < 1:
        raise CapaProbeError(
            f"confidence={confidence} was given; give a share between 0 and 1, such as 0.95."
        )
    layers = prof.layers[prof.layers["step"] == 0]
    if not (layers["kind"] == "visual").any():
        raise CapaProbeError(
            "This profile has no visual tokens; profile samples with images to find redundant layers."
        )
    missing = layers[layers["ffn_cosine_mean"].isna()]
    if len(missing):
        row = missing.iloc[0]
        raise CapaProbeError(
            f"ffn_cosine is missing for the {row['kind']} tokens of sample {row['sample']!r} in layer {row['layer']}; "
            "profile again with the default probes."
        )
    table = pd.DataFrame({"layer": np.sort(layers["layer"].unique())})
    counted = {}
    for kind in ("visual", "text"):
        rows = layers[layers["kind"] == kind]
        weights = rows.pivot(index="sample", columns="layer", values="n_tokens").reindex(
            columns=table["layer"]
        )
        means = rows.pivot(index="sample", columns="layer", values="ffn_cosine_mean").reindex(
            columns=table["layer"]
        )
        n = weights.to_numpy(np.float64)
        total = means.to_numpy(np.float64) * n
        table[f"{kind}_cosine"] = _ratio(total.sum(axis=0), n.sum(axis=0))
        low, high = _bootstrap(total, n, confidence, seed)
        table[f"{kind}_low"], table[f"{kind}_high"] = low, high
        counted[f"n_{kind}"] = n.sum(axis=0).astype(np.int64)
        if kind == "visual":
            counted["n_samples"] = np.full(len(table), len(n))
    for name in ("n_samples", "n_visual", "n_text"):
        table[name] = counted[name]
    table["redundant"] = table["visual_cosine"] > eta
    table["visual_only"] = table["redundant"] & (table["text_cosine"] <= eta)
    table.attrs = {"eta": eta, "confidence": confidence, "seed": seed}
    return table


def layer_ranges(layers: Iterable[int]) -> str:
    """Layers in words: ``[2, 3, 4, 7]`` gives "2-4, 7", none gives "none"."""
    numbers = sorted({int(layer) for layer in layers})
    if not numbers:
        return "none"
    starts = [numbers[0], *(b for a, b in pairwise(numbers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(numbers) if b != a + 1), numbers[-1]]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _bootstrap(
    total: NDArray[np.float64], n: NDArray[np.float64], confidence: float, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile interval of the token-weighted mean when samples are drawn anew; (sample, layer) to (layer,)."""
    if len(total) < 2:
        nothing = np.full(total.shape[1], np.nan)
        return nothing, nothing
    rng = np.random.default_rng(seed)
    # How often each sample is drawn is all that matters: (resample, sample) counts.
    counts = rng.multinomial(len(total), np.full(len(total), 1 / len(total)), size=RESAMPLES)
    means = _ratio(counts @ total, counts @ n)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high


def _ratio(total: NDArray[np.float64], n: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / n

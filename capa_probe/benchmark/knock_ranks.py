"""Do scores rank tokens as their true effects do? Rank agreement within each sample.

- Spearman's rho: Pearson's correlation of the two rankings, ties getting their mean rank.
- Kendall's tau-b (Kendall 1945): concordant less discordant pairs, over the geometric mean of the numbers of pairs that
  are not tied in the one and in the other.
- Recall: of the tokens with the largest effects, the share that is among as many tokens with the largest scores; what
  pruning to that many tokens would keep of them. Ties go to the lower position, as in pruning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import kendalltau, rankdata

from capa_probe.pruning.keep import n_kept

Array = npt.NDArray[np.float64]

STATISTICS = ("spearman", "kendall", "recall")
#: Two tokens are always ranked perfectly, one way or the other.
FEWEST_TOKENS = 3


def agreement(effect: npt.ArrayLike, score: npt.ArrayLike, top: float = 0.25) -> dict[str, float]:
    """Spearman's rho, Kendall's tau-b and the recall of the largest effects, for the tokens of one sample.

    Args:
        effect: (token,) in order of position.
        score: (token,).
        top: share of the tokens whose effects are the largest ones.

    Returns:
        One number per statistic; all NaN where nothing can be judged: a constant effect or score, a NaN among them, or
        fewer than three tokens.
    """
    x, y = np.asarray(effect, dtype=np.float64), np.asarray(score, dtype=np.float64)
    if len(x) < FEWEST_TOKENS or bool(np.isnan(x).any() or np.isnan(y).any()) or _constant(x) or _constant(y):
        return dict.fromkeys(STATISTICS, math.nan)
    n = n_kept(float(top), len(x))
    return {
        "spearman": _pearson(rankdata(x), rankdata(y)),
        "kendall": float(kendalltau(x, y, method="asymptotic").statistic),
        "recall": len(np.intersect1d(_largest(x, n), _largest(y, n))) / n,
    }


def correlate(
    tokens: pd.DataFrame,
    images: Mapping[str, str],
    effects: Sequence[str],
    scores: Sequence[str],
    top: float = 0.25,
) -> pd.DataFrame:
    """Agreement of every score with every effect, in each sample and layer.

    Args:
        tokens: one row per knocked-out token, with columns sample, task, layer, scored_at, position, the effects and
            the scores.
        images: sample id to a key that samples of the same images share.
        effects: names of effect columns.
        scores: names of score columns.
        top: as for :func:`agreement`.

    Returns:
        One row per (sample, layer, scored_at, effect, score): sample, task, image, layer, scored_at, effect, score,
        n_tokens, spearman, kendall, recall; NaN where nothing can be judged.
    """
    keys = ["sample", "task", "layer", "scored_at"]
    rows: list[dict[Any, Any]] = []
    for values, group in tokens.groupby(keys, sort=False):
        own = group.sort_values("position")
        place = dict(zip(keys, values, strict=True))
        place["image"] = images[str(place["sample"])]
        rows += [
            {**place, "effect": effect, "score": score, "n_tokens": len(own)}
            | agreement(own[effect].to_numpy(), own[score].to_numpy(), top)
            for effect in effects
            for score in scores
        ]
    names = ["sample", "task", "image", "layer", "scored_at", "effect", "score", "n_tokens", *STATISTICS]
    return pd.DataFrame(rows, columns=names)


def _constant(values: Array) -> bool:
    return bool((values == values[0]).all())


def _pearson(x: Array, y: Array) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def _largest(values: Array, n: int) -> npt.NDArray[np.intp]:
    return np.argsort(-values, kind="stable")[:n]

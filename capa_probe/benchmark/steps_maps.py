"""How far contribution maps of one sample differ from one generation step to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from capa_probe.benchmark.knock_ranks import agreement

Array = npt.NDArray[np.float64]

#: With which step's map a map is compared: that of the step before, or of the prompt, by which CAPA prunes.
AGAINST = ("previous", "prefill")
MEASURES = ("hellinger", "spearman", "overlap")


def map_distance(before: npt.ArrayLike, after: npt.ArrayLike, top: float = 0.25) -> dict[str, float]:
    """Compare two contribution maps over the same visual tokens.

    Each map is divided by its sum, ``p[i] = C[i] / sum_j C[j]``, which makes it a distribution over visual tokens.

    Args:
        before: (token,) contributions.
        after: (token,) contributions at another step.
        top: share of the tokens that pruning keeps.

    Returns:
        hellinger: ``sqrt(1/2 sum_i (sqrt p[i] - sqrt q[i])^2)``, in [0, 1]; NaN where a map is all zero.
        spearman: rank correlation; NaN where a map is constant.
        overlap: share of the top tokens that are top in both; ``top`` is what chance gives. NaN likewise.
    """
    x, y = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    hellinger = math.nan
    if x.sum() > 0 and y.sum() > 0:
        p, q = x / x.sum(), y / y.sum()
        hellinger = min(1.0, float(np.linalg.norm(np.sqrt(p) - np.sqrt(q)) / math.sqrt(2)))
    ranks = agreement(x, y, top)
    return {"hellinger": hellinger, "spearman": ranks["spearman"], "overlap": ranks["recall"]}


def compare_maps(
    tokens: pd.DataFrame, of: Mapping[str, Mapping[str, Any]], top: float = 0.25
) -> pd.DataFrame:
    """Compare the contribution maps of all generation steps with those before them, layer by layer.

    Args:
        tokens: rows of a profile with decode steps: sample, step, layer, position, kind, contribution.
        of: by sample id, what to write into its rows, such as its task.
        top: as for :func:`map_distance`.

    Returns:
        One row per (sample, layer, step, against), step from 1: against "previous", the step before, or "prefill",
        step 0; then hellinger, spearman and overlap.
    """
    visual = tokens[tokens["kind"] == "visual"]
    rows: list[dict[str, Any]] = []
    groups: Any = visual.groupby(["sample", "layer"], sort=False, observed=True)
    for (sample, layer), own in groups:
        wide = own.pivot(index="position", columns="step", values="contribution").sort_index()
        maps = wide.to_numpy(np.float64).T
        for step in range(1, len(maps)):
            for against, other in zip(AGAINST, (step - 1, 0), strict=True):
                place = {
                    "sample": sample,
                    **of[sample],
                    "layer": int(layer),
                    "step": step,
                    "against": against,
                }
                rows.append(place | map_distance(maps[other], maps[step], top))
    named = list(next(iter(of.values()), {}))
    return pd.DataFrame(rows, columns=["sample", *named, "layer", "step", "against", *MEASURES])

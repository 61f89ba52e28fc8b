"""The layers table: token rows, summarised by sample, step, layer and kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.schema import GROUP_COLUMNS, LAYER_SCHEMA, MEASURES, QUANTILES, STATISTICS


def summarise_layers(tokens: pd.DataFrame) -> pd.DataFrame:
    """Mean and quantiles of every measure over the tokens of each (sample, step, layer, kind).

    Args:
        tokens: token rows in any order, with the columns of ``TOKEN_SCHEMA``.

    Returns:
        One row per group, in the order in which the groups first appear, with the columns of ``LAYER_SCHEMA``. NaN
        is skipped; a group without a value gives NaN. Quantiles interpolate linearly, as ``numpy.quantile`` does.
    """
    if tokens.empty:
        return LAYER_SCHEMA.empty_table().to_pandas()
    keys = tokens[list(GROUP_COLUMNS)]
    group = keys.groupby(list(GROUP_COLUMNS), sort=False, observed=True).ngroup().to_numpy()
    sizes = np.bincount(group)
    by_group = np.argsort(group, kind="stable")
    starts = np.cumsum(sizes) - sizes
    values = np.stack([tokens[name].to_numpy(np.float32) for name in MEASURES])

    statistics = np.full((len(MEASURES), len(STATISTICS), len(sizes)), np.nan, dtype=np.float32)
    # Groups of one size form a block, so that one sort serves all of them and every measure.
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        block = values[:, by_group[starts[same, None] + np.arange(size)]]  # (measure, group, token)
        statistics[:, :, same] = _statistics(block)

    table = keys.iloc[by_group[starts]].reset_index(drop=True)
    columns: dict[str, Any] = {"n_tokens": sizes.astype(np.int32)}
    for measure, rows in zip(MEASURES, statistics, strict=True):
        columns |= {f"{measure}_{stat}": row for stat, row in zip(STATISTICS, rows, strict=True)}
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def _statistics(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """(measure, group, token) to (measure, statistic, group)."""
    ordered = np.sort(block, axis=-1)  # NaN goes last
    known = ~np.isnan(ordered)
    count = known.sum(axis=-1)
    with np.errstate(invalid="ignore"):
        mean = np.where(known, ordered, 0).sum(axis=-1, dtype=np.float64) / count
    found = [mean]
    for quantile in QUANTILES.values():
        place = quantile * np.maximum(count - 1, 0)
        below = np.floor(place).astype(np.intp)
        above = np.minimum(below + 1, np.maximum(count - 1, 0))
        low, high = (
            np.take_along_axis(ordered, index[..., None], axis=-1)[..., 0].astype(np.float64)
            for index in (below, above)
        )
        found.append(low + (high - low) * (place - below))
    return np.stack(found, axis=1).astype(np.float32)

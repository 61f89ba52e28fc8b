"""The layers table: token rows, summarised by sample, step, layer and kind."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from capa_probe.schema import GROUP_COLUMNS, LAYER_SCHEMA, MEASURES, QUANTILES, STATISTICS


def summarise_layers(tokens: pa.Table) -> pa.Table:
    """Mean and quantiles of every measure over the tokens of each (sample, step, layer, kind).

    Args:
        tokens: token rows in any order, with the columns of ``TOKEN_SCHEMA``.

    Returns:
        One row per group, in the order in which the groups first appear, with the columns of ``LAYER_SCHEMA``. NaN
        and null are skipped; a group without a value gives null. Quantiles interpolate linearly, as
        ``numpy.quantile`` does.
    """
    if not len(tokens):
        return LAYER_SCHEMA.empty_table()
    group = _groups(tokens)
    sizes = np.bincount(group)
    by_group = np.argsort(group, kind="stable")
    starts = np.cumsum(sizes) - sizes
    values = np.stack([tokens[name].to_numpy().astype(np.float32, copy=False) for name in MEASURES])

    statistics = np.full((len(MEASURES), len(STATISTICS), len(sizes)), np.nan, dtype=np.float32)
    # Groups of one size form a block, so that one sort serves all of them and every measure.
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        block = values[:, by_group[starts[same, None] + np.arange(size)]]  # (measure, group, token)
        statistics[:, :, same] = _statistics(block)

    keys = tokens.select(GROUP_COLUMNS).take(pa.array(by_group[starts]))
    columns = [*(column.combine_chunks() for column in keys.columns), pa.array(sizes.astype(np.int32))]
    columns += [pa.array(row, from_pandas=True) for rows in statistics for row in rows]
    return pa.Table.from_arrays(columns, schema=LAYER_SCHEMA)


def _groups(tokens: pa.Table) -> NDArray[np.intp]:
    """The group of each row, numbered in the order of their first rows."""
    key = np.zeros(len(tokens), dtype=np.int64)
    for name in GROUP_COLUMNS:
        column = tokens[name].combine_chunks()
        if pa.types.is_string(column.type):
            column = column.dictionary_encode().indices
        numbers = column.to_numpy(zero_copy_only=False).astype(np.int64)
        key = key * (int(numbers.max()) + 1) + numbers
    group, _ = pd.factorize(key)  # hashes, where numpy.unique would sort
    return group


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

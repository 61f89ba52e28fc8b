"""Means over samples with intervals, for every combination of some keys."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pandas as pd

from capa_probe.benchmark.statistics import mean_interval
from capa_probe.benchmark.summary import per_task


def means(
    rows: pd.DataFrame,
    keys: Sequence[str],
    measures: Sequence[str],
    proportions: Collection[str] = (),
    seed: int = 0,
) -> pd.DataFrame:
    """Mean of each measure over samples, with its 95 % interval, over all tasks and within each.

    Args:
        rows: one per sample and combination of keys, with columns ``task`` and ``image``, what samples of the same
            images share.
        keys: columns to group by.
        measures: columns; NaN where a sample has none.
        proportions: those of them that are 0 or 1 in each sample.
        seed: of the intervals.

    Returns:
        The keys, task ("all", or one), n samples with a value and n_not_judged without, by the first measure, n_images,
        and for each measure its mean, ``<measure>_low`` and ``<measure>_high``; sorted by task and keys, words in the
        order in which they come.
    """
    ends = [name + end for name in measures for end in ("", "_low", "_high")]
    found = []
    for task, own in per_task(rows):
        for values, group in own.groupby(list(keys), sort=False):
            missing = int(group[measures[0]].isna().sum())
            row = {**dict(zip(keys, values, strict=True)), "task": task}
            row |= {"n": len(group) - missing, "n_not_judged": missing, "n_images": group["image"].nunique()}
            for measure in measures:
                interval = mean_interval(
                    group[measure], group["image"], seed, proportion=measure in proportions
                )
                row |= {
                    measure: interval.mean,
                    f"{measure}_low": interval.low,
                    f"{measure}_high": interval.high,
                }
            found.append(row)
    frame = pd.DataFrame(found, columns=[*keys, "task", "n", "n_not_judged", "n_images", *ends])
    return frame.sort_values(["task", *keys], key=_order, kind="stable", ignore_index=True)


def _order(column: pd.Series[Any]) -> Any:
    return column if pd.api.types.is_numeric_dtype(column) else pd.factorize(column)[0]

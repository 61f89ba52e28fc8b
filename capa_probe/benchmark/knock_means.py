"""Means over samples with intervals, and paired tests between two columns, for every combination of some keys."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from capa_probe.benchmark.statistics import Interval, holm, mean_interval, paired_difference

#: What stands in the column ``task`` where all samples are taken together.
ALL = "all"


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
        proportions: those of them that are 0 or 1, for which all being equal does not mean that nothing varies.
        seed: of the intervals.

    Returns:
        task ("all", or one), the keys, n samples with a value and n_not_judged without, by the first measure, and for
        each measure its mean, ``<measure>_low`` and ``<measure>_high``; sorted by task and keys, words in the order in
        which they come.
    """
    ends = [name + end for name in measures for end in ("", "_low", "_high")]
    found = []
    for task, own in _by_task(rows):
        for values, group in own.groupby(list(keys), sort=False):
            missing = int(group[measures[0]].isna().sum())
            row = {"task": task, **dict(zip(keys, values, strict=True))}
            row |= {"n": len(group) - missing, "n_not_judged": missing}
            for measure in measures:
                interval = _interval(group, measure, measure in proportions, seed)
                row |= {
                    measure: interval.mean,
                    f"{measure}_low": interval.low,
                    f"{measure}_high": interval.high,
                }
            found.append(row)
    frame = pd.DataFrame(found, columns=["task", *keys, "n", "n_not_judged", *ends])
    return _sorted(frame, ["task", *keys])


def differences(
    rows: pd.DataFrame,
    keys: Sequence[str],
    between: str,
    first: str,
    measures: Sequence[str],
    family: Sequence[str],
    seed: int = 0,
) -> pd.DataFrame:
    """One value of a column against every other, paired over samples, over all tasks.

    Args:
        rows: as for :func:`means`; a sample's rows of one combination are averaged.
        keys: columns to group by.
        between: the column whose values are compared.
        first: the value that is compared with all others.
        measures: columns.
        family: of the result's columns, those whose combinations are tested together, for Holm's correction.
        seed: of the intervals and tests.

    Returns:
        One row per combination, measure and other value: the keys, measure, first, second, difference (mean of first
        less second), low, high, n, n_images, p of the sign-flip test, and p_holm.
    """
    found = []
    for values, group in rows.groupby(list(keys), sort=False):
        image = group.drop_duplicates("sample").set_index("sample")["image"]
        for measure in measures:
            wide = group.pivot_table(index="sample", columns=between, values=measure, dropna=False)
            wide = wide.reindex(index=image.index)
            for second in group[between].unique():
                if second == first:
                    continue
                pair = paired_difference(
                    wide[first].to_numpy(), wide[second].to_numpy(), image.to_numpy(), seed
                )
                row = dict(zip(keys, values, strict=True))
                row |= {"measure": measure, "first": first, "second": second, "difference": pair.mean}
                row |= {"low": pair.low, "high": pair.high, "n": pair.n, "n_images": pair.n_clusters}
                found.append(row | {"p": pair.p})
    names = ["measure", "first", "second", "difference", "low", "high", "n", "n_images", "p"]
    tests = pd.DataFrame(found, columns=[*keys, *names])
    tests["p_holm"] = tests.groupby(list(family), sort=False)["p"].transform(lambda p: holm(p.to_numpy()))
    return tests


def _by_task(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    yield ALL, rows
    if rows["task"].nunique() > 1:
        for task, own in rows.groupby("task", sort=False):
            yield str(task), own


def _interval(group: pd.DataFrame, measure: str, proportion: bool, seed: int) -> Interval:
    values = group[measure].to_numpy(np.float64)
    there = values[~np.isnan(values)]
    interval = mean_interval(values, group["image"].to_numpy(), seed)
    if len(there) and not proportion and bool((there == there[0]).all()):
        same = float(there[0])  # Wilson's interval is one of proportions
        return Interval(same, same, same, interval.n, interval.n_clusters)
    return interval


def _sorted(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    def order(column: pd.Series[Any]) -> Any:
        return column if pd.api.types.is_numeric_dtype(column) else pd.factorize(column)[0]

    return frame.sort_values(list(keys), key=order, kind="stable", ignore_index=True)

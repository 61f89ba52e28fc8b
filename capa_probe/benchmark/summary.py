"""From the per-sample rows of cells to tidy summaries and paired tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from capa_probe.benchmark.cells import MEASURES
from capa_probe.benchmark.statistics import holm, mean_interval, paired_difference

#: Measures that are shares of samples.
PROPORTIONS = ("correct", "agrees")
#: Stands for all tasks together.
ALL = "all"
_PLAIN = ("n_visual", "n_kept", "flops", "seconds")
_KEYS = ["sample", "task", "image"]


def over_draws(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """One row per condition and sample: the mean over repeated random draws, which are no independent samples."""
    numbers = [name for name in (*MEASURES, *_PLAIN) if name in rows]
    return rows.groupby([*by, *_KEYS], sort=False, dropna=False)[numbers].mean().reset_index()


def summarise(rows: pd.DataFrame, by: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """Means with intervals per condition, for all tasks together and for each.

    Args:
        rows: one per condition and sample (see :func:`over_draws`).
        by: columns of the condition.
        seed: of the bootstrap.

    Returns:
        The condition, ``task`` ("all", then each), ``n`` samples, ``n_images``; of each measure its mean under its own
        name, with ``_low`` and ``_high``; and the means of ``n_visual``, ``n_kept``, ``flops`` and ``seconds``.
    """
    plain = [name for name in _PLAIN if name in rows]
    measures = [name for name in MEASURES if name in rows]
    found = []
    for condition, own in _groups(rows, by):
        for task, part in per_task(own):
            record = {**condition, "task": task, "n": len(part), "n_images": part["image"].nunique()}
            for measure in measures:
                of = mean_interval(part[measure], part["image"], seed, proportion=measure in PROPORTIONS)
                record |= {measure: of.mean, f"{measure}_low": of.low, f"{measure}_high": of.high}
            found.append(record | {name: part[name].mean() for name in plain})
    statistics = [f"{measure}{end}" for measure in measures for end in ("", "_low", "_high")]
    return pd.DataFrame(found, columns=[*by, "task", "n", "n_images", *statistics, *plain])


def compare(
    rows: pd.DataFrame,
    by: Sequence[str],
    which: str,
    pairs: Sequence[tuple[str, str]],
    measures: Sequence[str] = MEASURES,
    seed: int = 0,
) -> pd.DataFrame:
    """Paired tests of pairs of conditions, on the samples that both have.

    Args:
        rows: one per condition and sample.
        by: columns within whose groups the two are compared.
        which: column that names the two.
        pairs: its two values; the difference is first minus second.
        measures: what to compare.
        seed: of bootstrap and test.

    Returns:
        ``by``, ``first``, ``second``, ``task``, ``measure``, ``n``, ``n_images``, ``mean_first``, ``mean_second``,
        ``difference`` with ``low`` and ``high``, ``p``, and ``p_holm``: corrected over all tests of one task and
        measure.
    """
    found = []
    for condition, own in _groups(rows, by):
        for first, second in pairs:
            a, b = (own[own[which] == name].set_index("sample") for name in (first, second))
            common = a.index.intersection(b.index, sort=False)
            for task, part in per_task(a.loc[common]):
                for measure in measures:
                    x, y = part[measure], b.loc[part.index, measure]
                    tested = paired_difference(x, y, part["image"], seed, proportion=measure in PROPORTIONS)
                    both = x.notna() & y.notna()
                    found.append(
                        {
                            **condition,
                            "first": first,
                            "second": second,
                            "task": task,
                            "measure": measure,
                            "n": tested.n,
                            "n_images": tested.n_clusters,
                            "mean_first": x[both].mean(),
                            "mean_second": y[both].mean(),
                            "difference": tested.mean,
                            "low": tested.low,
                            "high": tested.high,
                            "p": tested.p,
                        }
                    )
    names = ["mean_first", "mean_second", "difference", "low", "high", "p"]
    head = [*by, "first", "second", "task", "measure", "n", "n_images"]
    table = pd.DataFrame(found, columns=[*head, *names])
    return corrected(table)


def corrected(tests: pd.DataFrame) -> pd.DataFrame:
    """A table of tests with ``p_holm``: corrected over all tests of one task and measure."""
    adjusted = pd.Series(float("nan"), index=tests.index)
    for _, own in tests.groupby(["task", "measure"], sort=False):
        adjusted[own.index] = holm(own["p"])
    return tests.assign(p_holm=adjusted)


def per_task(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """All rows, as task "all"; then, where there are several tasks, those of each."""
    yield ALL, rows
    tasks = rows["task"].unique()
    if len(tasks) > 1:
        for task in sorted(tasks):
            yield str(task), rows[rows["task"] == task]


def notes(*sentences: str) -> pd.DataFrame:
    """A table of remarks."""
    return pd.DataFrame({"note": list(sentences)}, dtype=object)


def _groups(rows: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    if not by:
        yield {}, rows
        return
    for values, own in rows.groupby(list(by), sort=False, dropna=False):
        yield dict(zip(by, values, strict=True)), own

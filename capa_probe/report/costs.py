"""What keeping a quarter of the visual tokens costs, as far as the runs of confirm and depth say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from capa_probe.benchmark.summary import ALL

#: The share of the visual tokens that the headline is about.
KEEP = 0.25
#: What the headline takes them by.
SCORE = "contribution"
_SAME = 1e-9
#: Measure to what is lost, in words.
_LOST = {"correct": "accuracy", "agrees": "agreement with the model's own answers"}


@dataclass(frozen=True)
class Cost:
    """What pruning before one layer changes.

    Attributes:
        layer: visual tokens are gone before it.
        change: of the accuracy, pruned minus unpruned; of the agreement where no answers are known.
        low: lower end of its 95 % interval; NaN where there is none.
        high: upper end.
        n: samples.
        measure: "accuracy", or what stands for it.
        source: which kind of run says so.
    """

    layer: int
    change: float
    low: float
    high: float
    n: int
    measure: str
    source: str


def points(change: float) -> str:
    """A change of a share in percentage points, with its sign."""
    value = 100 * change
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")


def costs(tables: Mapping[str, pd.DataFrame]) -> list[Cost]:
    """Pruning to a quarter by contribution, layer by layer; empty where no run measured it.

    Where confirm and depth measured the same layer, confirm's number is taken.

    Args:
        tables: of runs of confirm and depth, by name.
    """
    found: dict[int, Cost] = {}
    for cost in (*_of_together(tables), *_of_depth(tables)):
        found.setdefault(cost.layer, cost)
    return [found[layer] for layer in sorted(found)]


def _of_together(tables: Mapping[str, pd.DataFrame]) -> Iterator[Cost]:
    """Experiment 5 of confirm: pruning alone against the model itself."""
    summary, tests = tables.get("together"), tables.get("together_tests")
    if summary is None or tests is None or summary.empty:
        return
    own = summary[(summary["method"] == "pruning") & (summary["task"] == ALL)]
    for row in _records(own):
        if abs(row["n_kept"] / row["n_visual"] - KEEP) > 0.02:  # confirm was asked for another share
            continue
        test = tests[(tests["first"] == f"pruning {row['stage']}") & (tests["second"] == "vanilla")]
        yield from _cost(test, int(row["layer"]), 1.0, "confirm")


def _of_depth(tables: Mapping[str, pd.DataFrame]) -> Iterator[Cost]:
    """Depth of use: the model itself against what the score keeps."""
    tests = tables.get("depth_kept_tests")
    if tests is None or tests.empty:
        return
    own = tests[
        (tests["first"] == "all") & (tests["second"] == SCORE) & ((tests["keep"] - KEEP).abs() < _SAME)
    ]
    for layer in sorted(own["layer"].unique()):
        yield from _cost(own[own["layer"] == layer], int(layer), -1.0, "depth")


def _cost(tests: pd.DataFrame, layer: int, sign: float, source: str) -> Iterator[Cost]:
    own = tests[tests["task"] == ALL]
    for measure, words in _LOST.items():
        for row in _records(own[(own["measure"] == measure) & (own["n"] > 0)]):
            if math.isnan(row["difference"]):
                continue
            low, high = sorted((sign * row["low"], sign * row["high"]))
            yield Cost(layer, sign * row["difference"], low, high, int(row["n"]), words, source)
            return


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]

"""Tables of what the runs of confirm and depth say of a profile's model."""

from __future__ import annotations

import pandas as pd

from capa_probe.benchmark.claims import FAILS, HOLDS, UNKNOWN
from capa_probe.benchmark.summary import ALL
from capa_probe.report import words
from capa_probe.report.costs import costs, points
from capa_probe.report.listing import Listing, Show, count, listing
from capa_probe.report.runs import ShownRun


def pruning_costs(run: ShownRun) -> Listing | None:
    """What keeping a quarter costs, before each layer that was looked at."""
    table = pd.DataFrame([vars(cost) for cost in costs(run.tables)])
    if table.empty:
        return None
    ends = ["change", "low", "high"]
    table[ends] = 100 * table[ends]  # a download holds percentage points as well
    return listing(
        "costs",
        "What pruning to 25 % of the visual tokens costs",
        "Percentage points, tokens kept by contribution, against the model itself; with 95 % intervals over samples.",
        table,
        {
            "layer": ("before layer", str),
            "measure": ("measure", str),
            "change": ("change, points", _points),
            "low": ("low", _points),
            "high": ("high", _points),
            "n": ("n", count),
            "source": ("measured by", str),
        },
    )


def budget(run: ShownRun) -> Listing | None:
    """Accuracy at each stage, budget and score, as confirm measured it."""
    table = run.tables.get("budget")
    if table is None:
        return None
    return listing(
        "budget",
        "Accuracy against the tokens that are kept",
        "From capa-probe confirm; all tasks, with 95 % intervals over samples. Random choices are averaged over draws.",
        table[table["task"] == ALL],
        _ACCURACY,
    )


def depth(run: ShownRun) -> Listing | None:
    """Accuracy at each layer, budget and score, as depth measured it."""
    table = run.tables.get("depth_kept")
    if table is None:
        return None
    return listing(
        "depth",
        "Accuracy against the tokens that are kept, by layer",
        "From capa-probe depth; all tasks, with 95 % intervals over samples.",
        table[table["task"] == ALL],
        _ACCURACY,
    )


def claims(run: ShownRun) -> Listing | None:
    """The paper's claims, and whether they hold."""
    table = run.tables.get("claims")
    if table is None:
        return None
    verdicts = table["verdict"].value_counts()
    tally = ", ".join(f"{verdicts[name]} {_VERDICTS[name]}" for name in _VERDICTS if name in verdicts)
    return listing(
        "claims",
        "Claims of the paper on this model" + (f": {tally}" if tally else ""),
        "From capa-probe confirm, on its own questions; it tells sinks as above, among these questions.",
        table,
        {
            "claim": ("claim", str),
            "where": ("where", str),
            "verdict": ("verdict", str),
            "numbers": ("numbers", str),
        },
    )


#: In a tally.
_VERDICTS = {HOLDS: "hold", FAILS: "do not hold", UNKNOWN: "cannot be judged"}


def _points(value: float) -> str:
    return points(value / 100)


def _share(value: float) -> str:
    return f"{value:.3f}"


_ACCURACY: dict[str, tuple[str, Show]] = {
    "stage": ("stage", str),
    "layer": ("before layer", str),
    "keep": ("kept", words.percent),
    "score": ("kept by", lambda name: str(name).replace("_", " ")),
    "correct": ("accuracy", _share),
    "correct_low": ("low", _share),
    "correct_high": ("high", _share),
    "agrees": ("same answer", _share),
    "n": ("n", count),
}

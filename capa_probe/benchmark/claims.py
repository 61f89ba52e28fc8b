"""What the paper claims, and whether it holds on the model at hand: a table from the tables of the experiments.

Every verdict follows from a rule:

- *A harms less than B* (a distance between next-token distributions): **holds** if the mean difference A - B is below
  0 and its sign-flip p-value is below 0.05, **does not hold** if it is above 0 with p below 0.05. p is always the
  table's own ``p_holm``: corrected over all tests of the same table, task and measure (of knock-outs, of the same
  reading and effect; of accuracy against budget, the averages over all stages and budgets are a table of their own).
  Otherwise it **cannot be judged**: no difference was found, which with few samples, or where everything harms next to
  nothing, says little.
- *X costs no accuracy worth naming* (2 points): **holds** if the 95 % interval of the change lies above -0.02, **does
  not hold** if it lies below -0.02; otherwise it cannot be judged.
- *X saves Y*: **holds** or **does not hold** by the number itself, with its interval where it is measured.
- *X ranks tokens better than Y* (by the correlation with their true effect, over samples): like the first.

Nothing is judged on fewer than 10 samples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import pandas as pd

Verdict: TypeAlias = Literal["holds", "does not hold", "cannot be judged"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold"
UNKNOWN: Verdict = "cannot be judged"

LEVEL, MARGIN, FEWEST = 0.05, 0.02, 10
#: What CAPA saves of the paper's own models at their early layers, as it counts: 74.4 to 78.0 %.
SAVING = 0.74


class Claim(NamedTuple):
    """One row of the table.

    Attributes:
        experiment: number in the registry.
        claim: what the paper says, in a sentence.
        where: stage, layer or comparison that it was looked at for.
        verdict: whether it holds.
        numbers: those that decide.
        difference: the one that decides, where it is a difference: the first minus the second; NaN elsewhere.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    experiment: int
    claim: str
    where: str
    verdict: Verdict
    numbers: str
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan


Tables: TypeAlias = Mapping[str, pd.DataFrame]


def judge(tables: Tables) -> pd.DataFrame:
    """The claims that can be looked at with these tables; those of experiments that have not been run are left out."""
    found = [claim for of in _CLAIMS for claim in of(tables)]
    return pd.DataFrame(found, columns=list(Claim._fields))


# -- rules


def harms_less(row: Mapping[str, Any], flip: bool = False) -> Verdict:
    """The first rule, on a row of a tests table with ``difference``, ``n`` and ``p_holm``.

    ``flip``: the claim is that the first harms more, or ranks better.
    """
    if row["n"] < FEWEST or not row["p_holm"] < LEVEL:
        return UNKNOWN
    return HOLDS if (row["difference"] < 0) != flip else FAILS


def costs_nothing(row: Mapping[str, Any]) -> Verdict:
    """The second rule, on a row of a tests table of ``correct``: against the model itself, or as many other tokens."""
    if row["n"] < FEWEST or math.isnan(row["low"]):
        return UNKNOWN
    if row["low"] > -MARGIN:
        return HOLDS
    return FAILS if row["high"] < -MARGIN else UNKNOWN


def _said(row: Mapping[str, Any], what: str, digits: int = 4, p: bool = True) -> str:
    """The numbers of a test."""
    first, second, *ends = (
        f"{row[name]:{sign}.{digits}f}"
        for name, sign in (
            ("mean_first", ""),
            ("mean_second", ""),
            ("difference", "+"),
            ("low", "+"),
            ("high", "+"),
        )
    )
    of = f", p = {row['p_holm']:.4f}" if p else ""
    between = "" if math.isnan(row["low"]) else f" [{ends[1]}, {ends[2]}]"  # one image has no interval
    return f"{what} {first} against {second}, difference {ends[0]}{between}{of}, n = {row['n']}"


def shortened(numbers: str) -> tuple[str, str]:
    """What differs ("" where nothing is compared), and the numbers of a claim without the means: difference, p, n."""
    compared = re.fullmatch(r"(.+?) \S+ against \S+, difference (.+)", numbers)
    return (compared[1], compared[2].replace(" = ", " ")) if compared else ("", numbers)


def _accuracy(row: Mapping[str, Any]) -> str:
    """The numbers of a test of the second kind, which goes by the interval alone."""
    return _said(row, "accuracy", 3, p=False)


def _interval(row: Mapping[str, Any]) -> tuple[float, float, float]:
    return row["difference"], row["low"], row["high"]


def _compared(
    tests: pd.DataFrame,
    number: int,
    claim: str,
    where: Callable[[Mapping[str, Any]], str],
    flip: bool = False,
    what: str = "Hellinger distance",
    digits: int = 5,
) -> Iterator[Claim]:
    """A claim of the first kind, once for each row."""
    for row in _rows(tests):
        yield Claim(
            number, claim, where(row), harms_less(row, flip), _said(row, what, digits), *_interval(row)
        )


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _swapped(tests: pd.DataFrame) -> pd.DataFrame:
    """The same comparisons with second first."""
    return tests.assign(
        first=tests["second"],
        second=tests["first"],
        mean_first=tests["mean_second"],
        mean_second=tests["mean_first"],
        difference=-tests["difference"],
        low=-tests["high"],
        high=-tests["low"],
    )


def _all(tables: Tables, name: str, measure: str | None = "hellinger") -> pd.DataFrame:
    """Rows of a table for all tasks together, of one measure; empty where there is no such table."""
    table = tables.get(name)
    if table is None or table.empty:
        return pd.DataFrame()
    chosen = table["task"] == "all"
    if measure is not None:
        chosen &= table["measure"] == measure
    return table[chosen]


# -- claims, by experiment


def _dumps_anchors(tables: Tables) -> Iterator[Claim]:
    if "dumps_anchors" not in tables:
        return
    harmless = (
        "Probability Dumps may go: removing them costs no accuracy, beside removing as many others at random"
    )
    harmful = (
        "Structural Anchors carry the answer: removing them harms more than removing as many others at random"
    )
    for role, claim, measure in (("dump", harmless, "correct"), ("anchor", harmful, "hellinger")):
        tests = _all(tables, "dumps_anchors_tests", measure)
        own = tests[(tests["role"] == role) & (tests["second"] == "non_sinks")] if len(tests) else tests
        if own.empty:
            notes = tables["dumps_anchors_notes"]["note"]
            reason = " ".join(note for note in notes if role in note) or " ".join(notes)
            yield Claim(1, claim, "all layers", UNKNOWN, reason)
        elif role == "anchor":
            yield from _compared(own, 1, claim, lambda row: f"layer {row['layer']}", flip=True)
        else:
            for row in _rows(own):
                yield Claim(
                    1, claim, f"layer {row['layer']}", costs_nothing(row), _accuracy(row), *_interval(row)
                )


def _knockout(tables: Tables) -> Iterator[Claim]:
    tests = _all(tables, "knockout_tests", "spearman")
    if tests.empty:
        return
    own = tests[(tests["effect"] == "hellinger") & (tests["scored_at"] == "previous")]
    for second in ("attention", "value_norm", "removal_effect", "random"):
        than = "chance" if second == "random" else f"{second.replace('_', ' ')} does"
        claim = f"Contribution ranks visual tokens by their true effect better than {than}"
        rows = own[own["second"] == second]
        yield from _compared(
            rows, 2, claim, lambda row: f"layer {row['layer']}", flip=True, what="Spearman's rho", digits=3
        )


def _budget(tables: Tables) -> Iterator[Claim]:
    tests = _all(tables, "budget_tests")
    if tests.empty:
        return
    overall = tests[(tests["stage"] == "all") & (tests["n"] > 0)]
    for second, rows in overall.groupby("second", sort=False):
        than = "at random" if second == "random" else f"by {str(second).replace('_', ' ')}"
        claim = f"At the same budget, keeping by contribution harms less than {than}"
        yield from _compared(rows, 3, claim, lambda row: "all stages and budgets")
    at_stages = tests[(tests["stage"] != "all") & (tests["second"] == "random")]
    for stage, rows in at_stages.groupby("stage", sort=False):
        together = rows.iloc[(rows["keep"] - 0.25).abs().argsort()[:1]]
        where = f"{stage}, {together['keep'].iloc[0]:.0%} kept"
        yield from _compared(together, 3, "Contribution chooses better than chance", lambda row: where)  # noqa: B023


def _ffn(tables: Tables) -> Iterator[Claim]:
    tests, between = _all(tables, "ffn_redundancy_tests"), _all(tables, "ffn_redundancy_groups")
    if "ffn_redundancy" not in tables:
        return
    if tests.empty:
        reason = " ".join(tables["ffn_redundancy_notes"]["note"])
        yield Claim(4, "FFNs of redundant layers can be approximated", "all layers", UNKNOWN, reason)
        return
    redundant = tests[(tests["group"] == "redundant") & (tests["first"] == "hadamard")]
    claim = "In redundant layers the Hadamard product harms less than skipping the FFN"
    yield from _compared(
        redundant[redundant["second"] == "skip"], 4, claim, lambda row: f"layers {row['layers']}"
    )
    claim = "The Hadamard product in redundant layers costs no accuracy"
    accuracy = _all(tables, "ffn_redundancy_tests", "correct")
    accuracy = accuracy[(accuracy["group"] == "redundant") & (accuracy["second"] == "full")]
    for row in _rows(accuracy[accuracy["first"] == "hadamard"]):
        yield Claim(4, claim, f"layers {row['layers']}", costs_nothing(row), _accuracy(row), *_interval(row))
    claim = "Skipping the FFN of redundant layers costs accuracy (5 to 10 %)"
    for row in _rows(accuracy[accuracy["first"] == "skip"]):
        opposite: dict[Verdict, Verdict] = {HOLDS: FAILS, FAILS: HOLDS, UNKNOWN: UNKNOWN}
        verdict = opposite[costs_nothing(row)]
        yield Claim(4, claim, f"layers {row['layers']}", verdict, _accuracy(row), *_interval(row))
    if len(between):
        own = between[between["ffn"] == "hadamard"]
        claim = "The Hadamard product harms less in redundant layers than in as many others"
        yield from _compared(own, 4, claim, lambda row: str(row["second"]))


def _together(tables: Tables) -> Iterator[Claim]:
    summary = _all(tables, "together", None)
    if summary.empty:
        return
    tests, times = _all(tables, "together_tests", "correct"), tables["together_time"]
    for row in _rows(summary[summary["method"] == "capa"]):
        stage = row["stage"]
        for test in _rows(tests[tests["first"] == f"capa {stage}"]):
            claim = "CAPA costs no accuracy worth naming"
            yield Claim(5, claim, stage, costs_nothing(test), _accuracy(test), *_interval(test))
        saved, whole = 1 - row["flops_share_as_published"], 1 - row["flops_share"]
        verdict = HOLDS if saved >= SAVING else FAILS
        numbers = f"{saved:.1%} as the paper counts, {whole:.1%} of the whole forward"
        if stage == summary.loc[summary["method"] == "capa", "stage"].iloc[0]:
            yield Claim(5, f"CAPA saves {SAVING:.0%} or more of the decoder's FLOPs", stage, verdict, numbers)
        for time in _rows(times[(times["stage"] == stage) & (times["phase"] == "prefill")]):
            ends = f"[{time['ratio_low']:.3f}, {time['ratio_high']:.3f}]"
            verdict = HOLDS if time["ratio_high"] < 1 else FAILS if time["ratio_low"] > 1 else UNKNOWN
            verdict = verdict if time["n"] >= FEWEST else UNKNOWN
            numbers = f"prefill time {time['ratio']:.3f} {ends} of the model's own, n = {time['n']}"
            yield Claim(5, "CAPA's saving shows in measured time", stage, verdict, numbers)


def _over_steps(tables: Tables) -> Iterator[Claim]:
    own = _all(tables, "over_steps_tests")
    if own.empty:
        return
    names = {
        "attention": "Over the whole answer, pruning by contribution harms less than by attention",
        "random": "Over the whole answer, pruning by contribution harms less than at random",
        "every_step": "Ranking anew at every step harms less than ranking once, at the prompt",
    }
    for second, claim in names.items():
        rows = own[own["second"] == second]
        if second == "every_step":  # CAPA itself comes first in the table
            rows = _swapped(rows)
        yield from _compared(rows, 6, claim, lambda row: str(row["stage"]))


_CLAIMS: tuple[Callable[[Tables], Iterator[Claim]], ...] = (
    _dumps_anchors,
    _knockout,
    _budget,
    _ffn,
    _together,
    _over_steps,
)

"""The experiment that knocks out visual tokens: rank agreement, models with a known truth, and a whole run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import capa_probe as cp
from capa_probe.benchmark import knockout
from capa_probe.benchmark.knock_means import means
from capa_probe.benchmark.knock_ranks import STATISTICS, agreement, correlate
from capa_probe.benchmark.knock_tail import SCORES
from capa_probe.benchmark.setup import Settings, Setup
from capa_probe.benchmark.store import Store
from capa_probe.errors import CapaProbeError
from tests import planted, processors, tiny


class TestRanks:
    def test_agree_with_definitions_and_with_scipy(self) -> None:
        rng = np.random.default_rng(1)
        for size in (3, 12, 40):
            for _ in range(10):
                x, y = rng.integers(0, 6, size).astype(float), rng.normal(size=size)
                if len(set(x)) == 1:
                    continue
                found = agreement(x, y, 0.25)
                assert found["spearman"] == pytest.approx(float(spearmanr(x, y).statistic))
                assert found["kendall"] == pytest.approx(_tau_b(x, y))
                n = max(1, round(0.25 * size))
                top = [set(sorted(range(size), key=lambda i: (-v[i], i))[:n]) for v in (x, y)]
                assert found["recall"] == len(top[0] & top[1]) / n

    def test_known_rankings(self) -> None:
        x = [0.1, 0.4, 0.2, 0.9]
        assert agreement(x, [10 * value for value in x]) == pytest.approx(dict.fromkeys(STATISTICS, 1.0))
        turned = agreement(x, [-value for value in x])
        assert turned == pytest.approx({"spearman": -1.0, "kendall": -1.0, "recall": 0.0})

    def test_what_cannot_be_judged_is_not(self) -> None:
        x = [0.1, 0.4, 0.2, 0.9]
        for effect, score in ((x, [1.0] * 4), ([0.0] * 4, x), ([math.nan, *x[1:]], x), (x[:2], x[:2])):
            assert all(math.isnan(value) for value in agreement(effect, score).values())

    def test_tables(self) -> None:
        rows, values = [], {"good": (1.0, 2.0, 3.0, 4.0), "bad": (4.0, 3.0, 2.0, 1.0), "flat": (1.0,) * 4}
        for sample in range(6):
            for position in range(4):
                scores = {name: score[position] for name, score in values.items()}
                # In the last sample the effect runs the other way.
                effect = -1.0 * position if sample == 5 else 1.0 * position
                place = {"sample": str(sample), "task": "ab"[sample % 2], "layer": 3, "scored_at": "same"}
                rows.append({**place, "position": 9 - position, "kl": effect, **scores})
        images = {str(sample): f"image {sample // 2}" for sample in range(6)}
        table = correlate(pd.DataFrame(rows), images, ["kl"], list(values))
        assert len(table) == 6 * 3
        summary = means(table, ["layer", "scored_at", "effect", "score"], STATISTICS)
        assert summary["task"].tolist() == ["all"] * 3 + ["a"] * 3 + ["b"] * 3
        whole = summary[summary["task"] == "all"].set_index("score")
        assert whole["spearman"].to_dict() == pytest.approx(
            {"good": 4 / 6, "bad": -4 / 6, "flat": math.nan}, nan_ok=True
        )
        assert whole[["n", "n_not_judged"]].to_numpy().tolist() == [[6, 0], [6, 0], [0, 6]]
        assert (whole.loc["good", "spearman_low"] < 4 / 6) & (whole.loc["good", "spearman_high"] == 1)
        # All correlations of task "a" are 1: that is no proportion, and has an interval without width.
        of_a = summary[(summary["task"] == "a") & (summary["score"] == "good")].iloc[0]
        assert of_a[["spearman", "spearman_low", "spearman_high"]].tolist() == pytest.approx([1, 1, 1])
        scores = {"good": "contribution", "bad": "attention", "flat": "value_norm"}
        rename = table.assign(score=table["score"].map(scores))
        missing = rename[rename["score"] == "value_norm"]
        others = [missing.assign(score=name) for name in ("removal_effect", "random")]
        tests = knockout.compare_scores(pd.concat([rename, *others], ignore_index=True))
        assert len(tests) == len(STATISTICS) * 4 * 3
        assert set(tests["task"]) == {"all", "a", "b"}
        tests = tests[tests["task"] == "all"]
        bad = tests[(tests["measure"] == "spearman") & (tests["second"] == "attention")].iloc[0]
        assert (bad["difference"], bad["n"], bad["n_images"]) == (pytest.approx(8 / 6), 6, 3)
        assert (bad["mean_first"], bad["mean_second"]) == (pytest.approx(4 / 6), pytest.approx(-4 / 6))
        # Two images differ by 4, one by 0: of the four sign patterns two are as extreme.
        assert bad["p"] == bad["p_holm"] == 0.5
        flat = tests[(tests["measure"] == "spearman") & (tests["second"] == "value_norm")].iloc[0]
        assert flat["n"] == 0
        assert math.isnan(flat["p"])


def _tau_b(x: Any, y: Any) -> float:
    concordant = tied_x = tied_y = pairs = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        concordant += int(a * b)
        tied_x, tied_y, pairs = tied_x + (a == 0), tied_y + (b == 0), pairs + 1
    return concordant / math.sqrt((pairs - tied_x) * (pairs - tied_y))


# -- the planted models


@cache
def planted_tokens(family: str) -> pd.DataFrame:
    """The tokens of one sample, with their kinds, knocked out before layer 3."""
    truth = planted.plant(family)
    setup = Setup(
        cp.HookedLVLM(truth.model, truth.processor),
        truth.samples[:1],
        settings=Settings(knockout_layers=(3,), max_new_tokens=2),
    )
    tokens = knockout.run(setup)["knockout_tokens"]
    kinds = truth.kinds[truth.samples[0].id]
    places = zip(tokens["image"], tokens["row"], tokens["col"], strict=True)
    return tokens.assign(kind=[kinds[place] for place in places])


@pytest.mark.parametrize("family", planted.FAMILIES)
class TestPlanted:
    def test_anchors_carry_the_answer_and_dumps_do_not(self, family: str) -> None:
        tokens = planted_tokens(family)
        tokens = tokens[tokens["scored_at"] == "previous"]
        anchor = tokens["kind"] == "anchor"
        for effect in ("kl", "hellinger"):
            largest = tokens.loc[~anchor, effect].max()
            assert tokens.loc[anchor, effect].min() > 3 * largest
            assert tokens.loc[tokens["kind"] == "dump", effect].max() <= largest
        assert (tokens.loc[tokens["kind"] == "dump", "kl"] < tokens.loc[anchor, "kl"].min() / 20).all()
        # The answer becomes less likely without an anchor, and with any other token gone it does not.
        for effect in ("first_drop", "answer_drop"):
            assert (tokens.loc[anchor, effect] > 0.3).all()
            assert (tokens.loc[~anchor, effect] < 0).all()

    def test_both_readings_have_the_same_effects_and_other_scores(self, family: str) -> None:
        tokens = planted_tokens(family)
        previous, same = (
            tokens[tokens["scored_at"] == reading].reset_index(drop=True) for reading in knockout.SCORED_AT
        )
        fixed = ["position", *knockout.EFFECTS, "random"]
        pd.testing.assert_frame_equal(previous[fixed], same[fixed])
        assert not np.allclose(previous["contribution"], same["contribution"])
        assert tokens[["sample", "layer", "scored_at", "position"]].duplicated().sum() == 0

    def test_contribution_finds_the_anchors_and_only_removal_effect_the_share_that_dumps_take(
        self, family: str
    ) -> None:
        tokens = planted_tokens(family)
        tokens = tokens[tokens["scored_at"] == "same"]
        kinds = tokens.groupby("kind")
        anchors = tokens.nlargest(2, "contribution")["kind"].tolist()
        assert anchors == ["anchor", "anchor"]
        # What a dump takes goes to the others when it is gone, which moves the output more than a plain token does.
        assert kinds["kl"].median()["dump"] > 100 * kinds["kl"].median()["plain"]
        assert kinds["removal_effect"].median()["dump"] > kinds["removal_effect"].median()["plain"]
        assert kinds["contribution"].median()["dump"] < kinds["contribution"].median()["plain"]
        rho = {name: agreement(tokens["kl"], tokens[name])["spearman"] for name in SCORES}
        assert rho["removal_effect"] > rho["contribution"] + 0.1


# -- the whole experiment


def setup_of(out: Path | None = None, **settings: Any) -> Setup:
    samples = tuple(
        cp.Sample(
            f"s/{number}", processors.image(16, 16, seed=number // 2), "what is it?", task="ab"[number % 2]
        )
        for number in range(4)
    )
    lvlm = cp.HookedLVLM(tiny.shared("llava"), processors.shared("llava"))
    defaults: dict[str, Any] = {"knockout_samples": 3, "knockout_layers": (1, 3), "max_new_tokens": 3}
    store = Store(None, {})
    return Setup(lvlm, samples, store=store, settings=Settings(**{**defaults, **settings}))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def whole_run() -> dict[str, pd.DataFrame]:
    return knockout.run(setup_of())


def test_tables_of_a_run() -> None:
    tables = whole_run()
    assert list(tables) == ["knockout", "knockout_tests", "knockout_rows", "knockout_tokens"]
    tokens = tables["knockout_tokens"]
    assert len(tokens) == 3 * 2 * 2 * 16
    assert tokens["sample"].nunique() == 3
    assert set(tokens["task"]) == {"a", "b"}
    assert not tokens.isna().any().any()
    assert (tokens["row"] * 4 + tokens["col"]).tolist() == list(range(16)) * 12
    rows = tables["knockout_rows"]
    assert len(rows) == 3 * 2 * 2 * 4 * 5
    assert rows["spearman"].between(-1, 1).all()
    summary = tables["knockout"]
    assert len(summary) == 3 * 2 * 2 * 4 * 5  # all, and the two tasks
    one = rows.query("layer == 3 and scored_at == 'same' and effect == 'kl' and score == 'attention'")
    row = summary.query(
        "task == 'all' and layer == 3 and scored_at == 'same' and effect == 'kl' and score == 'attention'"
    )
    assert row["recall"].item() == pytest.approx(one["recall"].mean())
    assert set(tables["knockout_tests"]["second"]) == {*SCORES[1:], "random"}


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = whole_run()
    done: list[int] = []
    real = knockout.knockout_table

    def stops(*args: Any, **kwargs: Any) -> pd.DataFrame:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args[3])
        return real(*args, **kwargs)

    monkeypatch.setattr(knockout, "knockout_table", stops)
    with pytest.raises(KeyboardInterrupt), Store.open(tmp_path, {}) as store:
        knockout.run(replace(setup_of(), store=store))
    monkeypatch.undo()
    with Store.open(tmp_path, {}) as store:
        again = knockout.run(replace(setup_of(), store=store))
    assert (store.reused, store.made) == (3, 3)
    for name, table in whole.items():
        pd.testing.assert_frame_equal(again[name], table)
    # Once finished, nothing runs: not even the undisturbed model.
    monkeypatch.setattr(knockout, "greedy", None)
    with Store.open(tmp_path, {}) as store:
        last = knockout.run(replace(setup_of(), store=store))
    assert store.made == 0
    pd.testing.assert_frame_equal(last["knockout"], whole["knockout"])


def test_seed_and_batch_size_matter_where_they_should() -> None:
    base = whole_run()["knockout_tokens"]
    seeded = knockout.run(setup_of(seed=1, batch_size=3, knockout_samples=4, knockout_layers=(3,)))
    both, others = (
        tokens[(tokens["layer"] == 3) & tokens["sample"].isin(base["sample"])].reset_index(drop=True)
        for tokens in (base, seeded["knockout_tokens"])
    )
    assert not np.allclose(both["random"], others["random"])
    pd.testing.assert_frame_equal(
        both.drop(columns="random"), others.drop(columns="random"), atol=1e-6, rtol=1e-3
    )


def test_layers_that_are_not_there_are_refused() -> None:
    for layers in ((0, 2), (4,)):
        with pytest.raises(CapaProbeError, match="give layers from 1 to 3"):
            knockout.run(setup_of(knockout_layers=layers))

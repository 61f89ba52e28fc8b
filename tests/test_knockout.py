"""Knocking out visual tokens one by one: against forwards worked out by hand, and on models with a known truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

import capa_probe as cp
from capa_probe.benchmark import knockout
from capa_probe.benchmark.knock_means import means
from capa_probe.benchmark.knock_ranks import STATISTICS, agreement, correlate
from capa_probe.benchmark.knock_tail import SCORES, Vanilla, effects, knock_out, run_vanilla
from capa_probe.benchmark.setup import Settings, Setup
from capa_probe.benchmark.store import Store
from capa_probe.errors import CapaProbeError
from capa_probe.pruning import CAPA, Pruner
from capa_probe.pruning.scoring import Scoring
from tests import planted, processors, tiny
from tests import pruned_reference as reference

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
ANSWER = (5, 9, 7)
LAYERS = (1, 2, 3)


def wrapped(family: str, attn: str = "sdpa") -> cp.HookedLVLM:
    return cp.HookedLVLM(tiny.shared(family, attn))


def prompt(family: str, images: int = 2) -> dict[str, Tensor]:
    return tiny.inputs(family, (images,), tail=(4,))


def answered(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return reference.longer(inputs, torch.tensor([ANSWER[:-1]]))


def knocked(lvlm: cp.HookedLVLM, vanilla: Vanilla, layer: int, batch_size: int = 5) -> dict[int, Tensor]:
    return {
        position: row
        for chunk, logits in knock_out(lvlm, vanilla, layer, batch_size=batch_size)
        for position, row in zip(chunk.tolist(), logits, strict=True)
    }


class TestExact:
    @FAMILIES
    @pytest.mark.parametrize("attn", ["sdpa", "eager"])
    def test_is_a_forward_in_which_no_attention_falls_on_the_token(self, family: str, attn: str) -> None:
        lvlm, inputs = wrapped(family, attn), prompt(family)
        grown = answered(inputs)
        vanilla = run_vanilla(lvlm, inputs, ANSWER, LAYERS)
        plain = lvlm.model(**grown).logits[0, -len(ANSWER) :]
        assert (vanilla.logits - plain).abs().max() < 1e-6
        visual = lvlm.spans(inputs).visual[0].nonzero().flatten().tolist()
        for layer in LAYERS:
            found = knocked(lvlm, vanilla, layer)
            assert sorted(found) == visual
            for position in visual[:: len(visual) // 3]:
                kept = torch.ones_like(grown["input_ids"], dtype=torch.bool)
                kept[0, position] = False
                with torch.no_grad():
                    wanted = reference.edited_logits(lvlm, grown, {layer: kept})[0, -len(ANSWER) :]
                assert (found[position] - wanted).abs().max() < 1e-5
            # There is something to find.
            assert max(float((logits - plain).abs().max()) for logits in found.values()) > 2e-3

    @FAMILIES
    @pytest.mark.parametrize("execution", ["compact", "masked"])
    def test_is_what_the_engine_does_when_one_token_is_dropped(self, family: str, execution: Any) -> None:
        @dataclass(frozen=True)
        class AllBut(Pruner):
            position: int = 0

            def score_tokens(self, scoring: Scoring) -> Tensor:
                return -(scoring.positions == self.position).float()

        lvlm, inputs = wrapped(family), prompt(family)
        vanilla = run_vanilla(lvlm, inputs, ANSWER, [2])
        n = len(vanilla.visual)
        found = knocked(lvlm, vanilla, 2)
        for position in list(found)[1 :: n // 3]:
            pruner = AllBut(layers=(2,), keep=n - 1, execution=execution, position=position)
            with torch.no_grad(), pruner.attach(lvlm) as trace:
                wanted = lvlm.model(**inputs, logits_to_keep=1).logits[0, -1]
            assert not trace.kept[2][0, position]
            assert (found[position][0] - wanted).abs().max() < 1e-5

    @FAMILIES
    def test_does_not_depend_on_the_batch(self, family: str) -> None:
        lvlm = wrapped(family)
        vanilla = run_vanilla(lvlm, prompt(family), ANSWER, [1])
        one, many = (knocked(lvlm, vanilla, 1, size) for size in (1, 64))
        assert list(one) == list(many)
        assert max(float((one[at] - many[at]).abs().max()) for at in one) < 1e-6
        # In any order, and for some tokens only.
        some = vanilla.visual[[6, 1]]
        ((chunk, logits),) = knock_out(lvlm, vanilla, 1, some)
        assert chunk.tolist() == sorted(some.tolist())
        assert all(
            torch.allclose(row, one[at], atol=1e-6) for at, row in zip(chunk.tolist(), logits, strict=True)
        )

    @FAMILIES
    def test_layers_run_once_and_early_ones_never_again(self, family: str) -> None:
        lvlm, calls = wrapped(family), list[int]()
        inputs = prompt(family)
        layers = lvlm.family.layers(lvlm.model)
        handles = [
            layer.register_forward_hook(lambda *_, index=index: calls.append(index))
            for index, layer in enumerate(layers)
        ]
        try:
            vanilla = run_vanilla(lvlm, inputs, ANSWER, [2])
            assert calls == [0, 1, 2, 3]
            calls.clear()
            chunks = len(list(knock_out(lvlm, vanilla, 2, batch_size=4)))
        finally:
            for handle in handles:
                handle.remove()
        assert chunks == math.ceil(len(vanilla.visual) / 4) > 1
        assert calls == [2, 3] * (chunks + 1)  # and once with nothing dropped, to see that this is the model

    @FAMILIES
    def test_leaves_model_and_first_run_as_they_were(self, family: str) -> None:
        lvlm, inputs = wrapped(family), prompt(family)
        before = lvlm.model(**inputs).logits
        backend = lvlm.model.config.get_text_config()._attn_implementation
        vanilla = run_vanilla(lvlm, inputs, ANSWER, [1, 3])
        lengths = reference.kv_lengths(vanilla._cache)
        first, again = (knocked(lvlm, vanilla, 3) for _ in range(2))
        assert reference.kv_lengths(vanilla._cache) == lengths == [vanilla.length] * lvlm.n_layers
        assert all(torch.equal(first[at], again[at]) for at in first)
        assert torch.equal(lvlm.model(**inputs).logits, before)
        assert lvlm.model.config.get_text_config()._attn_implementation == backend
        assert not any(layer._forward_pre_hooks for layer in lvlm.family.layers(lvlm.model))


class TestScores:
    @FAMILIES
    def test_are_those_of_a_profile_and_of_capa(self, family: str) -> None:
        lvlm, inputs = wrapped(family), prompt(family)
        vanilla = run_vanilla(lvlm, inputs, ANSWER, [2])
        profile = cp.profile(lvlm, [inputs], probes="all", progress=False).tokens
        assert sorted(vanilla.scores) == [1, 2]
        for layer, scores in vanilla.scores.items():
            rows = profile[(profile["layer"] == layer) & (profile["kind"] == "visual")].sort_values(
                "position"
            )
            assert rows["position"].tolist() == vanilla.visual.tolist()
            for name in SCORES:
                np.testing.assert_allclose(scores[name], rows[name], atol=1e-6, rtol=1e-4)
        for name in SCORES:
            with torch.no_grad(), CAPA(layers=(2,), score=name).attach(lvlm) as trace:  # type: ignore[arg-type]
                lvlm.model(**inputs)
            assert torch.allclose(trace.scores[2][0, vanilla.visual], vanilla.scores[1][name], atol=1e-6)

    @FAMILIES
    def test_do_not_see_the_answer(self, family: str) -> None:
        lvlm, inputs = wrapped(family), prompt(family)
        one, other = (run_vanilla(lvlm, inputs, answer, [2]) for answer in ((5,), (8, 11, 12, 13)))
        for layer, name in itertools.product((1, 2), SCORES):
            assert torch.allclose(one.scores[layer][name], other.scores[layer][name], atol=1e-6)
        assert torch.allclose(one.logits[0], other.logits[0], atol=1e-5)


class TestEffects:
    def test_are_what_their_formulas_say(self) -> None:
        generator = torch.Generator().manual_seed(3)
        own, copies = torch.randn(2, 6, generator=generator), torch.randn(4, 2, 6, generator=generator)
        vanilla = Vanilla(9, torch.tensor([1]), torch.tensor([2, 4]), own)
        found = effects(vanilla, copies)

        def probabilities(logits: Tensor) -> list[float]:
            weights = [math.exp(x) for x in logits.tolist()]
            return [weight / math.fsum(weights) for weight in weights]

        for row, logits in enumerate(copies):
            p, q = probabilities(own[0]), probabilities(logits[0])
            kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            distance = math.sqrt(
                math.fsum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(p, q, strict=True)) / 2
            )
            first = math.log(p[2] / q[2])
            second = math.log(probabilities(own[1])[4] / probabilities(logits[1])[4])
            wanted = {"kl": kl, "hellinger": distance, "first_drop": first, "answer_drop": first + second}
            assert {name: float(values[row]) for name, values in found.items()} == pytest.approx(
                wanted, rel=1e-6
            )

    def test_without_a_change_there_is_none(self) -> None:
        own = torch.randn(2, 6)
        found = effects(Vanilla(9, torch.tensor([1]), torch.tensor([2, 4]), own), own[None])
        assert all(float(values.abs().max()) < 1e-12 for values in found.values())


class TestRefusals:
    def test_inputs_that_cannot_be_knocked_out(self) -> None:
        lvlm = wrapped("llava")
        batch = tiny.inputs("llava", (1, 1), tail=(3, 3))
        padded = {name: value[1:] for name, value in tiny.inputs("llava", (2, 1), tail=(3, 3)).items()}
        padded["pixel_values"] = padded["pixel_values"][1:]
        text = tiny.inputs("llava", (0,), tail=(3,))
        for inputs, words in ((batch, "batch of 2"), (padded, "with padding"), (text, "without visual")):
            with pytest.raises(CapaProbeError, match=words):
                run_vanilla(lvlm, inputs, ANSWER, [1])
        with pytest.raises(CapaProbeError, match="without a token"):
            run_vanilla(lvlm, prompt("llava"), [], [1])
        for layers in ((0,), (4,), ()):
            with pytest.raises(CapaProbeError, match="layers from 1 to 3"):
                run_vanilla(lvlm, prompt("llava"), ANSWER, layers)

    def test_a_decoder_that_does_more_than_its_layers(self) -> None:
        lvlm = cp.HookedLVLM(tiny.build("llava", seed=4))
        text = lvlm.family.text_model(lvlm.model)

        def turn(module: Any, args: Any, output: Any) -> Any:
            output["last_hidden_state"] = -output["last_hidden_state"]
            return output

        text.register_forward_hook(turn)
        vanilla = run_vanilla(lvlm, prompt("llava"), ANSWER, [2])
        with pytest.raises(CapaProbeError, match="Layers 2 to 3, run by themselves"):
            next(knock_out(lvlm, vanilla, 2))


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
        assert len(tests) == len(STATISTICS) * 4
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


def test_tables_of_a_run() -> None:
    tables = knockout.run(setup_of())
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
    whole = knockout.run(setup_of())
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
        pd.testing.assert_frame_equal(
            knockout.run(replace(setup_of(), store=store))["knockout"], whole["knockout"]
        )
    assert store.made == 0


def test_seed_and_batch_size_matter_where_they_should() -> None:
    base = knockout.run(setup_of())["knockout_tokens"]
    seeded = knockout.run(setup_of(seed=1))["knockout_tokens"]
    assert not np.allclose(base["random"], seeded["random"])
    pd.testing.assert_frame_equal(base.drop(columns="random"), seeded.drop(columns="random"))
    pd.testing.assert_frame_equal(
        knockout.run(setup_of(batch_size=3))["knockout_tokens"], base, atol=1e-6, rtol=1e-3
    )


def test_layers_that_are_not_there_are_refused() -> None:
    for layers in ((0, 2), (4,)):
        with pytest.raises(CapaProbeError, match="give layers from 1 to 3"):
            knockout.run(setup_of(knockout_layers=layers))

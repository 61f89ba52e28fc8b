"""Pruning over generation steps: teacher forcing is step-by-step decoding, and maps are compared as they should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import capa_probe as cp
from capa_probe.benchmark import over_steps, steps_forced
from capa_probe.benchmark.setup import Settings, Setup
from capa_probe.benchmark.steps_forced import Answers, forced, greedy
from capa_probe.benchmark.steps_maps import compare_maps, map_distance
from capa_probe.benchmark.store import Store
from capa_probe.pruning import CAPA, Pruner
from capa_probe.pruning.scoring import Scoring
from tests import planted, processors, tiny
from tests import pruned_reference as reference

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
ANSWER = torch.tensor([[5, 9, 7, 11], [8, 8, 20, 6]])


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def wrapped(family: str) -> cp.HookedLVLM:
    return cp.HookedLVLM(tiny.shared(family))


def answers(ids: Tensor = ANSWER) -> Answers:
    return Answers(ids, (ids.shape[1],) * len(ids), torch.zeros(0))


def prompts(family: str) -> dict[str, Tensor]:
    return tiny.inputs(family, (1, 2), tail=(3, 5))  # ragged, padded on the left


def over_answer(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return reference.longer(inputs, ANSWER[:, :-1])


class TestForced:
    @FAMILIES
    @pytest.mark.parametrize("layers", [(2,), (1, 3)])
    def test_is_a_forward_that_sees_what_the_prompt_kept(self, family: str, layers: tuple[int, ...]) -> None:
        lvlm, inputs = wrapped(family), prompts(family)
        with CAPA(layers=layers, keep=0.3).attach(lvlm) as trace:
            found = forced(lvlm, inputs, answers())
        wanted = reference.edited_logits(lvlm, over_answer(inputs), trace.kept)[:, -4:].transpose(0, 1)
        assert found.shape == wanted.shape == (4, 2, 64)
        assert (found - wanted).abs().max() < 1e-5
        plain = lvlm.model(**over_answer(inputs)).logits[:, -4:].transpose(0, 1)
        assert (
            (found - plain).abs().amax(dim=(1, 2)) > 1e-3
        ).all()  # at every step there is something to find

    @FAMILIES
    def test_one_forward_over_the_answer_would_prune_by_another_query(self, family: str) -> None:
        lvlm, inputs = wrapped(family), prompts(family)
        pruner, n = CAPA(layers=(2,), keep=0.3), inputs["input_ids"].shape[1]
        with pruner.attach(lvlm) as trace:
            forced(lvlm, inputs, answers())
            by_prompt = trace.kept[2]
            lvlm.model(**over_answer(inputs))
        assert not torch.equal(trace.kept[2][:, :n], by_prompt)

    @FAMILIES
    def test_is_free_generation_on_its_own_answer(self, family: str) -> None:
        lvlm, inputs = wrapped(family), prompts(family)
        for pruner in (CAPA(layers=(2,), keep=0.3), CAPA(layers=(2,), keep=0.3, rescore="every_step")):
            with pruner.attach(lvlm):
                free = greedy(lvlm, inputs, 5)
                again = forced(lvlm, inputs, free)
            assert torch.equal(free.logits, again)
            assert (
                torch.equal(again.argmax(dim=-1).T, free.ids) or 2 in free.ids
            )  # after a stop there is filling
            assert not torch.equal(forced(lvlm, inputs, free), again)

    @FAMILIES
    def test_every_step_sees_its_own_tokens(self, family: str) -> None:
        lvlm, inputs = wrapped(family), prompts(family)
        with CAPA(layers=(2,), keep=0.3, rescore="every_step").attach(lvlm) as trace:
            found = forced(lvlm, inputs, answers())
        grown, n = over_answer(inputs), inputs["input_ids"].shape[1]
        assert len(trace.steps) == 3
        dropped = torch.zeros(2, grown["input_ids"].shape[1], grown["input_ids"].shape[1], dtype=torch.bool)
        visual = lvlm.spans(inputs).visual
        for step, kept in enumerate(trace.steps):
            dropped[:, n + step, :n] = visual & ~kept[2]

        def edit(pattern: Tensor, hook: Any) -> Tensor:
            left = pattern.masked_fill(dropped[:, None], 0)
            return left / left.sum(dim=-1, keepdim=True).clamp(min=1e-30)

        hooks = [(f"blocks.{layer}.attn.hook_pattern", edit) for layer in (2, 3)]
        wanted = lvlm.run_with_hooks(**grown, fwd_hooks=hooks, use_cache=False).logits[:, -4:].transpose(0, 1)
        plain = lvlm.model(**grown).logits[:, -4:].transpose(0, 1)
        assert (found - wanted).abs().max() < 1e-5
        assert (wanted - plain)[0].abs().max() < 1e-6  # the first token comes from the whole prompt
        assert ((wanted - plain)[1:].abs().amax(dim=(1, 2)) > 1e-3).all()

    @FAMILIES
    def test_without_a_pruner_it_is_the_model(self, family: str) -> None:
        lvlm, inputs = wrapped(family), prompts(family)
        own = greedy(lvlm, inputs, 4)
        assert torch.equal(forced(lvlm, inputs, own), own.logits)
        plain = lvlm.model(**over_answer(inputs)).logits[:, -4:].transpose(0, 1)
        assert (forced(lvlm, inputs, answers()) - plain).abs().max() < 1e-5
        row = greedy(lvlm, reference.row_alone(family, inputs, 0), 4)
        assert row.ids[0, : row.n_steps[0]].tolist() == own.ids[0, : own.n_steps[0]].tolist()

    def test_steps_end_with_the_stop_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny.build("llava", seed=5)
        lvlm, inputs = cp.HookedLVLM(model), prompts("llava")
        free = greedy(lvlm, inputs, 6)
        monkeypatch.setattr(model.generation_config, "eos_token_id", [int(free.ids[0, 2]), 2])
        stopped = greedy(lvlm, inputs, 6)
        first = free.ids[0].tolist().index(int(free.ids[0, 2])) + 1
        assert stopped.n_steps[0] == first <= 3
        assert stopped.ids[0, :first].tolist() == free.ids[0, :first].tolist()
        with CAPA(layers=(2,)).attach(lvlm):
            assert len(forced(lvlm, inputs, stopped)) == stopped.ids.shape[1]


class TestDistances:
    def test_are_what_their_formulas_say(self) -> None:
        own, pruned = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()
        found = over_steps.step_distances(own, pruned)
        for row in range(3):
            p, q = (
                [math.exp(x) / math.fsum(map(math.exp, logits[row].tolist())) for x in logits[row].tolist()]
                for logits in (own, pruned)
            )
            gaps = [(math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(p, q, strict=True)]
            assert float(found["hellinger"][row]) == pytest.approx(math.sqrt(math.fsum(gaps) / 2), rel=1e-6)
            kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            assert float(found["kl"][row]) == pytest.approx(kl, rel=1e-5)
            assert float(found["agrees"][row]) == float(p.index(max(p)) == q.index(max(q)))
        same = over_steps.step_distances(own, own)
        assert [float(same[name].max()) for name in ("hellinger", "kl")] == [0, 0]
        assert same["agrees"].tolist() == [1, 1, 1]


class TestMaps:
    def test_distance(self) -> None:
        found = map_distance([1.0, 0.0, 3.0, 4.0], [4.0, 0.0, 2.0, 2.0], top=0.5)
        p, q = (0.125, 0.0, 0.375, 0.5), (0.5, 0.0, 0.25, 0.25)
        wanted = math.sqrt(sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(p, q, strict=True)) / 2)
        assert found["hellinger"] == pytest.approx(wanted)
        assert found["overlap"] == 0.5  # {3, 2} and {0, 2}: ties go to the lower position
        assert found["spearman"] == pytest.approx(0.3162277, abs=1e-6)

    def test_scale_does_not_matter(self) -> None:
        x = np.random.default_rng(0).random(12)
        same = map_distance(x, 7 * x)
        assert same == pytest.approx({"hellinger": 0.0, "spearman": 1.0, "overlap": 1.0}, abs=1e-7)
        assert map_distance([1, 0, 0, 0], [0, 0, 0, 1])["hellinger"] == 1.0

    def test_a_map_of_zeros_is_not_judged(self) -> None:
        assert all(math.isnan(value) for value in map_distance([0.0] * 4, [1.0, 2, 3, 4]).values())

    def test_of_all_steps(self) -> None:
        maps = {0: (1.0, 2.0, 3.0, 4.0), 1: (4.0, 3.0, 2.0, 1.0), 2: (1.0, 2.0, 3.0, 4.0)}
        rows = [
            {
                "sample": sample,
                "layer": 5,
                "step": step,
                "position": place,
                "kind": "visual",
                "contribution": value,
            }
            for sample, last in (("a", 2), ("b", 1), ("c", 0))
            for step, values in maps.items()
            if step <= last
            for place, value in enumerate(values)
        ]
        text = {"sample": "a", "layer": 5, "step": 0, "position": 9, "kind": "text", "contribution": 50.0}
        found = compare_maps(pd.DataFrame([*rows, text]), {sample: {"task": sample} for sample in "abc"})
        assert found[["sample", "task", "step", "against"]].to_numpy().tolist() == [
            ["a", "a", 1, "previous"],
            ["a", "a", 1, "prefill"],
            ["a", "a", 2, "previous"],
            ["a", "a", 2, "prefill"],
            ["b", "b", 1, "previous"],
            ["b", "b", 1, "prefill"],
        ]
        assert found["spearman"].tolist() == pytest.approx([-1, -1, -1, 1, -1, -1])
        assert found["hellinger"].tolist()[3] == 0
        empty = compare_maps(pd.DataFrame(rows).query("step == 0"), {"a": {"task": "a"}})
        assert empty.empty
        assert list(empty) == list(found)


# -- the whole experiment


def setup_of(**settings: Any) -> Setup:
    samples = tuple(
        cp.Sample(f"s/{number}", processors.image(16, 16, seed=number // 2), "what?", task="ab"[number % 2])
        for number in range(4)
    )
    lvlm = cp.HookedLVLM(tiny.shared("llava"), processors.shared("llava"))
    defaults: dict[str, Any] = {"step_samples": 4, "steps": 3, "layers": (2,), "batch_size": 3}
    return Setup(lvlm, samples, settings=Settings(**{**defaults, **settings}))


def test_tables_of_a_run() -> None:
    setup = setup_of()
    tables = over_steps.run(setup)
    rows, summary = tables["over_steps_rows"], tables["over_steps"]
    samples = over_steps.followed(setup.samples, 4)
    assert sorted(sample.task or "" for sample in samples) == ["a", "b", "describe", "describe"]
    assert [sample.question for sample in samples[2:]] == [over_steps.DESCRIBE] * 2
    assert set(rows["sample"]) == {sample.id for sample in samples}
    # One row per step, from 0 to the last that its answer has.
    steps = rows.groupby(["sample", "method"])["step"]
    assert (steps.max() + 1 == rows.groupby(["sample", "method"])["n_steps"].first()).all()
    assert (steps.count() == rows.groupby(["sample", "method"])["n_steps"].first()).all()
    assert rows["step"].max() == 2
    # With every step ranking anew the first token comes from the whole prompt; the others have been pruned then.
    first = rows[rows["step"] == 0].groupby("method")["hellinger"]
    assert first.max()["every_step"] < 1e-6
    assert (first.min()[["contribution", "attention", "random"]] > 1e-5).all()
    whole = summary[(summary["task"] == "all") & (summary["method"] == "random")]
    assert whole["n"].tolist() == [
        int((rows.query("method == 'random'")["step"] == step).sum()) for step in range(3)
    ]
    assert whole["hellinger"].iloc[1] == pytest.approx(
        rows.query("method == 'random' and step == 1")["hellinger"].mean()
    )
    tests = tables["over_steps_tests"]
    assert set(tests["task"]) == {"all", "a", "b", "describe"}
    tests = tests[tests["task"] == "all"]
    assert tests[["measure", "first", "second"]].to_numpy().tolist() == [
        [measure, "contribution", second]
        for second in ("attention", "random", "every_step")
        for measure in over_steps.DISTANCES
    ]
    mean = rows.groupby(["method", "sample"])["hellinger"].mean().unstack("method")
    assert tests["difference"].iloc[2] == pytest.approx((mean["contribution"] - mean["random"]).mean())
    # At the prompt's step "every_step" has pruned nothing yet, so that it does not count there.
    later = rows[rows["step"] > 0].groupby(["method", "sample"])["hellinger"].mean().unstack("method")
    assert tests["mean_second"].iloc[4] == pytest.approx(later["every_step"].mean())
    assert tests["mean_first"].iloc[4] == pytest.approx(later["contribution"].mean())
    maps = tables["over_steps_maps_rows"]
    assert set(maps["layer"]) == {0, 1, 2, 3}
    assert set(maps["against"]) == {"previous", "prefill"}
    assert maps["hellinger"].between(1e-4, 1).all()


def test_maps_are_those_of_a_profile_with_steps() -> None:
    setup = setup_of()
    samples = over_steps.followed(setup.samples, 4)
    found = over_steps.run(setup)["over_steps_maps_rows"]
    tokens = cp.profile(setup.lvlm, samples, steps=2, progress=False).tokens
    own = found["sample"].iloc[-1]
    chosen = tokens[(tokens["sample"] == own) & (tokens["layer"] == 1) & (tokens["kind"] == "visual")]
    before, after = (
        chosen[chosen["step"] == step].sort_values("position")["contribution"] for step in (0, 1)
    )
    p, q = (np.sqrt(np.asarray(x, dtype=float) / x.sum()) for x in (before, after))
    row = found[(found["sample"] == own) & (found["layer"] == 1) & (found["step"] == 1)].iloc[0]
    assert row["hellinger"] == pytest.approx(np.sqrt(((p - q) ** 2).sum() / 2), rel=1e-4)


def test_keeping_everything_changes_nothing() -> None:
    rows = over_steps.run(setup_of(capa_keep=1.0))["over_steps_rows"]
    assert rows["hellinger"].max() < 1e-6
    assert rows["agrees"].min() == 1


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of()
    whole = over_steps.run(setup)
    real: Callable[..., Tensor] = steps_forced.forced
    calls: list[int] = []

    def stops(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(over_steps, "forced", stops)
    with pytest.raises(KeyboardInterrupt), Store.open(tmp_path, {}) as store:
        over_steps.run(replace(setup, store=store))
    monkeypatch.setattr(over_steps, "forced", real)
    with Store.open(tmp_path, {}) as store:
        again = over_steps.run(replace(setup, store=store))
    assert (store.reused, store.made) == (3, 7)  # two batches of four methods and the maps
    for name, table in whole.items():
        pd.testing.assert_frame_equal(again[name], table)


@dataclass(frozen=True)
class Least(Pruner):
    """Keeps what contributes least."""

    def score_tokens(self, scoring: Scoring) -> Tensor:
        return -scoring.contribution


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_on_a_planted_model_the_answer_goes_with_what_contributes_most(family: str) -> None:
    truth = planted.plant(family)
    lvlm, sample = cp.HookedLVLM(truth.model, truth.processor), truth.samples[0]
    inputs = lvlm.prepare(sample.open_images(), sample.question)
    anchors = truth.mask(lvlm.spans(inputs), [sample], {"anchor"})
    own, found = greedy(lvlm, inputs, 2), {}
    for pruner in (CAPA(layers=(3,), keep=0.1), Least(layers=(3,), keep=0.1)):
        with pruner.attach(lvlm) as trace:
            found[type(pruner)] = forced(lvlm, inputs, own)
        assert bool(trace.kept[3][anchors].any()) == isinstance(pruner, CAPA)
    distance = {kind: over_steps.step_distances(own.logits, logits) for kind, logits in found.items()}
    assert (distance[Least]["hellinger"] > 4 * distance[CAPA]["hellinger"]).all()
    log_p = {
        kind: logits.log_softmax(dim=-1).gather(2, own.ids.T[..., None])
        for kind, logits in {**found, None: own.logits}.items()
    }
    assert (log_p[CAPA] > log_p[None]).all()  # with less beside them, anchors are attended to more
    assert (log_p[Least] < log_p[None] - 2).all()

"""Visual tokens knocked out one by one: against forwards worked out by hand and against the pruning engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import capa_probe as cp
from capa_probe.benchmark.knock_tail import SCORES, Vanilla, effects, knock_out, run_vanilla
from capa_probe.errors import CapaProbeError
from capa_probe.pruning import CAPA, Pruner
from capa_probe.pruning.scoring import Scoring
from tests import pruned_reference as reference
from tests import tiny

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
ANSWER = (5, 9, 7)
LAYERS = (1, 2, 3)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


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
            with pruner.attach(lvlm) as trace:
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
            with CAPA(layers=(2,), score=name).attach(lvlm) as trace:  # type: ignore[arg-type]
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

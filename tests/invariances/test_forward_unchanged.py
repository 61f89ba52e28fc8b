"""Probing changes nothing: the same logits, the same generated tokens, the same random numbers, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import capa_probe as cp
from capa_probe.lvlm import tap
from capa_probe.probes import PROBES
from capa_probe.probes.recorder import Recorder
from tests import tiny
from tests.invariances.comparing import in_dtype, profiled

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
VISION, TEXT = "vision_config", "text_config"
BACKENDS = {
    "sdpa": {VISION: "sdpa", TEXT: "sdpa"},
    "eager": {VISION: "eager", TEXT: "eager"},
    "mixed": {VISION: "eager", TEXT: "sdpa"},
    "mixed the other way": {VISION: "sdpa", TEXT: "eager"},
}
CASES = [
    *((torch.float32, backends) for backends in BACKENDS),
    *(
        (half, backends)
        for half in (torch.bfloat16, torch.float16)
        for backends in ("sdpa", "eager", "mixed")
    ),
]


def built(family: str, dtype: torch.dtype, backends: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model = tiny.build(family).to(dtype)
    model.set_attn_implementation(BACKENDS[backends])
    model.generation_config.eos_token_id = None
    return model, in_dtype(tiny.inputs(family), dtype)


def backends_of(model: PreTrainedModel) -> list[str]:
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def everything(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What a model answers: logits, greedy tokens and scores, sampled tokens, and the random state after them."""
    torch.manual_seed(5)
    found: dict[str, Any] = {"logits": model(**inputs).logits}
    greedy = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    found["ids"], found["scores"] = greedy.sequences, torch.stack(greedy.logits)
    found["sampled"] = model.generate(**inputs, max_new_tokens=3, do_sample=True, temperature=1.5)
    return found | {"state": torch.get_rng_state()}


def probed(lvlm: cp.HookedLVLM, inputs: dict[str, Tensor]) -> AbstractContextManager[Any]:
    """A recorder for each run of the model, with all probes on all layers."""

    class Fresh(Recorder):
        """Starts anew with every prefill, as the runs of ``everything`` do."""

        def _begin_step(self, x: Tensor, hook: object) -> None:
            if x.shape[1] > 1 and self._context is not None:
                self._measure_waiting(self._context)
                self.steps.clear()
            super()._begin_step(x, hook)

    return Fresh(lvlm, [probe() for probe in PROBES.values()], lvlm.spans(inputs)).attached()


@FAMILIES
@pytest.mark.parametrize(("dtype", "backends"), CASES)
def test_logits_and_tokens_with_and_without(family: str, backends: str, dtype: torch.dtype) -> None:
    model, inputs = built(family, dtype, backends)
    before = backends_of(model)
    with torch.no_grad():
        plain = everything(model, inputs)
        lvlm = cp.HookedLVLM(model)
        with probed(lvlm, inputs) as recorder:
            assert lvlm.attention_backend == BACKENDS[backends][TEXT]
            assert backends_of(model) != before  # the tap is in the forward
            found = everything(model, inputs)
        after = model(**inputs).logits
    assert len(recorder.steps) == 3  # and it has listened
    assert all(len(layers) == 4 for layers in recorder.steps[-1].values())
    for name, value in plain.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(after, plain["logits"])
    assert backends_of(model) == before
    assert not tap._SWITCHES


@FAMILIES
def test_under_inference_mode(family: str) -> None:
    model, inputs = built(family, torch.float32, "sdpa")
    wanted = profiled(cp.HookedLVLM(model), [inputs], steps=2)
    with torch.inference_mode():
        plain = everything(model, inputs)
        lvlm = cp.HookedLVLM(model)
        with probed(lvlm, inputs):
            found = everything(model, inputs)
        assert torch.is_inference(found["logits"])
        table = profiled(lvlm, [inputs], steps=2)
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    assert table.equals(wanted)


@pytest.mark.parametrize("mode", [nullcontext, torch.enable_grad, torch.no_grad])
def test_a_profile_leaves_the_random_state_and_the_grad_mode_alone(mode: Callable[[], Any]) -> None:
    model, inputs = built("llava", torch.float32, "sdpa")
    with mode():
        state, grad = torch.get_rng_state(), torch.is_grad_enabled()
        profiled(cp.HookedLVLM(model), [inputs], steps=2)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.is_grad_enabled() == grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_profile_of_a_model_in_training_mode_leaves_it_there() -> None:
    model, inputs = built("llava", torch.float32, "sdpa")
    wanted = profiled(cp.HookedLVLM(model), [inputs])
    model.train()
    model.model.language_model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert profiled(cp.HookedLVLM(model), [inputs]).equals(wanted)  # no dropout in these models
    assert [module.training for module in model.modules()] == modes


class TestSharing:
    """Two wrappers on one model, and two models built from one config object."""

    @pytest.fixture
    def pair(self) -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
        one = tiny.build("llava")
        torch.manual_seed(1)
        two = type(one)(one.config).eval()
        assert one.model.language_model.config is two.model.language_model.config
        for model in (one, two):
            model.generation_config.eos_token_id = None
            model(**tiny.inputs("llava"))
        yield one, two
        assert not tap._SWITCHES
        assert one.config.text_config._attn_implementation == "sdpa"

    def test_a_profile_of_one_model_inside_a_profile_of_the_other(
        self, pair: tuple[PreTrainedModel, PreTrainedModel]
    ) -> None:
        one, two = (cp.HookedLVLM(model) for model in pair)
        inputs, other = tiny.inputs("llava"), tiny.inputs("llava", seed=3)
        alone = profiled(one, [inputs], steps=2), profiled(two, [other], steps=2)
        inner: list[Any] = []

        def profile_the_other(module: Any, args: Any, output: Any) -> None:
            inner.append(profiled(two, [other], steps=2))

        handle = pair[0].model.language_model.layers[1].self_attn.register_forward_hook(profile_the_other)
        outer = profiled(one, [inputs], steps=2)
        handle.remove()
        assert outer.equals(alone[0])
        assert len(inner) == 3
        assert all(table.equals(alone[1]) for table in inner)
        assert not alone[0]["contribution"].equals(alone[1]["contribution"])

    def test_models_of_one_config_take_turns(self, pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
        inputs = tiny.inputs("llava")
        one, two = (cp.HookedLVLM(model) for model in pair)
        with torch.no_grad():
            plain = [model(**inputs).logits for model in pair]
            with probed(one, inputs), probed(two, inputs):
                assert torch.equal(pair[1](**inputs).logits, plain[1])
                assert torch.equal(pair[0](**inputs).logits, plain[0])
            # The other one runs through the tap, with nobody listening.
            with pytest.warns(UserWarning, match="never fired"), probed(two, inputs):
                assert torch.equal(pair[0](**inputs).logits, plain[0])

    def test_two_wrappers_on_one_model(self) -> None:
        model, inputs = tiny.build("llava"), tiny.inputs("llava")
        one, two = cp.HookedLVLM(model), cp.HookedLVLM(model)
        wanted = profiled(one, [inputs])
        assert profiled(two, [inputs]).equals(wanted)
        seen: list[str] = []
        name = "blocks.2.attn.hook_pattern"
        with two.hooks([(name, lambda x, hook: seen.append(hook.name))]):
            assert profiled(one, [inputs]).equals(wanted)
        assert seen == [name]
        with two.hooks([("blocks.0.hook_mlp_out", lambda x, hook: 2 * x)]):
            edited = profiled(one, [inputs])
        with one.hooks([("blocks.0.hook_mlp_out", lambda x, hook: 2 * x)]):
            assert profiled(one, [inputs]).equals(edited)
        assert not edited.equals(wanted)

    @pytest.mark.parametrize("steps", [0, 2])
    @pytest.mark.parametrize("inner", ["a profile", "a plain forward"])
    def test_a_model_that_is_run_inside_its_own_profile_is_refused(self, steps: int, inner: str) -> None:
        model, inputs = tiny.build("llava"), tiny.inputs("llava")
        model.generation_config.eos_token_id = None
        one, two = cp.HookedLVLM(model), cp.HookedLVLM(model)
        wanted, runs = profiled(one, [inputs], steps=steps), []

        def run_again(module: Any, args: Any, output: Any) -> None:
            if not runs:
                runs.append(1)
                _ = profiled(two, [inputs]) if inner == "a profile" else model(**inputs)

        for module in (model.model.language_model.layers[1], model.lm_head):
            handle = module.register_forward_hook(run_again)
            match = "one prefill and one for each generated token"
            with pytest.raises(cp.CapaProbeError, match=match):
                profiled(one, [inputs], steps=steps)
            handle.remove()
            runs.clear()
            assert profiled(one, [inputs], steps=steps).equals(wanted)

    @pytest.mark.parametrize("steps", [1, 2])
    def test_a_part_that_runs_once_more_at_the_last_step_is_refused(self, steps: int) -> None:
        model, inputs, calls = tiny.build("llava"), tiny.inputs("llava"), []
        model.generation_config.eos_token_id = None

        def run_again(module: Any, args: Any, output: Any) -> None:
            calls.append(1)
            if len(calls) == steps + 1:
                model.model.language_model.layers[1].mlp(args[0])

        handle = model.lm_head.register_forward_hook(run_again)
        with pytest.raises(cp.CapaProbeError, match="one prefill and one for each generated token"):
            profiled(cp.HookedLVLM(model), [inputs], steps=steps)
        handle.remove()
        assert len(calls) == steps + 1

    def test_prefill_in_chunks_is_refused(self) -> None:
        model, inputs = tiny.build("llava"), tiny.inputs("llava", images=(0, 0))
        model.generation_config.prefill_chunk_size = 3
        with pytest.raises(cp.CapaProbeError, match="prefill in chunks"):
            profiled(cp.HookedLVLM(model), [inputs], steps=1)

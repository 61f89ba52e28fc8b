"""Around a run: every backend is given back, every hook comes off, and wrappers do not get in each other's way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from tests import tiny
from tests.test_hooked import FAMILIES, built, decoder, everything, state


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class TestBackends:
    def test_a_mixed_model_gets_its_own_backends_back(self) -> None:
        model = built("llava")
        model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
        before = state(model)
        assert "eager" in before[1]
        assert "sdpa" in before[1]
        cp.HookedLVLM(model).run_with_cache(**tiny.inputs("llava"))
        assert state(model) == before

    def test_models_that_share_a_config(self) -> None:
        one = built("llava")
        two = type(one)(one.config).eval()
        inputs = tiny.inputs("llava")
        wanted, before = two(**inputs).logits, (state(one), state(two))

        def use_the_other(x: Tensor, hook: Any) -> None:
            out, _ = cp.HookedLVLM(two).run_with_cache(**inputs)
            assert torch.equal(out.logits, wanted)

        found = []
        hooks = [
            ("blocks.1.attn.hook_pattern", use_the_other),
            ("blocks.3.attn.hook_pattern", lambda x, hook: found.append(x)),
        ]
        cp.HookedLVLM(one).run_with_hooks(**inputs, fwd_hooks=hooks)
        assert len(found) == 1  # the inner run did not take the outer one's tap away
        assert (state(one), state(two)) == before

    def test_two_wrappers_on_one_model(self) -> None:
        model, inputs = built("llava"), tiny.inputs("llava")
        one, two, before = cp.HookedLVLM(model), cp.HookedLVLM(model), state(model)
        calls: list[str] = []
        name = "blocks.2.attn.hook_pattern"
        with one.hooks([(name, lambda x, hook: calls.append("one"))]):
            with two.hooks([(name, lambda x, hook: calls.append("two"))]):
                model(**inputs)
            model(**inputs)
        assert calls == ["one", "two", "one"]
        assert state(model) == before

    def test_flash_attention_is_refused_by_name(self) -> None:
        model = built("llava")
        decoder(model).config._attn_implementation = "flash_attention_2"
        with pytest.raises(CapaProbeError, match='"flash_attention_2", which cannot be probed'):
            cp.HookedLVLM(model)


class TestNothingIsLeftBehind:
    @FAMILIES
    def test_after_an_exception_in_a_hook(self, family: str) -> None:
        model, inputs = built(family), tiny.inputs(family)
        plain, before = model(**inputs).logits, state(model)
        lvlm = cp.HookedLVLM(model)

        def fail(x: Tensor, hook: Any) -> None:
            raise ZeroDivisionError

        hooks = [*everything(lvlm), ("blocks.2.attn.hook_pattern", fail)]
        with pytest.raises(ZeroDivisionError):
            lvlm.run_with_hooks(**inputs, fwd_hooks=hooks)
        assert state(model) == before
        assert torch.equal(model(**inputs).logits, plain)

    def test_after_a_name_that_does_not_exist(self) -> None:
        model, inputs = built("llava"), tiny.inputs("llava")
        lvlm, before = cp.HookedLVLM(model), state(model)
        hooks = [("blocks.0.hook_mlp_out", lambda x, hook: 0 * x), ("blocks.0.mlp_out", lambda x, hook: None)]
        with pytest.raises(
            CapaProbeError, match=r"no hook point blocks.0.mlp_out.*did you mean blocks.0.hook_mlp_out"
        ):
            lvlm.run_with_hooks(**inputs, fwd_hooks=hooks)
        with pytest.raises(
            CapaProbeError, match="no hook point blocks.9.hook_mlp_out in this model of 4 layers"
        ):
            lvlm.run_with_cache(**inputs, names_filter="blocks.9.hook_mlp_out")
        with pytest.raises(CapaProbeError, match="matches none"), lvlm.hooks([(lambda name: False, print)]):
            pass
        with pytest.raises(CapaProbeError, match="matches none"):
            lvlm.run_with_cache(**inputs, names_filter=lambda name: "resid_middle" in name)
        assert state(model) == before

    def test_a_permanent_hook_stays_until_reset(self) -> None:
        model, inputs = built("llava"), tiny.inputs("llava")
        lvlm, before, plain = cp.HookedLVLM(model), state(model), model(**inputs).logits
        lvlm.add_hook("blocks.1.hook_mlp_out", lambda x, hook: 0 * x)
        assert not torch.equal(model(**inputs).logits, plain)
        lvlm.reset_hooks()
        assert torch.equal(model(**inputs).logits, plain)
        assert state(model) == before

    def test_the_wrapped_model_is_not_a_submodule(self) -> None:
        model = built("llava")
        keys = set(model.state_dict())
        lvlm = cp.HookedLVLM(model)
        assert set(model.state_dict()) == keys
        assert not any(module is model for module in lvlm.modules())
        assert not any(
            hasattr(layer, "name") for layer in decoder(model).layers
        )  # TransformerLens writes them
        assert copy.deepcopy(model)(**tiny.inputs("llava")).logits.shape[0] == 3

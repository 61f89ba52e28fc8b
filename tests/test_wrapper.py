"""A HookedLVLM as an ordinary PyTorch module, and what its hook points do with odd hooks."""

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

NAME = "blocks.1.hook_resid_mid"


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class TestAsAModule:
    def test_casts_and_gradients_reach_the_model(self) -> None:
        lvlm = cp.HookedLVLM(tiny.build("llava"))
        assert lvlm.double() is lvlm
        assert lvlm.model.dtype == torch.float64
        assert lvlm.bfloat16().model.dtype == torch.bfloat16
        assert lvlm.to(torch.float32).model.dtype == torch.float32
        lvlm.requires_grad_(False)
        assert not any(parameter.requires_grad for parameter in lvlm.model.parameters())
        assert lvlm.train().model.training
        assert not lvlm.eval().model.training

    def test_parameters_and_state_are_the_models(self) -> None:
        lvlm = cp.HookedLVLM(tiny.build("llava"))
        assert [p.data_ptr() for p in lvlm.parameters()] == [p.data_ptr() for p in lvlm.model.parameters()]
        state = {name: 2 * value for name, value in lvlm.state_dict().items()}
        assert set(state) == set(lvlm.model.state_dict())
        lvlm.load_state_dict(state)
        assert all(torch.equal(value, state[name]) for name, value in lvlm.model.state_dict().items())

    def test_a_deep_copy_listens_to_its_own_model(self) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.build("llava")), tiny.inputs("llava")
        other = copy.deepcopy(lvlm)
        assert other.model is not lvlm.model
        for parameter in other.model.model.language_model.layers[0].mlp.parameters():
            parameter.zero_()
        (one, kept), (two, edited) = (
            each.run_with_cache(**inputs, names_filter=NAME) for each in (lvlm, other)
        )
        assert not torch.equal(kept[NAME], edited[NAME])
        assert torch.equal(one.logits, lvlm.model(**inputs).logits)
        assert torch.equal(two.logits, other.model(**inputs).logits)

    def test_the_headless_model_is_refused(self) -> None:
        with pytest.raises(
            CapaProbeError, match="LlavaModel was given.*give the LlavaForConditionalGeneration"
        ):
            cp.HookedLVLM(tiny.build("llava").model)


class TestOddHooks:
    @pytest.mark.parametrize("point", ["hook_resid_mid", "hook_resid_post", "hook_mlp_out", "attn.hook_z"])
    @pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
    def test_one_that_keeps_is_safe_from_one_that_edits(self, family: str, point: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), tiny.inputs(family)
        name = f"blocks.1.{point}"
        _, cache = lvlm.run_with_cache(**inputs, names_filter=name)
        kept: list[Tensor] = []
        hooks = [(name, lambda x, hook: kept.append(x.detach())), (name, lambda x, hook: x + 1)]
        both = lvlm.run_with_hooks(**inputs, fwd_hooks=hooks).logits
        assert torch.equal(kept[0], cache[name])
        assert torch.equal(both, lvlm.run_with_hooks(**inputs, fwd_hooks=hooks[1:]).logits)

    @pytest.mark.parametrize(
        "point",
        ["hook_resid_pre", "hook_resid_mid", "hook_mlp_out", "attn.hook_v", "attn.hook_rot_q", "attn.hook_z"],
    )
    def test_one_that_answers_in_float32_on_a_bfloat16_model(self, point: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.build("llava").bfloat16()), tiny.inputs("llava")
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        name = f"blocks.1.{point}"
        found = lvlm.run_with_hooks(**inputs, fwd_hooks=[(name, lambda x, hook: 0.5 * x.float())]).logits
        assert torch.equal(
            found, lvlm.run_with_hooks(**inputs, fwd_hooks=[(name, lambda x, hook: 0.5 * x)]).logits
        )

    def test_one_that_answers_in_another_shape(self) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared("llava")), tiny.inputs("llava")
        match = r"hook on blocks\.1\.hook_resid_mid returned a tensor of shape \(1, .*of the same shape"
        with pytest.raises(CapaProbeError, match=match):
            lvlm.run_with_hooks(**inputs, fwd_hooks=[(NAME, lambda x, hook: x[:1])])

    def test_one_in_a_block_without_a_forward_is_reported(self) -> None:
        lvlm = cp.HookedLVLM(tiny.shared("llava"))
        with (
            pytest.warns(UserWarning, match=rf"never fired: {NAME}"),
            lvlm.hooks([(NAME, lambda x, hook: None)]),
        ):
            pass

    def test_backward_hooks_on_keys_are_no_edit_of_the_cache(self) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.build("llava")), tiny.inputs("llava")
        name, seen = "blocks.1.attn.hook_rot_k", []
        with torch.enable_grad(), lvlm.hooks(bwd_hooks=[(name, lambda g, hook: seen.append(g.clone()))]):
            lvlm(**inputs).logits[:, -1].sum().backward()  # with a cache
        assert seen[0].abs().sum() > 0

    def test_filters_that_name_nothing(self) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared("llava")), tiny.inputs("llava")
        nothing: tuple[Any, ...] = ([], lambda name: False)
        for names_filter in nothing:
            with pytest.raises(CapaProbeError):
                lvlm.run_with_cache(**inputs, names_filter=names_filter)

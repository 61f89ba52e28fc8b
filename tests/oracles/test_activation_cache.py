"""TransformerLens's tools on our caches: the same as on those of its own bridge, and right for every family."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.tools.analysis import direct_logit_attribution
from transformers import LlavaConfig, LlavaForConditionalGeneration, StableLmConfig

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedCache
from tests import processors, tiny
from tests.invariances import towers
from tests.oracles import bridge, models
from tests.oracles.bridge import Case

#: Our cache, the bridge's, and where they come from.
Both: TypeAlias = tuple[ActivationCache, ActivationCache, Case]

#: Tools that read the same activations in both, by name; each to a tensor.
TOOLS: dict[str, Callable[[ActivationCache], Tensor]] = {
    "accumulated_resid": lambda cache: cache.accumulated_resid(incl_mid=True),
    "accumulated_resid, normed": lambda cache: cache.accumulated_resid(apply_ln=True),
    "accumulated_resid, at an FFN's input": lambda cache: cache.accumulated_resid(
        2, apply_ln=True, mlp_input=True
    ),
    "decompose_resid": lambda cache: cache.decompose_resid(incl_embeds=False),
    "decompose_resid, normed": lambda cache: cache.decompose_resid(3, apply_ln=True, incl_embeds=False),
    "stack_head_results": lambda cache: cache.stack_head_results(incl_remainder=True),
    "stack_head_results, normed": lambda cache: cache.stack_head_results(2, apply_ln=True, pos_slice=-1),
    "get_full_resid_decomposition": lambda cache: cache.get_full_resid_decomposition(
        expand_neurons=False, pos_slice=-1
    ),
    "stack_neuron_results": lambda cache: cache.stack_neuron_results(3, pos_slice=(-3, None)),
    "get_neuron_results": lambda cache: cache.get_neuron_results(1, neuron_slice=[0, 5]),
    "stack_activation": lambda cache: cache.stack_activation("pattern"),
    "logit_lens": lambda cache: cache.logit_lens(positions=None).readout.values,
    "logit_lens, targets": lambda cache: cache.logit_lens(targets=["a", "7"]).readout.values,
}


@pytest.fixture(scope="module", params=bridge.FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    case = bridge.make(request.param, tmp_path_factory.mktemp("bridge"))
    with torch.no_grad():
        _, cache = case.lvlm.run_with_cache(**case.inputs)
        return cp.to_activation_cache(cache, neurons=True), case.theirs, case


def same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tool", TOOLS)
@torch.no_grad()
def test_a_tool_gives_the_same_on_both(both: Both, tool: str) -> None:
    ours, theirs, _ = both
    same(TOOLS[tool](ours), TOOLS[tool](theirs))


def test_labels_and_sizes_are_the_same(both: Both) -> None:
    ours, theirs, _ = both
    for labels in (
        lambda cache: cache.decompose_resid(return_labels=True)[1],
        lambda cache: cache.stack_head_results(incl_remainder=True, return_labels=True)[1],
        lambda cache: cache.logit_lens().labels,
        lambda cache: cache.model.accumulated_bias(3).tolist(),
        lambda cache: cache.model.to_single_token("q"),
    ):
        assert labels(ours) == labels(theirs)
    names = "n_layers n_heads n_key_value_heads d_model d_head d_mlp d_vocab normalization_type gated_mlp attn_only"
    for name in [*names.split(), "final_rms"]:
        assert getattr(ours.model.cfg, name) == getattr(theirs.model.cfg, name), name


def test_scales_of_the_norms(both: Both) -> None:
    ours, theirs, _ = both
    for name in ("ln_final", *(f"blocks.{layer}.ln{n}" for layer in range(4) for n in (1, 2))):
        torch.testing.assert_close(
            ours[f"{name}.hook_scale"], theirs[f"{name}.hook_scale"], rtol=1e-5, atol=0
        )


def test_the_parts_add_up_where_the_bridge_s_do_not(both: Both) -> None:
    """At visual tokens the bridge starts from the placeholder's embedding, we from the image feature."""
    ours, theirs, case = both
    visual = case.lvlm.spans(case.inputs).visual
    out = ours["resid_post", -1]
    torch.testing.assert_close(ours.decompose_resid().sum(0), out, rtol=1e-4, atol=1e-5)
    sums = theirs.decompose_resid().sum(0)
    torch.testing.assert_close(sums[~visual], out[~visual], rtol=1e-4, atol=1e-5)
    assert (sums[visual] - out[visual]).abs().max() > 1e-3


#: Attributions to logits, by name; a bridge gives the model's own in compatibility mode only, with weights folded.
ATTRIBUTIONS: dict[str, Callable[[ActivationCache], Tensor]] = {
    "logit_attrs": lambda cache: cache.logit_attrs(
        cache.decompose_resid(incl_embeds=False), 7, incorrect_tokens=9
    ),
    "direct_logit_attribution": lambda cache: attribution(cache, "component"),
    "direct_logit_attribution, layers": lambda cache: attribution(cache, "layer"),
}
HEAD_ATTRIBUTIONS: dict[str, Callable[[ActivationCache], Tensor]] = {
    "logit_attrs of words": lambda cache: cache.logit_attrs(
        cache.stack_head_results(pos_slice=-1), "a", incorrect_tokens="b", pos_slice=-1, has_batch_dim=False
    ),
    "direct_logit_attribution": lambda cache: attribution(cache, "head"),
}


def attribution(cache: ActivationCache, unit: str) -> Tensor:
    return direct_logit_attribution(
        cache.model, answer_tokens="q", incorrect_tokens=11, unit=unit, cache=cache
    ).attribution


@pytest.fixture(scope="module")
def folded(both: Both, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """The cache of another bridge around the same weights, in compatibility mode."""
    case = bridge.make(both[2].family, tmp_path_factory.mktemp("folded"))
    case.bridge.enable_compatibility_mode()
    return bridge.run(case.bridge, case.inputs)[1]


@pytest.mark.parametrize("tool", ATTRIBUTIONS)
@torch.no_grad()
def test_attributions_are_those_of_a_bridge_with_folded_weights(
    both: Both, folded: ActivationCache, tool: str
) -> None:
    same(ATTRIBUTIONS[tool](both[0]), ATTRIBUTIONS[tool](folded))


@pytest.mark.parametrize("both", ["llava"], indirect=True)  # it takes Qwen's value biases out of the heads
@pytest.mark.parametrize("tool", HEAD_ATTRIBUTIONS)
@torch.no_grad()
def test_attributions_of_heads_too(both: Both, folded: ActivationCache, tool: str) -> None:
    same(HEAD_ATTRIBUTIONS[tool](both[0]), HEAD_ATTRIBUTIONS[tool](folded))


# -- every family, batches with padding


def wrap(family: str, **text: Any) -> cp.HookedLVLM:
    return cp.HookedLVLM(models.build(family, **text), processors.shared(family))


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
@torch.no_grad()
def test_what_the_tools_say_is_so(family: str) -> None:
    lvlm, inputs = wrap(family), tiny.inputs(family)
    out, cache = lvlm.run_with_cache(**inputs)
    lens = cp.to_activation_cache(cache, neurons=True)
    assert isinstance(lens, ActivationCache)
    assert (
        lens["pattern", 0].data_ptr() == cache["blocks.0.attn.hook_pattern"].data_ptr()
    )  # shared, not copied
    last = cache["blocks.3.hook_resid_post"]
    tight = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(lens.decompose_resid().sum(0), last, **tight)
    torch.testing.assert_close(lens.get_full_resid_decomposition(expand_neurons=True).sum(0), last, **tight)
    heads = lens.stack_head_results(1).sum(0)
    torch.testing.assert_close(heads, cache["blocks.0.hook_attn_out"], **tight)
    neurons = lens.get_neuron_results(2).sum(dim=-2)
    torch.testing.assert_close(neurons, cache["blocks.2.hook_mlp_out"], **tight)
    logits = lens.logit_lens(positions=None).readout.values
    torch.testing.assert_close(logits[-1], out.logits, **tight)
    attributions = lens.logit_attrs(lens.decompose_resid(), 9)
    torch.testing.assert_close(attributions.sum(0), out.logits[..., 9], **tight)
    shares = direct_logit_attribution(lens.model, answer_tokens=9, cache=lens).attribution
    torch.testing.assert_close(shares.sum(0), out.logits[:, -1, 9], **tight)


@pytest.mark.parametrize("name", towers.MEASURED)
@torch.no_grad()
def test_attributions_of_other_towers_add_up_to_their_logits(name: str) -> None:
    """Gemma's norms multiply by one more than their weight; a mixture of experts has no neurons of one projection."""
    model, inputs = towers.build(name), tiny.inputs("llava")
    model.model.language_model.norm.weight.uniform_(0.5, 2)
    out, cache = cp.HookedLVLM(model).run_with_cache(**inputs)
    lens = cp.to_activation_cache(cache)
    attributions = lens.logit_attrs(lens.get_full_resid_decomposition(expand_neurons=False), 9)
    torch.testing.assert_close(attributions.sum(0), out.logits[..., 9], rtol=1e-4, atol=1e-4)
    if "experts" in name:
        with pytest.raises(CapaProbeError, match="neurons of a Qwen3MoeSparseMoeBlock were asked for"):
            cp.to_activation_cache(cache, neurons=True)
        with pytest.raises(CapaProbeError, match="no one output projection"):
            _ = lens.model.blocks[1].mlp.W_out


@torch.no_grad()
def test_other_norms_than_rms_are_refused() -> None:
    vision, text = tiny.shared("llava").config.vision_config, StableLmConfig(**tiny.TEXT)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tiny.IMAGE, image_seq_length=16
    )
    lvlm = cp.HookedLVLM(LlavaForConditionalGeneration(config).eval())
    _, cache = lvlm.run_with_cache(**tiny.inputs("llava"))
    with pytest.raises(CapaProbeError, match="The text tower has a LayerNorm, whose scale"):
        cp.to_activation_cache(cache)


@torch.no_grad()
def test_output_biases_are_counted_once() -> None:
    lvlm = wrap("llava", attention_bias=True, mlp_bias=True)
    layer = lvlm.family.layers(lvlm.model)[0]
    assert layer.self_attn.o_proj.bias.abs().min() > 0
    _, cache = lvlm.run_with_cache(**tiny.inputs("llava"))
    lens = cp.to_activation_cache(cache, neurons=True)
    for options in ({"expand_neurons": True}, {"expand_neurons": False}):
        parts, labels = lens.get_full_resid_decomposition(2, mlp_input=True, return_labels=True, **options)
        torch.testing.assert_close(parts.sum(0), cache["blocks.2.hook_resid_mid"], rtol=1e-4, atol=1e-5)
        assert labels[-1] == "bias"
        assert parts[-1].abs().min() > 0


@torch.no_grad()
def test_part_of_a_cache_serves_the_tools_that_need_no_more() -> None:
    lvlm, inputs = wrap("internvl"), tiny.inputs("internvl")
    _, cache = lvlm.run_with_cache(
        **inputs, names_filter=lambda name: name.endswith(("resid_pre", "resid_post"))
    )
    lens = cp.to_activation_cache(cache)
    assert lens.accumulated_resid().shape == (5, *cache["blocks.0.hook_resid_pre"].shape)
    with pytest.raises(KeyError, match="hook_z"):
        lens.stack_head_results()


@torch.no_grad()
def test_without_the_batch_axis() -> None:
    lvlm, inputs = wrap("llava"), tiny.inputs("llava", images=(1,), tail=(3,))
    _, cache = lvlm.run_with_cache(**inputs, remove_batch_dim=True)
    lens = cp.to_activation_cache(cache)
    assert not lens.has_batch_dim
    assert lens.stack_head_results(1).shape == (4, inputs["input_ids"].shape[1], 32)
    torch.testing.assert_close(
        lens.decompose_resid().sum(0), cache["blocks.3.hook_resid_post"], rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_half_precision() -> None:
    lvlm, inputs = cp.HookedLVLM(tiny.build("llava").bfloat16()), tiny.inputs("llava")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    _, cache = lvlm.run_with_cache(**inputs)
    lens = cp.to_activation_cache(cache)
    assert lens["blocks.1.ln1.hook_scale"].dtype == torch.float32
    parts = lens.decompose_resid().float().sum(0)
    torch.testing.assert_close(parts, cache["blocks.3.hook_resid_post"].float(), rtol=0.05, atol=0.05)


# -- what it is not made of


@torch.no_grad()
def test_a_plain_dict_needs_its_model() -> None:
    lvlm, inputs = wrap("llava"), tiny.inputs("llava")
    _, cache = lvlm.run_with_cache(**inputs)
    assert isinstance(cache, HookedCache)
    plain = {name: tensor.clone() for name, tensor in cache.items()}
    with pytest.raises(
        CapaProbeError, match=r"A dict was given, which does not say of which model .* pass lvlm"
    ):
        cp.to_activation_cache(plain)
    torch.testing.assert_close(
        cp.to_activation_cache(plain, lvlm).decompose_resid(), cp.to_activation_cache(cache).decompose_resid()
    )


@torch.no_grad()
def test_a_copied_or_saved_cache_takes_no_model_along() -> None:
    _, cache = wrap("llava").run_with_cache(**tiny.inputs("llava"), names_filter="hook_embed")
    assert type(copy.copy(cache)) is type(copy.deepcopy(cache)) is OrderedDict
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is OrderedDict
    assert torch.equal(loaded["hook_embed"], cache["hook_embed"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "An empty dict was given; give the cache that lvlm.run_with_cache returned"),
        (17, "A int was given; give the cache"),
        (
            {"blocks.9.hook_z": torch.zeros(1)},
            "holds blocks.9.hook_z, which is no hook point of this model of 4 layers",
        ),
    ],
)
def test_what_is_no_cache(given: Any, message: str) -> None:
    with pytest.raises(CapaProbeError, match=message) as error:
        cp.to_activation_cache(given, cp.HookedLVLM(tiny.shared("llava")))
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_words_need_a_processor_and_must_be_one_token() -> None:
    _, cache = wrap("llava").run_with_cache(**tiny.inputs("llava"))
    lens = cp.to_activation_cache(cache)
    with pytest.raises(CapaProbeError, match="'ab' is 2 tokens"):
        lens.logit_attrs(lens.decompose_resid(), "ab")
    bare = cp.to_activation_cache(cache, cp.HookedLVLM(tiny.shared("llava")))
    with pytest.raises(CapaProbeError, match="'a' was given for a model without a processor"):
        bare.logit_attrs(bare.decompose_resid(), "a")
    assert bare.logit_attrs(bare.decompose_resid(), torch.tensor([3, 4, 5])).shape[0] == 9


def test_neurons_leave_no_hook_and_disturb_none() -> None:
    lvlm, inputs, seen = wrap("qwen2_5_vl"), tiny.inputs("qwen2_5_vl"), []
    mlp = lvlm.family.layers(lvlm.model)[1].mlp
    with torch.no_grad():
        _, cache = lvlm.run_with_cache(**inputs)
        handle = mlp.register_forward_hook(lambda *_: seen.append(1))
        lens = cp.to_activation_cache(cache, neurons=True)
    handle.remove()
    assert seen == []
    assert not mlp.down_proj._forward_pre_hooks
    assert lens["post", 1].shape == (*inputs["input_ids"].shape, 48)

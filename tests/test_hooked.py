"""HookedLVLM: identical logits, every activation where its name says it is, and nothing left behind."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from tests import tiny

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
SIDES = pytest.mark.parametrize("side", ["left", "right"])
BACKENDS = pytest.mark.parametrize("attn", ["sdpa", "eager"])
LAYER = 2


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def decoder(model: PreTrainedModel) -> Any:
    return model.model.language_model


def state(model: PreTrainedModel) -> tuple[int, list[str], str]:
    """What a wrapper could leave behind: hooks, backends, and how the model prints."""
    hooks = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )
    backends = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    return hooks, backends, repr(model)


def built(family: str) -> PreTrainedModel:
    """A model of one's own that has run once: on its first forward transformers puts hooks of its own on it."""
    model = tiny.build(family)
    model(**tiny.inputs(family))
    return model


def everything(lvlm: cp.HookedLVLM) -> list[Any]:
    return [(name, lambda x, hook: None) for name in lvlm.hook_dict]


class TestLogits:
    @FAMILIES
    @BACKENDS
    @SIDES
    def test_are_bit_identical_whoever_listens(self, family: str, attn: str, side: str) -> None:
        model, inputs = tiny.shared(family, attn), tiny.inputs(family, padding_side=side)
        plain, before = model(**inputs).logits, state(model)
        lvlm = cp.HookedLVLM(model)
        assert torch.equal(lvlm(**inputs).logits, plain)
        assert torch.equal(lvlm.run_with_hooks(**inputs, fwd_hooks=everything(lvlm)).logits, plain)
        out, cache = lvlm.run_with_cache(**inputs)
        assert torch.equal(out.logits, plain)
        assert set(cache) == set(lvlm.hook_dict)
        assert torch.equal(model(**inputs).logits, plain)
        assert state(model) == before

    @FAMILIES
    def test_are_bit_identical_during_generation(self, family: str) -> None:
        model, inputs = tiny.shared(family), tiny.inputs(family)
        wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        lvlm = cp.HookedLVLM(model)
        with lvlm.hooks(everything(lvlm)):
            assert torch.equal(lvlm.model.generate(**inputs, max_new_tokens=4, do_sample=False), wanted)

    @FAMILIES
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_half_precision(self, family: str, dtype: torch.dtype) -> None:
        model = tiny.build(family).to(dtype)
        inputs = tiny.inputs(family)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        plain = model(**inputs).logits
        out, cache = cp.HookedLVLM(model).run_with_cache(**inputs)
        assert torch.equal(out.logits, plain)
        assert cache["blocks.1.attn.hook_pattern"].dtype == torch.float32
        assert cache["blocks.1.hook_resid_mid"].dtype == dtype


@pytest.fixture(scope="module", params=tiny.FAMILY_NAMES)
def seen(request: pytest.FixtureRequest) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """A family, what run_with_cache gives, and the same from an eager copy by plain module hooks and arithmetic."""
    family = request.param
    inputs = tiny.inputs(family, padding_side="left")
    with torch.no_grad():
        _, cache = cp.HookedLVLM(tiny.shared(family)).run_with_cache(**inputs)
        return family, cache, by_hand(tiny.shared(family, "eager"), inputs)


def by_hand(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layer, kept, handles = decoder(model).layers[LAYER], {}, []

    def keep_output(name: str, module: nn.Module) -> None:
        def hook(_: Any, args: Any, output: Any) -> None:
            kept[name] = (output[0] if isinstance(output, tuple) else output).clone()

        handles.append(module.register_forward_hook(hook))

    attention = layer.self_attn
    keep_output("attn_out", attention)
    keep_output("mlp_out", layer.mlp)
    keep_output("mlp_in", layer.post_attention_layernorm)
    for name in ("q", "k", "v"):
        keep_output(name, getattr(attention, f"{name}_proj"))
    keep_output("rotary", decoder(model).rotary_emb)

    def keep_rotary(_: Any, args: Any, output: Any) -> None:
        kept["cos"], kept["sin"] = output

    handles.append(decoder(model).rotary_emb.register_forward_hook(keep_rotary))
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()

    batch, length = inputs["input_ids"].shape
    heads = {name: kept[name].view(batch, length, -1, 8) for name in ("q", "k", "v")}
    cos, sin = kept["cos"], kept["sin"]
    if cos.ndim == 4:  # M-RoPE: each slice of the head takes the angles of time, row or column
        sections = model.config.text_config.rope_parameters["mrope_section"] * 2
        cos, sin = (
            torch.cat([part[i % 3] for i, part in enumerate(x.split(sections, dim=-1))], dim=-1)
            for x in (cos, sin)
        )

    def rotate(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * cos[:, :, None] + turned * sin[:, :, None]

    pattern = out.attentions[LAYER]
    z = torch.stack([pattern[:, h] @ heads["v"][:, :, h // 2] for h in range(4)], dim=2)
    pre = out.hidden_states[LAYER]
    return {
        "hook_embed": out.hidden_states[0],
        "hook_resid_pre": pre,
        "attn.hook_rot_q": rotate(heads["q"]),
        "attn.hook_rot_k": rotate(heads["k"]),
        "attn.hook_v": heads["v"],
        "attn.hook_pattern": pattern,
        "attn.hook_z": z,
        "hook_attn_out": kept["attn_out"],
        "hook_resid_mid": pre + kept["attn_out"],
        "mlp.hook_in": kept["mlp_in"],
        "hook_mlp_out": kept["mlp_out"],
        "hook_resid_post": pre + kept["attn_out"] + kept["mlp_out"],
    }


class TestActivations:
    NAMES = (
        "hook_embed",
        "hook_resid_pre",
        "attn.hook_rot_q",
        "attn.hook_rot_k",
        "attn.hook_v",
        "attn.hook_pattern",
        "attn.hook_z",
        "hook_attn_out",
        "hook_resid_mid",
        "mlp.hook_in",
        "hook_mlp_out",
        "hook_resid_post",
    )

    def test_no_hook_point_is_unknown_to_this_test(self, seen: Any) -> None:
        _, cache, _ = seen
        per_layer = {name.split(".", 2)[2] for name in cache if name.startswith(f"blocks.{LAYER}.")}
        assert per_layer | {"hook_embed"} == set(self.NAMES)

    @pytest.mark.parametrize("name", NAMES)
    def test_is_what_its_name_says(self, seen: Any, name: str) -> None:
        family, cache, wanted = seen
        found = cache[name if name == "hook_embed" else f"blocks.{LAYER}.{name}"]
        real = tiny.inputs(family)["attention_mask"].bool()
        if name == "attn.hook_pattern":  # (batch, head, query, key): padding queries are nobody's business
            found, expected = found.transpose(1, 2)[real], wanted[name].transpose(1, 2)[real]
        else:
            found, expected = found[real], wanted[name][real]
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)

    def test_what_leaves_a_layer_enters_the_next(self, seen: Any) -> None:
        _, cache, _ = seen
        assert torch.equal(cache["blocks.1.hook_resid_post"], cache["blocks.2.hook_resid_pre"])
        assert torch.equal(cache["hook_embed"], cache["blocks.0.hook_resid_pre"])

    def test_names_filters(self) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared("llava")), tiny.inputs("llava")
        one, several = "blocks.1.hook_mlp_out", ["blocks.0.attn.hook_z", "hook_embed"]
        assert set(lvlm.run_with_cache(**inputs, names_filter=one)[1]) == {one}
        assert set(lvlm.run_with_cache(**inputs, names_filter=several)[1]) == set(several)
        _, cache = lvlm.run_with_cache(**inputs, names_filter=lambda name: name.endswith("hook_pattern"))
        assert set(cache) == {f"blocks.{i}.attn.hook_pattern" for i in range(4)}

    @FAMILIES
    def test_decode_steps_see_one_query_and_all_keys(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), tiny.inputs(family)
        shapes: dict[str, list[tuple[int, ...]]] = {}
        names = [f"blocks.1.{name}" for name in ("attn.hook_pattern", "attn.hook_rot_k", "hook_resid_pre")]
        note = [
            (name, lambda x, hook: shapes.setdefault(hook.name, []).append(tuple(x.shape))) for name in names
        ]
        with lvlm.hooks(note):
            lvlm.model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
        batch, n = inputs["input_ids"].shape
        assert shapes[names[0]] == [(batch, 4, n, n), (batch, 4, 1, n + 1), (batch, 4, 1, n + 2)]
        assert shapes[names[1]] == [(batch, n, 2, 8), (batch, n + 1, 2, 8), (batch, n + 2, 2, 8)]
        assert shapes[names[2]] == [(batch, n, 32), (batch, 1, 32), (batch, 1, 32)]


class TestRefusals:
    def test_other_models(self) -> None:
        text_only = LlamaForCausalLM(LlamaConfig(**tiny.TEXT))
        with pytest.raises(CapaProbeError, match=r"llama.*llava.*qwen2_5_vl.*internvl.*lvlm/families\."):
            cp.HookedLVLM(text_only)
        with pytest.raises(CapaProbeError, match="type Linear was given"):
            cp.HookedLVLM(nn.Linear(2, 2))

    def test_a_hook_that_never_fires_is_reported(self) -> None:
        lvlm = cp.HookedLVLM(tiny.shared("llava"))
        inputs = {name: value for name, value in tiny.inputs("llava").items() if name != "pixel_values"}
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE, 5)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lvlm.run_with_hooks(**inputs, fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: None)])
        model = built("llava")
        lvlm = cp.HookedLVLM(model)
        model.config.text_config.num_hidden_layers = 2  # the decoder now stops after two layers
        with pytest.warns(UserWarning, match=r"never fired: blocks\.3\.hook_mlp_out"):
            lvlm.run_with_hooks(**inputs, fwd_hooks=[("blocks.3.hook_mlp_out", lambda x, hook: None)])

    def test_repr_says_what_it_is(self) -> None:
        assert repr(cp.HookedLVLM(tiny.shared("qwen2_5_vl"))) == (
            "HookedLVLM(Qwen2_5_VLForConditionalGeneration, family='qwen2_5_vl', layers=4, d_model=32, "
            "attention='sdpa', device='cpu')"
        )

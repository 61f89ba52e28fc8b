"""A hook that returns a tensor, or writes into one, changes the forward as the same edit made by hand would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from tests import tiny

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
LAYER = 1

Edit = Callable[[Tensor, Any], Tensor | None]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def layer_of(model: PreTrainedModel, index: int = LAYER) -> Any:
    return model.model.language_model.layers[index]


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], n: int = 4, **options: Any) -> Tensor:
    """Logits of n generated tokens: (step, batch, vocabulary)."""
    out = model.generate(
        **inputs,
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(out.logits)


def with_module_edit(module: Any, edit: Callable[[Tensor], Tensor], run: Callable[[], Any]) -> Any:
    """Run with the (first) output of a module changed by an ordinary PyTorch hook."""

    def hook(_: Any, args: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = module.register_forward_hook(hook)
    try:
        return run()
    finally:
        handle.remove()


MODULES = {
    "hook_mlp_out": lambda layer: layer.mlp,
    "hook_attn_out": lambda layer: layer.self_attn,
    "hook_resid_post": lambda layer: layer,
    "mlp.hook_in": lambda layer: layer.post_attention_layernorm,
}


class TestEdits:
    @FAMILIES
    @pytest.mark.parametrize("name", MODULES)
    @pytest.mark.parametrize("in_place", [False, True])
    def test_of_block_activations(self, family: str, name: str, in_place: bool) -> None:
        model, inputs = tiny.shared(family), tiny.inputs(family)
        wanted = with_module_edit(
            MODULES[name](layer_of(model)), lambda x: 0.5 * x, lambda: model(**inputs).logits
        )
        edit: Edit = (lambda x, hook: x.mul_(0.5)) if in_place else (lambda x, hook: 0.5 * x)
        found = cp.HookedLVLM(model).run_with_hooks(**inputs, fwd_hooks=[(f"blocks.{LAYER}.{name}", edit)])
        torch.testing.assert_close(found.logits, wanted, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(wanted, model(**inputs).logits, atol=1e-4)

    @FAMILIES
    def test_of_the_residual_stream_reach_both_branches(self, family: str) -> None:
        """resid_mid enters the norm and is also what the FFN's output is added to."""
        model, inputs = tiny.shared(family), tiny.inputs(family)
        lvlm, name = cp.HookedLVLM(model), f"blocks.{LAYER}.hook_resid_mid"
        wanted = with_module_edit(
            layer_of(model).self_attn, lambda x: x + 1.0, lambda: model(**inputs).logits
        )
        found = lvlm.run_with_hooks(**inputs, fwd_hooks=[(name, lambda x, hook: x + 1.0)])
        torch.testing.assert_close(found.logits, wanted, rtol=1e-4, atol=1e-5)
        found = lvlm.run_with_hooks(
            **inputs, fwd_hooks=[(f"blocks.{LAYER}.hook_resid_pre", lambda x, hook: 0 * x)]
        )
        before = with_module_edit(layer_of(model, LAYER - 1), lambda x: 0 * x, lambda: model(**inputs).logits)
        torch.testing.assert_close(found.logits, before, rtol=1e-5, atol=1e-6)

    @FAMILIES
    def test_of_the_embeddings(self, family: str) -> None:
        """Without the image features nothing of the image is left."""
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), tiny.inputs(family)
        visual = lvlm.spans(inputs).visual[..., None]
        blind = [("hook_embed", lambda x, hook: x.masked_fill(visual, 0.0))]
        other = tiny.inputs(family) | {"pixel_values": torch.randn_like(inputs["pixel_values"])}
        one, two = (lvlm.run_with_hooks(**batch, fwd_hooks=blind).logits for batch in (inputs, other))
        assert torch.equal(one, two)
        assert not torch.allclose(lvlm(**inputs).logits, lvlm(**other).logits, atol=1e-3)

    @FAMILIES
    @pytest.mark.parametrize("attn", ["sdpa", "eager"])
    def test_of_the_pattern_recompute_z(self, family: str, attn: str) -> None:
        model, inputs = tiny.shared(family, attn), tiny.inputs(family)
        lvlm, name = cp.HookedLVLM(model), f"blocks.{LAYER}.attn.hook_pattern"
        same = lvlm.run_with_hooks(**inputs, fwd_hooks=[(name, lambda x, hook: x.clone())]).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(same[real], model(**inputs).logits[real], rtol=1e-3, atol=1e-4)

        # All heads look at the first real token alone: z is its value vector everywhere.
        first = inputs["attention_mask"].argmax(dim=1)

        def look_at_first(x: Tensor, hook: Any) -> Tensor:
            return torch.nn.functional.one_hot(first, x.shape[-1])[:, None, None].expand_as(x).float()

        kept: dict[str, Tensor] = {}
        keep = [
            (f"blocks.{LAYER}.attn.{point}", lambda x, hook: kept.update({hook.name: x.clone()}))
            for point in ("hook_z", "hook_v")
        ]
        lvlm.run_with_hooks(**inputs, fwd_hooks=[(name, look_at_first), *keep])
        z, v = kept[f"blocks.{LAYER}.attn.hook_z"], kept[f"blocks.{LAYER}.attn.hook_v"]
        for b in range(len(first)):
            for head in range(4):
                wanted = v[b, first[b], head // 2].expand_as(z[b, :, head])
                torch.testing.assert_close(z[b, :, head], wanted, rtol=1e-5, atol=1e-6)

    @FAMILIES
    def test_of_the_query_and_z(self, family: str) -> None:
        model, inputs = tiny.shared(family), tiny.inputs(family)
        lvlm, real = cp.HookedLVLM(model), inputs["attention_mask"].bool()
        # A query of zero looks everywhere alike.
        kept: list[Tensor] = []
        lvlm.run_with_hooks(
            **inputs,
            fwd_hooks=[
                (f"blocks.{LAYER}.attn.hook_rot_q", lambda x, hook: 0 * x),
                (f"blocks.{LAYER}.attn.hook_pattern", lambda x, hook: kept.append(x.clone())),
            ],
        )
        row = kept[0][0, :, -1]
        torch.testing.assert_close(row, (real[0] / real[0].sum()).expand_as(row))
        nothing = lvlm.run_with_hooks(
            **inputs, fwd_hooks=[(f"blocks.{LAYER}.attn.hook_z", lambda x, hook: 0 * x)]
        )
        bias = getattr(layer_of(model).self_attn.o_proj, "bias", None)
        wanted = with_module_edit(
            layer_of(model).self_attn,
            lambda x: torch.zeros_like(x) if bias is None else bias.expand_as(x),
            lambda: model(**inputs).logits,
        )
        torch.testing.assert_close(nothing.logits, wanted, rtol=1e-5, atol=1e-6)


class TestThroughTheCache:
    @FAMILIES
    def test_an_edit_of_v_at_prefill_lasts(self, family: str) -> None:
        model, inputs = tiny.shared(family), tiny.inputs(family)
        lvlm, length = cp.HookedLVLM(model), inputs["input_ids"].shape[1]
        visual = lvlm.spans(inputs).visual

        def silence(x: Tensor, hook: Any) -> Tensor | None:
            return x.masked_fill(visual[..., None, None], 0.0) if x.shape[1] == length else None

        with lvlm.hooks([(f"blocks.{LAYER}.attn.hook_v", silence)]):
            found = generate(lvlm.model, inputs)

        def by_hand(x: Tensor) -> Tensor:
            return x.masked_fill(visual[..., None], 0.0) if x.shape[1] == length else x

        wanted = with_module_edit(layer_of(model).self_attn.v_proj, by_hand, lambda: generate(model, inputs))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        # It differs from the plain run at every step, the decode steps included.
        assert ((found - generate(model, inputs)).abs().amax(dim=(1, 2)) > 1e-4).all()

    @FAMILIES
    def test_edits_reach_every_step_of_generation(self, family: str) -> None:
        model, inputs = tiny.shared(family), tiny.inputs(family)
        lvlm = cp.HookedLVLM(model)
        with lvlm.hooks([(f"blocks.{LAYER}.hook_mlp_out", lambda x, hook: 0 * x)]):
            found = generate(lvlm.model, inputs)
        wanted = with_module_edit(layer_of(model).mlp, lambda x: 0 * x, lambda: generate(model, inputs))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)

    @FAMILIES
    def test_an_edit_of_rotated_keys_is_refused_while_a_cache_is_written(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), tiny.inputs(family)
        edit = [(f"blocks.{LAYER}.attn.hook_rot_k", lambda x, hook: 0 * x)]
        with (
            lvlm.hooks(edit),
            pytest.raises(CapaProbeError, match=r"blocks\.1\.attn\.hook_rot_k.*use_cache=False"),
        ):
            generate(lvlm.model, inputs)
        with lvlm.hooks([(edit[0][0], lambda x, hook: None)]):  # looking is fine
            generate(lvlm.model, inputs, n=2)
        kept: list[Tensor] = []
        look = (f"blocks.{LAYER}.attn.hook_pattern", lambda x, hook: kept.append(x.clone()))
        lvlm.run_with_hooks(**inputs, use_cache=False, fwd_hooks=[*edit, look])
        real = inputs["attention_mask"][0].bool()
        torch.testing.assert_close(kept[0][0, :, -1], (real / real.sum()).expand_as(kept[0][0, :, -1]))

    @FAMILIES
    def test_in_place_edits_under_inference_mode(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), tiny.inputs(family)
        name = f"blocks.{LAYER}.attn.hook_rot_q"
        by_return = lvlm.run_with_hooks(**inputs, fwd_hooks=[(name, lambda x, hook: 0.1 * x)]).logits
        with torch.inference_mode():
            in_place = lvlm.run_with_hooks(**inputs, fwd_hooks=[(name, lambda x, hook: x.mul_(0.1))]).logits
        torch.testing.assert_close(in_place, by_return, rtol=1e-5, atol=1e-6)


POINTS = (
    "hook_resid_pre",
    "hook_mlp_out",
    "attn.hook_v",
    "attn.hook_z",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
)


@FAMILIES
def test_gradients_flow_through_hook_points(family: str) -> None:
    """Kept activations are part of the graph, and backward hooks see the same gradients: attribution needs both."""
    model, inputs = tiny.build(family), tiny.inputs(family)
    lvlm, kept, seen = cp.HookedLVLM(model), {}, {}
    names = [f"blocks.{LAYER}.{point}" for point in POINTS]

    def keep(x: Tensor, hook: Any) -> None:
        x.retain_grad()
        kept[hook.name] = x

    with torch.enable_grad():
        lvlm.run_with_hooks(**inputs, use_cache=False, fwd_hooks=[(name, keep) for name in names]).logits[
            :, -1
        ].sum().backward()
        note = [(name, lambda g, hook: seen.update({hook.name: g.clone()})) for name in names]
        with lvlm.hooks(bwd_hooks=note):
            lvlm(**inputs, use_cache=False).logits[:, -1].sum().backward()
    for name in names:
        assert kept[name].grad.abs().sum() > 0, name
        torch.testing.assert_close(seen[name], kept[name].grad, rtol=1e-4, atol=1e-6)

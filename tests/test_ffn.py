"""Visual tokens bypass the FFN for real, and what they get instead is what a full forward edited afterwards gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import capa_probe as cp
from capa_probe.pruning.ffn import HadamardFFN, SkipFFN
from capa_probe.pruning.visual_ffn import VisualFFN
from tests import ffn_reference as naive
from tests import planted, tiny

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
X = pytest.mark.parametrize("x", ["residual", "normed"])
D_MODEL, D_MLP = tiny.TEXT["hidden_size"], tiny.TEXT["intermediate_size"]
LAYERS = (1, 3)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def wrap(family: str, attn: str = "sdpa") -> cp.HookedLVLM:
    return cp.HookedLVLM(tiny.shared(family, attn))


def factors(x: str = "residual", layers: tuple[int, ...] = LAYERS, seed: int = 0) -> HadamardFFN:
    generator = torch.Generator().manual_seed(seed)
    return HadamardFFN({layer: 1 + torch.randn(D_MODEL, generator=generator) for layer in layers}, x)


def reference(ffn: VisualFFN, visual: Tensor) -> naive.Hooks:
    """Hooks that do the same to a full forward."""
    if isinstance(ffn, HadamardFFN):
        update = naive.hadamard(ffn.alpha, ffn.x)
    else:
        update = lambda layer, residual, normed: torch.zeros_like(residual)  # noqa: E731
    at_prefill = lambda layer: visual if visual is not None else None  # noqa: E731
    return naive.overwriting(ffn.layers, at_prefill, update)


def module_hooks(model: Any) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if module._forward_pre_hooks or module._forward_hooks or module._forward_hooks_always_called
    ]


class TestForward:
    @FAMILIES
    @X
    @pytest.mark.parametrize("padding_side", ["left", "right"])
    def test_hadamard_equals_a_full_forward_edited_afterwards(
        self, family: str, x: str, padding_side: str
    ) -> None:
        lvlm, inputs, ffn = wrap(family), tiny.inputs(family, padding_side=padding_side), factors(x)
        spans = lvlm.spans(inputs)
        wanted = lvlm.run_with_hooks(**inputs, fwd_hooks=reference(ffn, spans.visual)).logits
        with ffn.attach(lvlm):
            found = lvlm.model(**inputs).logits
        real = ~spans.padding
        torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-6)
        assert (found - lvlm.model(**inputs).logits)[real].abs().max() > 0.1

    @FAMILIES
    def test_skip_adds_nothing(self, family: str) -> None:
        lvlm, inputs, ffn = wrap(family), tiny.inputs(family), SkipFFN(LAYERS)
        spans = lvlm.spans(inputs)
        wanted = lvlm.run_with_hooks(**inputs, fwd_hooks=reference(ffn, spans.visual)).logits
        with ffn.attach(lvlm):
            found = lvlm.model(**inputs).logits
            _, cache = lvlm.run_with_cache(**inputs, names_filter="blocks.1.hook_mlp_out")
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        assert not cache["blocks.1.hook_mlp_out"][spans.visual].any()
        with factors().only([1]).attach(lvlm):
            assert not torch.allclose(lvlm.model(**inputs).logits, found, atol=1e-3)

    @FAMILIES
    def test_alpha_of_one_is_skip(self, family: str) -> None:
        lvlm, inputs = wrap(family), tiny.inputs(family)
        with SkipFFN(LAYERS).attach(lvlm):
            wanted = lvlm.model(**inputs).logits
        with HadamardFFN({layer: torch.ones(D_MODEL) for layer in LAYERS}).attach(lvlm):
            assert torch.equal(lvlm.model(**inputs).logits, wanted)

    @FAMILIES
    def test_a_batch_is_its_samples_one_by_one(self, family: str) -> None:
        """Padding goes through the FFN with the text; no real token depends on it."""
        lvlm, ffn = wrap(family), factors()
        for side in ("left", "right"):
            inputs = tiny.inputs(family, images=(1, 2), padding_side=side)
            last = lvlm.spans(inputs).last
            alone = tiny.inputs(family, images=(1,))
            with ffn.attach(lvlm):
                together, one = lvlm.model(**inputs).logits, lvlm.model(**alone).logits
            torch.testing.assert_close(together[0, last[0]], one[0, -1], rtol=0, atol=2e-6)

    @FAMILIES
    def test_eager_attention(self, family: str) -> None:
        lvlm, inputs, ffn = wrap(family, "eager"), tiny.inputs(family), factors()
        spans = lvlm.spans(inputs)
        wanted = lvlm.run_with_hooks(**inputs, fwd_hooks=reference(ffn, spans.visual)).logits
        with ffn.attach(lvlm):
            found = lvlm.model(**inputs).logits
        torch.testing.assert_close(found[~spans.padding], wanted[~spans.padding], rtol=0, atol=1e-6)

    @FAMILIES
    def test_in_bfloat16_the_product_is_taken_in_float32(self, family: str) -> None:
        lvlm = cp.HookedLVLM(tiny.build(family).to(torch.bfloat16))
        inputs = tiny.inputs(family)
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        visual, ffn = lvlm.spans(inputs).visual, factors()
        names = [f"blocks.1.{name}" for name in ("hook_resid_mid", "hook_mlp_out", "hook_resid_post")]
        with ffn.attach(lvlm):
            _, cache = lvlm.run_with_cache(**inputs, names_filter=names)
        mid, out, post = (cache[name][visual] for name in names)
        assert post.dtype == torch.bfloat16
        assert torch.equal(out, (mid.float() * (ffn.alpha[1] - 1)).bfloat16())
        exact = mid.double() * ffn.alpha[1].double()
        rounding = 2.0**-8 * (mid.double().abs() + exact.abs())
        assert ((post.double() - exact).abs() <= rounding).all()

    @FAMILIES
    def test_gradients_flow_as_in_the_edited_forward(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.build(family)), tiny.inputs(family, images=(1,))
        visual, ffn = lvlm.spans(inputs).visual[..., None], factors()

        def edit(out: Tensor, hook: Any) -> Tensor:
            layer = int(hook.name.split(".")[1])
            return torch.where(visual, mids[layer] * (ffn.alpha[layer] - 1), out)

        mids: dict[int, Tensor] = {}
        keep = lambda x, hook: mids.update({int(hook.name.split(".")[1]): x})  # noqa: E731
        hooks = [(f"blocks.{layer}.hook_resid_mid", keep) for layer in LAYERS]
        hooks += [(f"blocks.{layer}.hook_mlp_out", edit) for layer in LAYERS]
        grads = []
        with torch.enable_grad():
            for attached in (lvlm.hooks(hooks), ffn.attach(lvlm)):
                lvlm.model.zero_grad()
                with attached:
                    lvlm.model(**inputs).logits[0, -1].square().sum().backward()
                grads.append(
                    {n: p.grad.clone() for n, p in lvlm.model.named_parameters() if p.grad is not None}
                )
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)

    @settings(max_examples=25)
    @given(data=st.data())
    def test_any_rows_of_any_layer(self, data: st.DataObject) -> None:
        """Masks that differ by layer, with no row, all rows or none of a sample's."""
        batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
        x = data.draw(st.sampled_from(["residual", "normed"]))
        layers = tuple(sorted(data.draw(st.sets(st.integers(0, 3), min_size=1))))
        rows = {
            layer: data.draw(
                st.none()
                | st.lists(st.booleans(), min_size=batch * length, max_size=batch * length).map(
                    lambda bits: torch.tensor(bits).view(batch, length)
                )
            )
            for layer in layers
        }
        lvlm = _in_dtype(dtype)
        ids = torch.randint(3, 59, (batch, length), generator=torch.Generator().manual_seed(length))
        ffn = factors(x, layers)
        wanted = lvlm.run_with_hooks(
            input_ids=ids,
            fwd_hooks=naive.overwriting(layers, rows.__getitem__, naive.hadamard(ffn.alpha, x)),
        ).logits
        with ffn.attach_rows(lvlm, rows.__getitem__):
            found = lvlm.model(input_ids=ids).logits
        tolerance = 0.15 if dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


_MODELS: dict[torch.dtype, cp.HookedLVLM] = {}


def _in_dtype(dtype: torch.dtype) -> cp.HookedLVLM:
    if dtype not in _MODELS:
        _MODELS[dtype] = cp.HookedLVLM(tiny.build("qwen2_5_vl").to(dtype))
    return _MODELS[dtype]


class TestCost:
    @FAMILIES
    @pytest.mark.parametrize("ffn", [factors(), factors("normed"), SkipFFN(LAYERS)], ids=repr)
    def test_flops_fall_by_the_share_of_the_visual_rows(self, family: str, ffn: VisualFFN) -> None:
        lvlm, inputs = wrap(family), tiny.inputs(family)
        with FlopCounterMode(display=False) as full:
            lvlm.model(**inputs)
        with ffn.attach(lvlm), FlopCounterMode(display=False) as less:
            lvlm.model(**inputs)
        n_visual = int(lvlm.spans(inputs).visual.sum())
        gate_up_down, per_mac = 3, 2
        saved = per_mac * gate_up_down * D_MODEL * D_MLP * n_visual * len(LAYERS)
        assert full.get_total_flops() - less.get_total_flops() == saved

    @FAMILIES
    def test_decode_steps_cost_what_they_cost(self, family: str) -> None:
        lvlm, inputs = wrap(family), tiny.inputs(family)
        calls: list[Any] = []
        mlp = lvlm.family.layers(lvlm.model)[1].mlp
        handle = mlp.register_forward_pre_hook(
            lambda module, args: calls.append((tuple(args[0].shape), len(module._forward_hooks)))
        )
        with factors().attach(lvlm):
            lvlm.model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
        handle.remove()
        prompt = (*inputs["input_ids"].shape, D_MODEL)
        # An earlier hook sees the whole prompt; at decode steps nothing is put on the FFN.
        assert calls == [(prompt, 1), ((3, 1, D_MODEL), 0), ((3, 1, D_MODEL), 0)]


class TestPlanted:
    @pytest.mark.parametrize("family", planted.FAMILIES)
    def test_the_redundant_layers_can_go(self, family: str) -> None:
        truth = planted.plant(family)
        lvlm = cp.HookedLVLM(truth.model, truth.processor)
        fitted = cp.calibrate_hadamard(lvlm, truth.samples, truth.redundant, progress=False)
        inputs = lvlm.prepare(
            [list(s.open_images()) for s in truth.samples], [s.question for s in truth.samples]
        )
        full = lvlm.model(**inputs, logits_to_keep=1).logits[:, -1]
        with fitted.attach(lvlm):
            found = lvlm.model(**inputs, logits_to_keep=1).logits[:, -1]
        wanted = [truth.answers[sample.id] for sample in truth.samples]
        assert truth.processor.tokenizer.convert_ids_to_tokens(found.argmax(dim=1).tolist()) == wanted
        torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-4)
        # Where the FFN turns visual tokens, no factors do.
        turning = sorted({*range(len(truth.plan))} - truth.redundant)
        other = cp.calibrate_hadamard(lvlm, truth.samples, turning, progress=False)
        with other.attach(lvlm):
            changed = lvlm.model(**inputs, logits_to_keep=1).logits[:, -1]
        assert (changed - full).abs().max() > 100 * (found - full).abs().max()

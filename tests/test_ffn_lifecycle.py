"""An FFN approximation that is attached leaves nothing behind, and refuses what it is not for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from capa_probe.pruning.ffn import HadamardFFN, SkipFFN
from tests import tiny
from tests.test_ffn import D_MODEL, FAMILIES, LAYERS, factors, module_hooks, wrap


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class TestLeavesNothingBehind:
    @FAMILIES
    def test_after_the_block(self, family: str) -> None:
        lvlm, inputs, model = wrap(family), tiny.inputs(family), tiny.shared(family)
        before, hooks = lvlm.model(**inputs).logits, module_hooks(model)
        with factors().attach(lvlm):
            lvlm.model(**inputs)
        assert module_hooks(model) == hooks
        assert torch.equal(lvlm.model(**inputs).logits, before)

    @FAMILIES
    def test_after_an_exception_inside_the_ffn(self, family: str) -> None:
        lvlm, inputs, ffn = cp.HookedLVLM(tiny.build(family)), tiny.inputs(family), factors()
        mlp = lvlm.family.layers(lvlm.model)[1].mlp
        with ffn.attach(lvlm):
            wanted = lvlm.model(**inputs).logits
        before = module_hooks(lvlm.model)  # transformers keeps some in the vision tower

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(ZeroDivisionError), ffn.attach(lvlm):  # noqa: PT012
            handle = mlp.down_proj.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                lvlm.model(**inputs)
            handle.remove()
            # The same block goes on, with other shapes too.
            assert torch.equal(lvlm.model(**inputs).logits, wanted)
            lvlm.model(input_ids=torch.arange(3, 9)[None])
            _ = 1 / 0
        assert module_hooks(lvlm.model) == before
        with ffn.attach(lvlm):
            assert torch.equal(lvlm.model(**inputs).logits, wanted)


class TestRefusals:
    def test_attached_twice(self) -> None:
        lvlm, inputs = wrap("llava"), tiny.inputs("llava")
        with factors().attach(lvlm):
            for other in (factors(), SkipFFN([0])):
                with (
                    pytest.raises(CapaProbeError, match="attached to a model that has one already"),
                    other.attach(cp.HookedLVLM(lvlm.model)),
                ):
                    pass
            with pytest.raises(CapaProbeError, match="while an FFN approximation is attached"):
                cp.calibrate_hadamard(lvlm, [inputs], [1])
            lvlm.model(**inputs)
        with factors().attach(lvlm):  # and afterwards again
            lvlm.model(**inputs)

    def test_a_layer_or_a_width_that_the_model_lacks(self) -> None:
        lvlm = wrap("llava")
        before = module_hooks(lvlm.model)
        for ffn, said in (
            (SkipFFN([1, 4]), "SkipFFN is for layer 4, but the model has layers 0 to 3"),
            (HadamardFFN({9: torch.ones(D_MODEL)}), "HadamardFFN is for layer 9"),
            (HadamardFFN({1: torch.ones(16)}), "for a model of width 16, but this one has 32"),
        ):
            with pytest.raises(CapaProbeError, match=said), ffn.attach(lvlm):
                pass
        assert module_hooks(lvlm.model) == before

    @pytest.mark.parametrize("layers", [[], [-1], [1, 1], [1.0], [True], ["1"], 3.5])
    def test_layers_that_are_none(self, layers: Any) -> None:
        with pytest.raises(CapaProbeError, match=r"layers=.* was given; give at least one decoder layer"):
            SkipFFN(layers)
        with pytest.raises(CapaProbeError, match="was given; give at least one decoder layer"):
            cp.calibrate_hadamard(wrap("llava"), [], layers)

    def test_factors_that_are_none(self) -> None:
        with pytest.raises(CapaProbeError, match="factors of layer 1 hold NaN or infinity"):
            HadamardFFN({1: torch.tensor([1.0, float("nan")])})
        with pytest.raises(CapaProbeError, match=r"shape \(3,\) were given for layer 2"):
            HadamardFFN({1: torch.ones(2), 2: torch.ones(3)})
        with pytest.raises(CapaProbeError, match='x=\'mid\' was given; give "residual" or "normed"'):
            HadamardFFN({1: torch.ones(2)}, "mid")  # type: ignore[arg-type]
        with pytest.raises(
            CapaProbeError, match=r"Layers \[2\] were asked of a HadamardFFN for layers \[1, 3\]"
        ):
            factors().only([1, 2])

    def test_masks_of_another_shape(self) -> None:
        lvlm, ids = wrap("llava"), torch.arange(3, 9)[None]
        for mask in (torch.ones(1, 5).bool(), torch.ones(1, 6), torch.ones(6).bool()):
            with (
                factors().attach_rows(lvlm, lambda layer, mask=mask: mask),
                pytest.raises(CapaProbeError, match=r"\(batch, position\) = \(1, 6\); give a bool mask"),
            ):
                lvlm.model(input_ids=ids)

    def test_inputs_in_which_images_cannot_be_found(self) -> None:
        lvlm, inputs = wrap("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
        embeds = lvlm.model.get_input_embeddings()(inputs.pop("input_ids"))
        with pytest.warns(UserWarning, match="no forward"), factors().attach(lvlm):  # noqa: PT031
            with pytest.raises(CapaProbeError, match="A forward without input_ids was run"):
                lvlm.model(inputs_embeds=embeds, **inputs)
            with pytest.raises(CapaProbeError, match="Video input was given"):
                lvlm.model(**tiny.inputs("qwen2_5_vl"), pixel_values_videos=torch.ones(1))

    def test_reprs(self) -> None:
        assert repr(SkipFFN([3, 1])) == "SkipFFN(layers=[1, 3])"
        assert repr(factors()) == (
            "HadamardFFN(layers=[1, 3], x='residual', n_samples=0, n_tokens=0, r2=unknown)"
        )
        assert factors().layers == LAYERS

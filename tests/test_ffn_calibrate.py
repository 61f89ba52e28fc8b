"""Calibration is least squares: against numpy's own, on planted factors, and streamed in whatever pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import capa_probe as cp
from capa_probe.errors import BadImageError, CapaProbeError, LeftOutWarning
from capa_probe.measures import hadamard_alpha
from capa_probe.pruning.calibrate import _fit
from capa_probe.pruning.calibration_run import CalibrationState
from capa_probe.pruning.ffn import HadamardFFN
from tests import ffn_reference as naive
from tests import planted, processors, tiny
from tests.test_ffn import D_MODEL, FAMILIES, X, wrap


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def calibrate(lvlm: cp.HookedLVLM, samples: Any, layers: Any = (1, 3), **options: Any) -> HadamardFFN:
    return cp.calibrate_hadamard(lvlm, samples, layers, progress=False, **options)


def samples(n: int = 6) -> list[cp.Sample]:
    return [cp.Sample(f"q{k}", processors.image(16, 16, k), "what" + " now" * k) for k in range(n)]


class TestLeastSquares:
    @FAMILIES
    @X
    @pytest.mark.parametrize("padding_side", ["left", "right"])
    def test_as_numpy_solves_it(self, family: str, x: Any, padding_side: str) -> None:
        """Several images per sample, none in some, grouped queries, padding, two batches."""
        lvlm = wrap(family)
        batches = [tiny.inputs(family, padding_side=padding_side, seed=seed) for seed in (0, 1)]
        found = calibrate(lvlm, batches, x=x)
        assert found.layers == (1, 3)
        assert (found.x, found.n_samples) == (x, 4)  # one in three has no image
        assert found.n_tokens == sum(int(lvlm.spans(inputs).visual.sum()) for inputs in batches)
        for layer in found.layers:
            alpha, r2 = naive.fit(*naive.activations(lvlm, batches, layer, x))
            np.testing.assert_allclose(found.alpha[layer].numpy(), alpha, rtol=2e-6, atol=1e-7)
            assert found.r2[layer] == pytest.approx(r2, abs=1e-9)
            assert 0.01 < r2 < 0.99

    @X
    def test_agrees_with_the_measure(self, x: Any) -> None:
        lvlm, inputs = wrap("internvl"), tiny.inputs("internvl")
        given_x, y = naive.activations(lvlm, [inputs], 1, x)
        wanted = hadamard_alpha(torch.from_numpy(given_x).float(), torch.from_numpy(y).float())
        torch.testing.assert_close(calibrate(lvlm, [inputs], x=x).alpha[1], wanted, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("family", planted.FAMILIES)
    def test_planted_factors_come_back(self, family: str) -> None:
        truth = planted.plant(family)
        lvlm = cp.HookedLVLM(truth.model, truth.processor)
        found = calibrate(lvlm, truth.samples, range(len(truth.plan)), batch_size=2)
        for layer in range(len(truth.plan)):
            if layer in truth.redundant:
                torch.testing.assert_close(found.alpha[layer], truth.alpha(layer), rtol=0, atol=1e-3)
                assert found.r2[layer] > 1 - 1e-6
            else:
                assert found.r2[layer] < 0.5
        scaled = [layer for layer, plan in enumerate(truth.plan) if plan.visual == "scale"]
        assert all((found.alpha[layer] - 1).abs().max() > 0.02 for layer in scaled)  # not just ones

    @given(
        n=st.integers(1, 12),
        d=st.integers(1, 5),
        pieces=st.integers(1, 4),
        seed=st.integers(0, 10_000),
        offset=st.sampled_from([0.0, 1.0, 50.0]),
    )
    def test_any_data_in_any_pieces(self, n: int, d: int, pieces: int, seed: int, offset: float) -> None:
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(n, d)) + offset
        x[:, rng.random(d) < 0.2] = 0.0
        y = rng.normal(size=d) * x + 0.3 * rng.normal(size=(n, d))
        state = CalibrationState()
        for rows in np.array_split(np.arange(n), pieces):
            a, b = torch.from_numpy(x[rows]), torch.from_numpy(y[rows])
            sums = torch.stack([(a * a).sum(0), (a * b).sum(0), (b * b).sum(0), b.sum(0)])
            state = state.plus({7: sums}, torch.ones(1, len(rows)).bool(), {})
        fitted = _fit(state, "residual", {})
        alpha, r2 = naive.fit(x, y)
        np.testing.assert_allclose(fitted.alpha[7].numpy(), alpha, rtol=1e-5, atol=1e-6)
        assert fitted.r2[7] == pytest.approx(r2, rel=1e-6, abs=1e-6, nan_ok=True)
        assert (fitted.alpha[7][torch.from_numpy(~x.any(axis=0))] == 1).all()

    def test_a_channel_that_is_always_zero_keeps_its_value(self) -> None:
        lvlm = wrap("llava")

        def silence(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[..., 5] = 0.0
            return x

        with lvlm.hooks([("blocks.1.hook_resid_mid", silence)]):
            found = calibrate(lvlm, [tiny.inputs("llava")])
        assert found.alpha[1][5] == 1.0
        assert (found.alpha[1] != 1).sum() == D_MODEL - 1

    @FAMILIES
    def test_half_precision_models_are_measured_in_float64(self, family: str) -> None:
        lvlm = cp.HookedLVLM(tiny.build(family).to(torch.bfloat16))
        inputs = tiny.inputs(family)
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        found = calibrate(lvlm, [inputs])
        names = ["blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"]
        _, cache = lvlm.run_with_cache(**inputs, names_filter=names)
        x, update = (cache[name][lvlm.spans(inputs).visual].double().numpy() for name in names)
        np.testing.assert_allclose(found.alpha[1].numpy(), naive.fit(x, x + update)[0], rtol=2e-6, atol=1e-7)


class TestSamples:
    def test_batches_do_not_matter(self) -> None:
        lvlm = cp.HookedLVLM(tiny.shared("qwen2_5_vl"), processors.shared("qwen2_5_vl"))
        one, three = (calibrate(lvlm, samples(), batch_size=size) for size in (1, 3))
        for layer in one.layers:
            torch.testing.assert_close(one.alpha[layer], three.alpha[layer], rtol=1e-5, atol=1e-6)
        assert (one.n_tokens, one.n_samples) == (three.n_tokens, three.n_samples)
        assert one.manifest["data_fingerprint"] == three.manifest["data_fingerprint"]

    def test_the_limit_counts_rows(self) -> None:
        lvlm = wrap("llava")
        inputs = tiny.inputs("llava", images=(1, 2, 1))
        limited = calibrate(lvlm, [inputs, inputs], limit=2)
        assert (limited.n_samples, limited.n_tokens) == (2, 48)
        cut = {**inputs, "input_ids": inputs["input_ids"][:2], "attention_mask": inputs["attention_mask"][:2]}
        cut["pixel_values"] = inputs["pixel_values"][:3]
        whole = calibrate(lvlm, [cut])
        for layer in whole.layers:
            torch.testing.assert_close(limited.alpha[layer], whole.alpha[layer], rtol=1e-5, atol=1e-6)

    def test_a_layer_does_not_depend_on_the_others(self) -> None:
        lvlm, inputs = wrap("llava"), tiny.inputs("llava")
        together = calibrate(lvlm, [inputs], [3, 0, 2])
        assert together.layers == (0, 2, 3)
        for layer in together.layers:
            assert torch.equal(calibrate(lvlm, [inputs], [layer]).alpha[layer], together.alpha[layer])

    def test_what_is_known_of_it(self) -> None:
        lvlm = cp.HookedLVLM(tiny.shared("llava"), processors.shared("llava"))
        data = [*samples(2), cp.Sample("bad", "/nowhere.png", "what")]
        with pytest.warns(LeftOutWarning, match="1 of 3 samples"):
            found = calibrate(lvlm, data, x="normed", limit=3)
        assert found.manifest["skipped"][0]["sample"] == "bad"
        assert found.manifest["settings"] == {"layers": [1, 3], "x": "normed", "batch_size": 1, "limit": 3}
        for name in ("weights_hash", "config_hash", "data_fingerprint"):
            assert len(found.manifest[name]) == 64
        assert (found.n_samples, found.n_tokens) == (2, 32)
        assert repr(found).startswith("HadamardFFN(layers=[1, 3], x='normed', n_samples=2, n_tokens=32, r2=")
        with pytest.raises(BadImageError):
            calibrate(lvlm, data, strict=True)

    def test_the_model_is_left_as_it_was(self) -> None:
        lvlm, inputs = wrap("llava"), tiny.inputs("llava")
        before = lvlm.model(**inputs).logits
        calibrate(lvlm, [inputs])
        assert torch.equal(lvlm.model(**inputs).logits, before)
        assert all(not point.has_hooks() for point in lvlm.hook_dict.values())


class TestRefusals:
    def test_arguments(self) -> None:
        lvlm, inputs = wrap("llava"), tiny.inputs("llava")
        for options, said in (
            ({"layers": [4]}, "Layer 4 was given, but the model has layers 0 to 3"),
            ({"x": "middle"}, "x='middle' was given"),
            ({"limit": 0}, "limit=0 was given"),
            ({"batch_size": 1.5}, "batch_size=1.5 was given"),
        ):
            with pytest.raises(CapaProbeError, match=said):
                calibrate(lvlm, [inputs], **options)

    def test_no_visual_token(self) -> None:
        lvlm = cp.HookedLVLM(tiny.shared("llava"), processors.shared("llava"))
        with pytest.raises(CapaProbeError, match="The 1 samples given have no visual token to fit"):
            calibrate(lvlm, [{"input_ids": torch.arange(3, 9)[None]}])
        with pytest.raises(CapaProbeError, match=r"The 1 samples given \(1 left out for their images\)"):
            calibrate(lvlm, [cp.Sample("a", "/nowhere.png", "what")])
        with pytest.raises(CapaProbeError, match="The 0 samples given"):
            calibrate(lvlm, [])

    def test_an_activation_that_is_not_finite_is_named(self) -> None:
        lvlm, inputs = wrap("llava"), tiny.inputs("llava")
        place = lvlm.spans(inputs).visual[1].nonzero()[3]

        def spoil(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[1, place, 7] = float("inf")
            return x

        with (
            lvlm.hooks([("blocks.3.hook_mlp_out", spoil)]),
            pytest.raises(CapaProbeError, match=r"FFN of layer 3 is not finite for sample 1; load"),
        ):
            calibrate(lvlm, [inputs])

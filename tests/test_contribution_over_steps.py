"""Contribution at decode steps, from products that are kept from step to step, is that of a projection per step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import capa_probe as cp
from capa_probe.head_products import contribution_of_products, written_products
from capa_probe.lvlm import AttentionCall
from capa_probe.measures import attention_contribution
from capa_probe.probes import StepContext, contribution, recorder
from tests import tiny

STEPS = recorder.STEPS_TO_REMEMBER


def contributions(lvlm: cp.HookedLVLM, inputs: dict[str, Tensor], steps: int) -> Any:
    return cp.profile(lvlm, [inputs], steps=steps, rows="all", probes="contribution", progress=False).tokens


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [STEPS, contribution.STEPS_TOGETHER + 2])
def test_it_is_that_of_a_projection_per_step(
    family: str, dtype: torch.dtype, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build(family).to(dtype)
    model.generation_config.eos_token_id = None
    lvlm, inputs = cp.HookedLVLM(model), tiny.inputs(family)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    computed = []
    exact = written_products
    monkeypatch.setattr(
        contribution, "written_products", lambda v, w: computed.append(v.shape[2]) or exact(v, w)
    )
    kept = contributions(lvlm, inputs, steps)
    # The prompt once per layer, then what was generated, some steps at a time.
    together = contribution.STEPS_TOGETHER
    chunks = [inputs["input_ids"].shape[1], *[together] * (steps // together)]
    chunks += [steps % together] if steps % together else []
    assert computed == [chunk for chunk in chunks for _ in range(lvlm.n_layers)]
    monkeypatch.setattr(recorder, "STEPS_TO_REMEMBER", steps + 1)
    anew = contributions(lvlm, inputs, steps)
    assert len(computed) == len(chunks) * lvlm.n_layers  # none of it
    assert kept["step"].max() == steps
    rounding = 1e-5 if dtype == torch.float32 else 3e-2
    np.testing.assert_allclose(kept["contribution"], anew["contribution"], rtol=rounding, atol=1e-7)
    if dtype == torch.bfloat16:  # on the whole much closer
        error = (kept["contribution"] / anew["contribution"] - 1).abs()
        assert error[anew["contribution"] > 0].median() < 4e-3


def test_a_quantized_cache_changes_old_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contribution is that of the value that is attended to, as the cache hands it out at that step."""
    model = tiny.build("llava")
    config = model.generation_config
    config.eos_token_id = None
    config.cache_implementation, config.cache_config = "quantized", {"backend": "fp8"}
    lvlm, inputs = cp.HookedLVLM(model), tiny.inputs("llava")
    options = {"rows": "all", "probes": ["contribution", "value_norm"], "progress": False}
    found = cp.profile(lvlm, [inputs], steps=STEPS, **options).tokens
    monkeypatch.setattr(recorder, "STEPS_TO_REMEMBER", STEPS + 1)
    anew = cp.profile(lvlm, [inputs], steps=STEPS, **options).tokens
    for name in ("contribution", "value_norm"):
        np.testing.assert_allclose(found[name], anew[name], rtol=1e-5, atol=1e-7)
    norms = anew[(anew["sample"] == "0") & (anew["layer"] == 1) & (anew["position"] == 1)]["value_norm"]
    assert norms.iloc[1] != norms.iloc[0]


@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    keys=st.integers(1, 6),
    alike=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_products_give_the_norm_of_the_sum(
    batch: int, queries: int, kv_heads: int, group: int, keys: int, alike: float, seed: int
) -> None:
    """Also where what two heads write cancels in part, on both sides of the bound at which keys are projected."""
    generator = torch.Generator().manual_seed(seed)
    heads, d_head, d_model = kv_heads * group, 4, 16
    values = torch.randn(batch, kv_heads, keys, d_head, generator=generator)
    weight = torch.randn(d_model, heads * d_head, generator=generator)
    if heads > 1 and group > 1:  # both read the same values
        weight[:, d_head : 2 * d_head] -= alike * (weight[:, d_head : 2 * d_head] + weight[:, :d_head])
    attention = torch.rand(batch, queries, heads, keys, generator=generator) ** 8
    attention[:, :, :, 0] = 0  # padding
    found = contribution_of_products(attention, written_products(values, weight), values, weight)
    for query in range(queries):
        wanted = attention_contribution(attention[:, query].double(), values.double(), weight.double())
        torch.testing.assert_close(found[:, query].double(), wanted.double(), rtol=1e-4, atol=1e-12)


def test_heads_that_nearly_cancel_keep_their_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 2, 5, 8, generator=generator)
    values[:, 1] = values[:, 0]
    weight = torch.randn(32, 16, generator=generator)
    weight[:, 8:] = -weight[:, :8]
    attention = torch.tensor([0.5, 0.5 + 2**-12]).reshape(1, 2, 1).expand(-1, -1, 5)
    wanted = attention_contribution(attention.double()[:, 1:] - 0.5, values[:, :1], weight[:, 8:])
    products = written_products(values, weight)
    found = contribution_of_products(attention[:, None], products, values, weight)[:, 0]
    torch.testing.assert_close(found, attention_contribution(attention, values, weight))
    # The difference is 1/4096 of what each head writes: float32 itself has no more digits of it.
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


def test_heads_that_cancel_are_projected() -> None:
    """The products of what two heads write, each 1000 times as long as the sum, hold no digit of its square."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 2, 50, 8, generator=generator)
    values[:, 1] = values[:, 0]
    weight = torch.randn(32, 16, generator=generator)
    weight[:, 8:] = -weight[:, :8] + 1e-3 * torch.randn(32, 8, generator=generator)
    attention = torch.full((1, 2, 50), 0.5)
    wanted = attention_contribution(attention.double(), values.double(), weight.double())
    found = contribution_of_products(attention[:, None], written_products(values, weight), values, weight)[
        :, 0
    ]
    torch.testing.assert_close(found.double(), wanted.double(), rtol=2e-3, atol=0)


def test_keys_that_move_are_computed_anew() -> None:
    """As with a cache of fixed length, whose number of keys does not grow by one."""
    lvlm = cp.HookedLVLM(tiny.shared("llava"))
    inputs = tiny.inputs("llava")
    calls: list[AttentionCall] = []
    with torch.no_grad(), lvlm.attention_calls(calls.append, layers=[1]):
        lvlm.model(**inputs)
    memory: dict[Any, Tensor] = {}
    spans = lvlm.spans(inputs)
    probe = contribution.Contribution()
    for first, last in ((0, 9), (1, 10), (2, 11), (2, 12), (0, 12)):
        call = replace(
            calls[0],
            query=calls[0].query[:, :, -1:],
            key=calls[0].key[:, :, first:last],
            value=calls[0].value[:, :, first:last],
            mask=None,
        )
        context = StepContext(1, torch.zeros(3, dtype=torch.long), spans, 1e-6, None, memory)
        row = call.row(context.query)
        found = probe.measure(call, row, context)["contribution"]
        wanted = attention_contribution(row, call.value, call.project)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)

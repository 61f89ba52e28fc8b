"""Attention measures against naive twins (``tests.naive``) on drawn shapes, masks and dtypes, and their properties."""

from __future__ import annotations

from typing import NamedTuple

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from capa_probe import measures
from tests import naive

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)


class Attention(NamedTuple):
    """One drawn attention call; ``attention`` is one query row, (batch, head, key), float32."""

    attention: Tensor
    values: Tensor
    w_o: Tensor
    generator: torch.Generator


@st.composite
def attentions(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = dtypes) -> Attention:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch, keys, d_head, d_model = (draw(st.integers(low, 5)) for low in (1, 2, 1, 1))
    dtype, sharpness = draw(dtypes), draw(st.sampled_from((0.3, 2.0, 6.0)))
    generator = torch.Generator().manual_seed(draw(seeds))
    logits = torch.randn(batch, kv_heads * group, keys, generator=generator) * sharpness
    return Attention(
        logits.softmax(-1),
        torch.randn(batch, kv_heads, keys, d_head, generator=generator).to(dtype),
        torch.randn(d_model, kv_heads * group * d_head, generator=generator),
        generator,
    )


def close(found: Tensor, wanted: object, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert found.dtype == torch.float32
    expected = wanted if isinstance(wanted, Tensor) else torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


# -- attention probabilities


@given(st.data())
def test_attention_probabilities(data: st.DataObject) -> None:
    kv_heads, group, dtype = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(dtypes)
    batch, queries, keys, d_head = (data.draw(st.integers(1, 4)) for _ in range(4))
    generator = torch.Generator().manual_seed(data.draw(seeds))
    query = torch.randn(batch, kv_heads * group, queries, d_head, generator=generator).to(dtype) * 3
    key = torch.randn(batch, kv_heads, keys, d_head, generator=generator).to(dtype) * 3
    mask_heads = data.draw(st.sampled_from((1, kv_heads * group)))
    allowed = bias = None
    if data.draw(st.booleans()):
        allowed = torch.rand(batch, mask_heads, queries, keys, generator=generator) < 0.6
    if data.draw(st.booleans()):
        bias = torch.randn(batch, mask_heads, queries, keys, generator=generator).to(dtype)
    causal = queries <= keys and data.draw(st.booleans())
    found = measures.attention_probabilities(query, key, 0.4, allowed, bias, causal)
    if causal:
        places = torch.arange(keys - queries, keys)
        seen = torch.arange(keys) <= places[:, None]
        allowed = seen.expand(batch, mask_heads, -1, -1) if allowed is None else allowed & seen
    lists = [None if x is None else x.tolist() for x in (allowed, bias)]
    wanted = torch.tensor(
        naive.attention_probabilities(query.tolist(), key.tolist(), 0.4, *lists), dtype=torch.float64
    )
    close(found, wanted)
    sums = found.sum(-1)
    sees_none = (
        torch.zeros_like(sums, dtype=torch.bool) if allowed is None else ~allowed.any(-1).expand_as(sums)
    )
    assert (sums[sees_none] == 0).all()
    close(sums[~sees_none], torch.ones_like(sums[~sees_none]))


def test_a_key_s_shift_common_to_all_changes_nothing_even_at_huge_scores() -> None:
    query, key = torch.full((1, 1, 1, 1), 100.0), torch.tensor([[[[100.0], [100.0], [99.99]]]])
    found = measures.attention_probabilities(query, key, 1.0)
    close(
        found[0, 0, 0],
        naive.attention_probabilities([[[[100.0]]]], key.tolist(), 1.0, None, None)[0][0][0],
        1e-3,
    )


# -- contribution


@given(attentions(), dtypes)
def test_weighted_values_and_contribution(case: Attention, attention_dtype: torch.dtype) -> None:
    attention = case.attention.to(attention_dtype)
    lists = attention.tolist(), case.values.tolist()
    close(measures.weighted_values(attention, case.values), naive.weighted_values(*lists))
    found = measures.attention_contribution(attention, case.values, case.w_o)
    close(found, naive.attention_contribution(*lists, case.w_o.tolist()))


@given(attentions(), st.sampled_from(DTYPES[1:]))
def test_the_projection_runs_in_the_dtype_of_its_weight(case: Attention, dtype: torch.dtype) -> None:
    w_o = case.w_o.to(dtype)
    wanted = naive.attention_contribution(case.attention.tolist(), case.values.tolist(), w_o.tolist())
    seen: list[torch.dtype] = []

    def project(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return torch.nn.functional.linear(x.to(dtype), w_o)

    for projection in (w_o, project):
        found = measures.attention_contribution(case.attention, case.values, projection)
        close(found, wanted, rtol=0.05, atol=0.05)
    assert seen == [torch.float32]  # nothing is rounded before the function gets it


@given(attentions(st.just(torch.float32)), st.floats(-8, 8))
def test_contribution_under_permutation_scale_and_repeated_kv_heads(case: Attention, factor: float) -> None:
    attention, values, w_o, generator = case
    found = measures.attention_contribution(attention, values, w_o)
    order = torch.randperm(values.shape[2], generator=generator)
    shuffled = measures.attention_contribution(attention[..., order], values[:, :, order], w_o)
    close(shuffled, found[:, order])
    close(measures.attention_contribution(attention, values * factor, w_o), found * abs(factor), atol=1e-5)
    repeated = values.repeat_interleave(attention.shape[1] // values.shape[1], dim=1)
    close(measures.attention_contribution(attention, repeated, w_o), found)
    # The heads' names do not matter, as long as W_O's columns go with them.
    heads = torch.randperm(attention.shape[1], generator=generator)
    columns = w_o.reshape(len(w_o), attention.shape[1], -1)[:, heads].flatten(1)
    close(measures.attention_contribution(attention[:, heads], repeated[:, heads], columns), found)


@given(attentions(st.just(torch.float32)))
def test_contributions_are_the_parts_of_the_attention_output_without_its_bias(case: Attention) -> None:
    attention, values, w_o, _ = case
    o_proj = nn.Linear(w_o.shape[1], w_o.shape[0])
    with torch.no_grad():
        o_proj.weight.copy_(w_o)
        o_proj.bias.fill_(7.0)
        repeated = values.repeat_interleave(attention.shape[1] // values.shape[1], dim=1)
        z = torch.einsum("bhk,bhkd->bhd", attention, repeated).flatten(1)
        parts = torch.nn.functional.linear(measures.weighted_values(attention, values), w_o)
        close(parts.sum(1), o_proj(z) - o_proj.bias, atol=1e-4)
        with_weight = measures.attention_contribution(attention, values, o_proj.weight)
        close(with_weight, parts.norm(dim=-1))
        unattended = measures.attention_contribution(torch.zeros_like(attention), values, o_proj.weight)
    assert (unattended == 0).all()


def test_a_value_of_zero_contributes_nothing_whatever_its_attention_and_is_missed_all_the_same() -> None:
    attention, values = torch.tensor([[[0.2, 0.7, 0.1]] * 4]), torch.randn(1, 2, 3, 5)
    values[:, :, 1] = 0
    assert measures.attention_contribution(attention, values, torch.randn(6, 20))[0, 1] == 0
    assert measures.removal_effect(attention, values, torch.randn(6, 20))[0, 1] > 0.1


# -- removal effect


@given(attentions())
def test_removal_effect(case: Attention) -> None:
    wanted = naive.removal_effect(case.attention.tolist(), case.values.tolist(), case.w_o.tolist())
    found = measures.removal_effect(case.attention, case.values, case.w_o)
    close(found, wanted, rtol=2e-4, atol=1e-5)


@given(attentions())
def test_removal_effect_of_some_keys(case: Attention) -> None:
    attention, values, w_o, generator = case
    keys = torch.randint(values.shape[2], (len(values), 3), generator=generator)
    found = measures.removal_effect(attention, values, w_o, keys)
    close(found, measures.removal_effect(attention, values, w_o).gather(1, keys), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gap", [5.0, 10.0, 20.0, 40.0, 80.0])
def test_removal_effect_keeps_its_digits_where_one_minus_a_has_none(gap: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    logits[:, :, 2] += gap
    values = torch.randn(2, 2, 6, 3, generator=generator)
    w_o = torch.randn(5, 12, generator=generator)
    attention = logits.float().softmax(-1)
    if gap >= 20:
        assert (1 - attention[..., 2] == 0).any()  # what the naive formula would divide by
    # Removal in float64 from the logits themselves: the softmax over the keys that are left.
    left = [j for j in range(6) if j != 2]
    v = values.repeat_interleave(2, dim=1).double()
    without = torch.einsum("bhk,bhkd->bhd", logits[..., left].softmax(-1), v[:, :, left])
    change = without - torch.einsum("bhk,bhkd->bhd", logits.softmax(-1), v)
    found = measures.removal_effect(attention, values, w_o)
    close(found[:, 2], (change.flatten(1) @ w_o.double().T).norm(dim=-1), rtol=1e-5)


@given(attentions(st.just(torch.float32)), st.floats(-8, 8))
def test_removal_effect_under_permutation_scale_and_shift(case: Attention, factor: float) -> None:
    attention, values, w_o, generator = case
    found = measures.removal_effect(attention, values, w_o)
    order = torch.randperm(values.shape[2], generator=generator)
    shuffled = measures.removal_effect(attention[..., order], values[:, :, order], w_o)
    close(shuffled, found[:, order], atol=1e-5)
    scaled = measures.removal_effect(attention, values * factor, w_o)
    close(scaled, found * abs(factor), rtol=1e-4, atol=1e-4)
    # What all values have in common stays whichever key goes; contribution has no such invariance.
    close(measures.removal_effect(attention, values + 2.0, w_o), found, rtol=1e-3, atol=1e-4)


def test_keys_of_equal_value_are_removed_for_free() -> None:
    values = torch.randn(1, 2, 1, 3).expand(1, 2, 6, 3)
    attention = (5 * torch.randn(1, 4, 6)).softmax(-1)
    assert measures.removal_effect(attention, values, torch.randn(8, 12)).max() < 1e-5


def test_removing_the_only_key_is_undefined_and_an_unattended_one_changes_nothing() -> None:
    attention = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    found = measures.removal_effect(attention, torch.randn(1, 1, 2, 3), torch.randn(4, 6))
    assert torch.isnan(found[0, 0])
    assert torch.isfinite(found[0, 1])
    alone = measures.removal_effect(torch.ones(1, 2, 1), torch.randn(1, 1, 1, 3), torch.randn(4, 6))
    assert alone.isnan().all()
    found = measures.removal_effect(torch.tensor([[[0.5, 0.0, 0.5]]]), torch.randn(1, 1, 3, 3), torch.eye(3))
    assert found[0, 1] == 0
    assert found[0, 0] > 0


# -- value norms


@given(attentions())
def test_value_norms(case: Attention) -> None:
    close(measures.value_norms(case.values), naive.value_norms(case.values.tolist()))
    close(measures.value_norms(-2 * case.values.float()), 2 * measures.value_norms(case.values))


# -- shapes


@pytest.mark.parametrize(
    "call",
    [
        lambda: measures.attention_probabilities(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5), 1.0),
        lambda: measures.attention_probabilities(
            torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 4), 1.0, torch.ones(1, 1, 3, 4, dtype=torch.bool)
        ),
        lambda: measures.weighted_values(torch.ones(1, 2, 3), torch.ones(1, 2, 4, 5)),
        lambda: measures.attention_contribution(torch.ones(2, 3), torch.ones(1, 2, 3, 4), torch.ones(8, 8)),
        lambda: measures.removal_effect(torch.ones(1, 2, 3), torch.ones(2, 2, 3, 4), torch.ones(8, 8)),
        lambda: measures.value_norms(torch.ones(2, 3, 4)),
        lambda: measures.sink_strength(torch.ones(3, 4, dtype=torch.long)),
        lambda: measures.io_cosine(torch.ones(3, 4), torch.ones(3, 5)),
        lambda: measures.hadamard_alpha(torch.ones(3, 4), torch.ones(2, 4)),
        lambda: measures.hellinger(torch.ones(3, 4), torch.ones(4)),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(call: object) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        call()  # type: ignore[operator]


def test_heads_that_are_no_multiple_of_kv_heads_or_of_the_weight_are_refused() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        measures.weighted_values(torch.ones(1, 3, 4), torch.ones(1, 2, 4, 5))
    with pytest.raises(RuntimeError, match="shape"):
        measures.attention_contribution(torch.ones(1, 2, 4), torch.ones(1, 2, 4, 5), torch.ones(6, 9))

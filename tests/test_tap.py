"""The attention tap: what one call computes on the side, and that edits and backends stay consistent around it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.tap import AttentionCall
from tests import naive, tiny

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
MASKS = ("none", "bool", "additive")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def decoder(model: PreTrainedModel) -> Any:
    return model.model.language_model


# -- one call, without a model


class Case(NamedTuple):
    call: AttentionCall
    wanted: Tensor  # (batch, head, query, key)


def drawn(kind: str, queries: int, keys: int, seed: int, dtype: torch.dtype = torch.float32) -> Case:
    """A call with a mask as models pass it (longer than the keys, one for all heads), and its pattern by loops."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, queries, 3, generator=generator).to(dtype)
    key = torch.randn(2, 2, keys, 3, generator=generator).to(dtype)
    seen = torch.rand(2, 1, queries, keys + 2, generator=generator) < 0.7
    seen[..., 0] = True
    if kind == "none":  # causal from the upper left, or everything for a single query
        mask = None
        seen = torch.ones(2, 1, queries, keys, dtype=torch.bool)
        if queries > 1:
            seen = seen.tril()
    elif kind == "bool":
        mask = seen
    else:
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    call = AttentionCall(0, query, key, key, mask, 0.7, nn.Identity())
    allowed = seen[..., :keys].tolist()
    pattern = naive.attention_probabilities(query.tolist(), key.tolist(), 0.7, allowed, None)
    return Case(call, torch.tensor(pattern, dtype=torch.float64))


@given(
    kind=st.sampled_from(MASKS),
    queries=st.integers(1, 5),
    more=st.integers(0, 3),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    data=st.data(),
)
def test_rows_of_the_pattern_under_every_kind_of_mask(
    kind: str, queries: int, more: int, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    call, wanted = drawn(kind, queries, queries + more, seed, dtype)
    start = data.draw(st.integers(0, queries - 1))
    stop = data.draw(st.none() | st.integers(start + 1, queries))
    index = torch.tensor([data.draw(st.integers(0, queries - 1)) for _ in range(2)])
    found = call.probabilities(start, stop)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted[:, :, start:stop], rtol=1e-5, atol=1e-6)
    row = torch.stack([wanted[b, :, index[b]] for b in range(2)])
    torch.testing.assert_close(call.row(index).double(), row, rtol=1e-5, atol=1e-6)


def test_a_pattern_that_a_listener_put_there_is_the_pattern() -> None:
    call, _ = drawn("bool", 3, 4, seed=0)
    pattern = torch.rand(2, 4, 3, 4)
    edited = AttentionCall(0, call.query, call.key, call.value, call.mask, 0.7, call.o_proj, pattern)
    assert torch.equal(edited.probabilities(1, 3), pattern[:, :, 1:3])
    assert torch.equal(edited.row(torch.tensor([2, 0])), torch.stack([pattern[0, :, 2], pattern[1, :, 0]]))


class Quantized(nn.Module):
    """An output projection whose weight is no matrix of floats, as quantized layers have them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter((linear.weight * 64).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) / 64).T + self.bias


@pytest.mark.parametrize("quantized", [False, True])
def test_the_bias_of_the_output_projection_is_left_out_and_its_hooks_are_left_alone(quantized: bool) -> None:
    o_proj: nn.Module = nn.Linear(12, 5)
    nn.init.constant_(o_proj.bias, 100.0)
    weight = o_proj.weight
    if quantized:
        o_proj = Quantized(o_proj)
        weight = o_proj.weight / 64
    o_proj.register_forward_hook(lambda *_: pytest.fail("a side computation ran the user's hook"))
    call = AttentionCall(0, torch.zeros(1, 4, 1, 3), *[torch.zeros(1, 2, 1, 3)] * 2, None, 1.0, o_proj)
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(call.project(x), x @ weight.T, rtol=1e-4, atol=5e-5)
    assert (call.project(torch.zeros(1, 12)).abs() < 1e-5).all()


# -- rotary embedding, from the positions up


def positions_by_hand(family: str, inputs: dict[str, Tensor]) -> Tensor:
    """(3, batch, position): time, row and column. The same number thrice wherever there is no M-RoPE."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if family != "qwen2_5_vl":
        return torch.arange(ids.shape[1]).expand(3, *ids.shape)
    found = torch.zeros(3, *ids.shape, dtype=torch.long)
    grids = iter(inputs["image_grid_thw"].tolist())
    for b in range(len(ids)):
        now, left = 0, 0
        for p in mask[b].nonzero().flatten().tolist():
            if ids[b, p] != tiny.IMAGE:
                found[:, b, p] = now
                now += 1
                continue
            if left == 0:
                _, rows, cols = (n // 2 for n in next(grids))
                left, start = rows * cols, now
                now += max(rows, cols)
            row, col = divmod(rows * cols - left, cols)
            found[:, b, p] = torch.tensor([start, start + row, start + col])
            left -= 1
    return found


def rotated_by_hand(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """(batch, position, head, 8): the pair (j, j + 4) turned by ``position * theta ** (-j / 4)``."""
    axis = (0, 0, 1, 2)  # mrope_section [2, 1, 1]: two pairs by time, one by row, one by column
    out = torch.empty_like(x)
    for j in range(4):
        angle = positions[axis[j]][..., None] * theta ** (-j / 4)
        a, b = x[..., j], x[..., j + 4]
        out[..., j] = a * angle.cos() - b * angle.sin()
        out[..., j + 4] = b * angle.cos() + a * angle.sin()
    return out


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
def test_queries_and_keys_are_those_after_rotary_embedding(family: str, side: str) -> None:
    model, inputs = tiny.shared(family), tiny.inputs(family, padding_side=side)
    lvlm, positions = cp.HookedLVLM(model), positions_by_hand(family, inputs)
    names = [f"blocks.2.attn.hook_rot_{x}" for x in "qk"]
    _, cache = lvlm.run_with_cache(**inputs, names_filter=[*names, "blocks.2.hook_resid_pre"])
    layer, real = decoder(model).layers[2], inputs["attention_mask"].bool()
    theta = decoder(model).config.rope_parameters["rope_theta"]
    x = cache["blocks.2.hook_resid_pre"]
    x = x / (x.pow(2).mean(-1, keepdim=True) + lvlm.norm_eps).sqrt() * layer.input_layernorm.weight
    for name, projection in zip(names, (layer.self_attn.q_proj, layer.self_attn.k_proj), strict=True):
        plain = projection(x).unflatten(-1, (-1, 8))
        wanted = rotated_by_hand(plain, positions, theta)
        torch.testing.assert_close(cache[name][real], wanted[real], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(wanted[real], plain[real], atol=1e-2)


# -- listening to a model


@FAMILIES
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_observers_see_every_call_after_all_edits(family: str, attn: str) -> None:
    lvlm, inputs = cp.HookedLVLM(tiny.shared(family, attn)), tiny.inputs(family)
    calls: list[AttentionCall] = []
    one_layer = "blocks.1.attn.hook_pattern"
    with (
        lvlm.attention_calls(calls.append, layers=[1, 3]),
        lvlm.hooks([(one_layer, lambda x, hook: x.flip(-1))]),
    ):
        _, cache = lvlm.run_with_cache(
            **inputs, names_filter=lambda name: "pattern" in name, reset_hooks_end=False
        )
    assert [call.layer for call in calls] == [1, 3]
    last = lvlm.spans(inputs).last
    for call in calls:
        pattern = cache[f"blocks.{call.layer}.attn.hook_pattern"]
        torch.testing.assert_close(call.row(last), pattern[torch.arange(3), :, last])
        torch.testing.assert_close(call.probabilities(2, 7), pattern[:, :, 2:7])
    with lvlm.attention_calls(calls.append):
        lvlm(**inputs)
    assert [call.layer for call in calls[2:]] == [0, 1, 2, 3]
    lvlm(**inputs)
    assert len(calls) == 6
    lvlm.reset_hooks()


def test_edits_of_two_wrappers_both_count() -> None:
    model, inputs = tiny.shared("llava"), tiny.inputs("llava")
    one, two, both = (cp.HookedLVLM(model) for _ in range(3))
    q, k = "blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_rot_k"
    edits = [(q, lambda x, hook: 0.5 * x), (k, lambda x, hook: x.flip(2))]
    with one.hooks(edits[:1]), two.hooks(edits[1:]):
        found = model(**inputs, use_cache=False).logits
    assert torch.equal(found, both.run_with_hooks(**inputs, use_cache=False, fwd_hooks=edits).logits)
    assert not torch.equal(found, model(**inputs).logits)


def test_attentions_that_the_model_returns_are_the_edited_ones() -> None:
    model, inputs = tiny.shared("llava", "eager"), tiny.inputs("llava")
    plain = model(**inputs, output_attentions=True).attentions
    found = cp.HookedLVLM(model).run_with_hooks(
        **inputs,
        output_attentions=True,
        fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: x.flip(-1))],
    )
    real = inputs[
        "attention_mask"
    ].bool()  # rows of padding queries are uniform in eager attention, zero here
    returned, wanted = (x.transpose(1, 2)[real] for x in (found.attentions[1], plain[1].flip(-1)))
    torch.testing.assert_close(returned, wanted)
    assert torch.equal(found.attentions[0], plain[0])


def test_a_backend_chosen_while_someone_listens_is_kept() -> None:
    model, inputs = tiny.build("llava"), tiny.inputs("llava")
    lvlm, other = cp.HookedLVLM(model), tiny.build("llava")
    decoder(other).set_attn_implementation("eager")
    with lvlm.attention_calls(lambda call: None):
        assert lvlm.attention_backend == "sdpa"  # the tap goes by the name of what it stands for
        decoder(model).set_attn_implementation("eager")
    assert decoder(model).config._attn_implementation == "eager"
    assert torch.equal(model(**inputs).logits, other(**inputs).logits)


def test_a_backend_that_cannot_be_probed_is_refused_when_listening_begins() -> None:
    model, inputs = tiny.build("llava"), tiny.inputs("llava")
    lvlm, plain = cp.HookedLVLM(model), model(**inputs).logits
    config = decoder(model).config
    config._attn_implementation = "flex_attention"
    with pytest.raises(CapaProbeError, match=r'"flex_attention", which cannot be probed; .*"sdpa"'):
        lvlm.run_with_cache(**inputs)
    config._attn_implementation = "sdpa"
    # What was attached before the refusal is gone, and the wrapper works again.
    assert torch.equal(model(**inputs).logits, plain)
    assert not any(point.has_hooks() for point in lvlm.hook_dict.values())
    out, cache = lvlm.run_with_cache(**inputs)
    assert torch.equal(out.logits, plain)
    assert len(cache) == len(lvlm.hook_dict)


@pytest.mark.parametrize("order", [("one",), ("one", "one"), ("one", "two"), ("two", "one", "two")])
def test_listeners_come_and_go_in_any_order(order: tuple[str, ...]) -> None:
    """Whoever leaves last, the model gets its backend back, and never before."""
    model = tiny.shared("llava")
    wrappers = {"one": cp.HookedLVLM(model), "two": cp.HookedLVLM(model)}
    config = decoder(model).config
    contexts = [wrappers[name].attention_calls(lambda call: None) for name in order]
    for context in contexts:
        context.__enter__()
    for context in contexts:  # first in, first out: not as nested with blocks would
        assert config._attn_implementation == "capa_probe_sdpa"
        context.__exit__(None, None, None)
    assert config._attn_implementation == "sdpa"


def test_a_row_of_padding_has_no_attention() -> None:
    """SDPA's own output for such a row is nobody's business, but a probability must not be NaN."""
    lvlm, inputs = cp.HookedLVLM(tiny.shared("llava")), tiny.inputs("llava")
    _, cache = lvlm.run_with_cache(**inputs, names_filter="blocks.0.attn.hook_pattern")
    pattern, real = cache["blocks.0.attn.hook_pattern"], inputs["attention_mask"].bool()
    assert torch.isfinite(pattern).all()
    for b in range(3):
        assert math.isclose(float(pattern[b][:, real[b]].sum(-1).min()), 1, rel_tol=1e-5)
        assert (pattern[b][:, real[b]][..., ~real[b]] == 0).all()
    assert (~real).any()

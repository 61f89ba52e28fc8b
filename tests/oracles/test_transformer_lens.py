"""Activations and every column against TransformerLens's own ``TransformerBridge`` (``tests.oracles.bridge``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from capa_probe.lvlm.inputs import LVLMInputs
from capa_probe.schema import TOKEN_SCHEMA
from tests.oracles import bridge, compare
from tests.oracles.bridge import Case
from tests.oracles.worst import profile

#: Agreement that the documentation promises.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=bridge.FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return bridge.make(request.param, tmp_path_factory.mktemp("bridge"))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE / 10)


def test_the_oracle_is_on_eager_attention_and_the_wrapper_is_not(case: Case) -> None:
    with torch.no_grad():
        logits = case.lvlm(**case.inputs).logits
    close(logits, case.logits)
    assert case.lvlm.attention_backend == "sdpa"
    assert case.bridge.original_model.config.get_text_config()._attn_implementation == "eager"


def test_every_activation_agrees(case: Case) -> None:
    with torch.no_grad():
        _, cache = case.lvlm.run_with_cache(**case.inputs)
    names = case.names()
    missing = {
        f"blocks.{i}.{name}" for i in range(case.lvlm.n_layers) for name in bridge.MISSING[case.family]
    }
    assert set(names) | missing == set(cache)  # no hook point is left out
    for ours, theirs in names.items():
        close(cache[ours], case.theirs[theirs])
        # Not a comparison of nothing with nothing.
        assert cache[ours].std() > 1e-2, ours


def test_what_the_bridge_calls_hook_embed_is_not_yet_what_enters_the_decoder(case: Case) -> None:
    """Why the table of names says ``blocks.0.hook_resid_pre``: at visual tokens the bridge shows placeholders there."""
    with torch.no_grad():
        _, cache = case.lvlm.run_with_cache(**case.inputs, names_filter="hook_embed")
    visual = case.lvlm.spans(case.inputs).visual
    close(cache["hook_embed"][~visual], case.theirs["hook_embed"][~visual])
    assert (
        not torch.isclose(cache["hook_embed"][visual], case.theirs["hook_embed"][visual], 0.1)
        .any(dim=-1)
        .all()
    )


def test_rotated_queries_and_keys_give_the_oracle_s_pattern(case: Case) -> None:
    names = [f"blocks.{layer}.attn.hook_rot_{x}" for layer in range(case.lvlm.n_layers) for x in "qk"]
    with torch.no_grad():
        _, cache = case.lvlm.run_with_cache(**case.inputs, names_filter=names)
    for layer in range(case.lvlm.n_layers):
        q, k = (cache[f"blocks.{layer}.attn.hook_rot_{x}"][0] for x in "qk")
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, dim=1)) / 8**0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        close(pattern, case.theirs[f"blocks.{layer}.attn.hook_pattern"][0])
    if case.lvlm.family.name == "llava":  # for M-RoPE the bridge has no hooks of its own
        for name in names:
            close(cache[name], case.theirs[name])


def test_every_column_agrees(case: Case) -> None:
    """The loops once more, on the bridge's caches: prefill, and a decode step as a longer prompt."""
    tokens = profile(case.lvlm, [LVLMInputs(case.inputs)], steps=1).tokens
    wanted = bridge.columns(case, steps=1)
    measured = [
        name for name in TOKEN_SCHEMA.names if name not in ("sample", "kind", "image", "tile", "row", "col")
    ]
    assert list(wanted[0]) == measured
    assert set(wanted[0]) == set(compare.agree(tokens[measured], wanted, TOLERANCE))


def test_what_every_token_contributes_adds_up_to_what_attention_writes(case: Case) -> None:
    text = case.lvlm.model.config.get_text_config()
    group = text.num_attention_heads // text.num_key_value_heads
    d_head = text.hidden_size // text.num_attention_heads
    for layer in range(case.lvlm.n_layers):
        pattern, values = (
            case.theirs[f"blocks.{layer}.attn.{name}"][0] for name in ("hook_pattern", "hook_v")
        )
        w_o = case.lvlm.family.layers(case.lvlm.model)[layer].self_attn.o_proj.weight.detach()
        written = torch.zeros(text.hidden_size)
        for head in range(text.num_attention_heads):
            through = values[:, head // group] @ w_o[:, head * d_head : (head + 1) * d_head].T
            written += pattern[head, -1] @ through
        close(written, case.theirs[f"blocks.{layer}.hook_attn_out"][0, -1])


def test_editing_a_pattern_has_the_oracle_s_effect(case: Case) -> None:
    """Attention moved onto one token by a hook: the output is what that token's values give."""

    def onto_first(pattern: Tensor, hook: Any) -> Tensor:
        new = torch.zeros_like(pattern)
        new[..., 0] = 1
        return new

    name = "blocks.2.attn.hook_pattern"
    with torch.no_grad(), case.lvlm.hooks([(name, onto_first)]):
        _, cache = case.lvlm.run_with_cache(
            **case.inputs, names_filter="blocks.2.attn.hook_z", reset_hooks_end=False
        )
    first = case.theirs["blocks.2.attn.hook_v"][0, 0].repeat_interleave(2, dim=0)
    close(cache["blocks.2.attn.hook_z"][0], first.expand(case.inputs["input_ids"].shape[1], -1, -1))

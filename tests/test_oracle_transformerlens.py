"""TransformerLens's own ``TransformerBridge`` as an oracle: written by others, on eager attention, sharing no code.

It knows LLaVA and Qwen2.5-VL, not InternVL, and takes one prompt at a time.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

import capa_probe as cp
from tests import processors, tiny

HOOKS = {
    "hook_resid_pre": (32,),
    "hook_attn_out": (32,),
    "hook_resid_mid": (32,),
    "hook_mlp_out": (32,),
    "hook_resid_post": (32,),
    "attn.hook_v": (2, 8),
    "attn.hook_z": (4, 8),
    "mlp.hook_in": (32,),
}


class Case(NamedTuple):
    lvlm: cp.HookedLVLM
    inputs: dict[str, Tensor]
    logits: Tensor
    oracle: dict[str, Tensor]


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model with two images in its prompt, and what the bridge around a copy of it caches."""
    family = request.param
    folder: Path = processors.save(family, tmp_path_factory.mktemp("bridge"))
    model = tiny.build(family)
    model.config.architectures = [type(model).__name__]
    bridge: Any = TransformerBridge.boot_transformers(
        str(folder),
        hf_model=copy.deepcopy(model),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
    )
    lvlm = cp.HookedLVLM(model, processors.shared(family))
    images = [processors.image(24, 40, 1), processors.image(16, 16, 2)]
    inputs = dict(lvlm.prepare(images, "what is it, and where?"))
    others = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(inputs["input_ids"], **others)
    return Case(lvlm, inputs, logits, dict(cache.items()))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_oracle_is_on_eager_attention_and_the_wrapper_is_not(case: Case) -> None:
    with torch.no_grad():
        logits = case.lvlm(**case.inputs).logits
    close(logits, case.logits)
    assert case.lvlm.attention_backend == "sdpa"


@pytest.mark.parametrize("hook", HOOKS)
def test_activations_agree(case: Case, hook: str) -> None:
    names = [f"blocks.{layer}.{hook}" for layer in range(case.lvlm.n_layers)]
    with torch.no_grad():
        _, cache = case.lvlm.run_with_cache(**case.inputs, names_filter=names)
    for name in names:
        assert cache[name].shape == (*case.inputs["input_ids"].shape, *HOOKS[hook])
        close(cache[name], case.oracle[name])


def test_attention_patterns_agree(case: Case) -> None:
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(case.lvlm.n_layers)]
    with torch.no_grad():
        _, cache = case.lvlm.run_with_cache(**case.inputs, names_filter=names)
    n = case.inputs["input_ids"].shape[1]
    for name in names:
        assert cache[name].shape == (1, 4, n, n)
        close(cache[name], case.oracle[name])
        # Not a comparison of nothing with nothing: rows differ by query and head, and are not uniform.
        assert cache[name][0, :, -1].std(dim=-1).min() > 1e-3


def test_rotated_queries_and_keys_give_the_oracle_s_pattern(case: Case) -> None:
    names = [f"blocks.{layer}.attn.hook_rot_{x}" for layer in range(case.lvlm.n_layers) for x in "qk"]
    with torch.no_grad():
        _, cache = case.lvlm.run_with_cache(**case.inputs, names_filter=names)
    for layer in range(case.lvlm.n_layers):
        q, k = (cache[f"blocks.{layer}.attn.hook_rot_{x}"][0] for x in "qk")
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, dim=1)) / 8**0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        close(pattern, case.oracle[f"blocks.{layer}.attn.hook_pattern"][0])
    if case.lvlm.family.name == "llava":  # for M-RoPE the bridge has no hooks of its own
        for name in names:
            close(cache[name], case.oracle[name])


def test_what_enters_the_decoder_agrees(case: Case) -> None:
    with torch.no_grad():
        _, cache = case.lvlm.run_with_cache(**case.inputs, names_filter="hook_embed")
    close(cache["hook_embed"], case.oracle["blocks.0.hook_resid_pre"])


def test_profile_columns_follow_from_the_oracle_s_cache(case: Case) -> None:
    tokens = cp.profile(case.lvlm, [case.inputs], probes="all", progress=False).tokens
    text = case.lvlm.model.config.get_text_config()
    n_heads, group = text.num_attention_heads, text.num_attention_heads // text.num_key_value_heads
    d_head = text.hidden_size // n_heads
    last_image = int((case.inputs["input_ids"][0] == tiny.IMAGE).nonzero().max())
    for layer in range(case.lvlm.n_layers):
        seen = {
            name: case.oracle[f"blocks.{layer}.{name}"][0].double() for name in (*HOOKS, "attn.hook_pattern")
        }
        weights, values = seen["attn.hook_pattern"], seen["attn.hook_v"]
        w_o = case.lvlm.family.layers(case.lvlm.model)[layer].self_attn.o_proj.weight.detach().double()
        shares = torch.zeros(len(values), text.hidden_size, dtype=torch.float64)
        for head in range(n_heads):
            v = values[:, head // group] @ w_o[:, head * d_head : (head + 1) * d_head].T
            shares += weights[head, -1, :, None] * v
        pre, mid, mlp = seen["hook_resid_pre"], seen["hook_resid_mid"], seen["hook_mlp_out"]
        phi = pre.abs() / (pre.pow(2).mean(-1, keepdim=True) + text.rms_norm_eps).sqrt()
        wanted = {
            "contribution": shares.norm(dim=-1),
            "attention": weights[:, -1].mean(0),
            "attention_text": weights[:, last_image + 1 :].mean((0, 1)),
            "value_norm": values.norm(dim=-1).mean(-1),
            "resid_pre_norm": pre.norm(dim=-1),
            "ffn_update_norm": mlp.norm(dim=-1),
            "attn_cosine": torch.cosine_similarity(pre, mid, dim=-1),
            "ffn_cosine": torch.cosine_similarity(mid, mid + mlp, dim=-1),
            "sink_strength": phi.amax(-1),
        }
        rows = tokens[tokens["layer"] == layer]
        for column, expected in wanted.items():
            np.testing.assert_allclose(rows[column], expected, rtol=2e-4, atol=2e-6, err_msg=column)
        # The shares of all tokens add up to what attention writes, as the oracle saw it.
        close(shares.sum(0).float(), seen["hook_attn_out"][-1].float())


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
    first = case.oracle["blocks.2.attn.hook_v"][0, 0].repeat_interleave(2, dim=0)
    close(cache["blocks.2.attn.hook_z"][0], first.expand(case.inputs["input_ids"].shape[1], -1, -1))

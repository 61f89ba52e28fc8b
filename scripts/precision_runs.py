"""What bfloat16 does to the statistics of a profile: the same weights and inputs, measured in four ways.

- ``reference``: the model in float32, profiled.
- ``capa_probe``: the model in bfloat16 on SDPA, profiled: statistics in float32 beside a bfloat16 forward.
- ``rounding``: the float32 model with every activation rounded to bfloat16, profiled. Nothing but the rounding of
  activations differs from the reference, so this is the error that no way of measuring a bfloat16 model can avoid.
- ``eager``: the model in bfloat16 on eager attention, the same statistics computed in bfloat16 from what
  ``output_attentions`` and ``output_hidden_states`` return, as is often done.

Beside them, ``exact of ...`` are the statistics in float64 of the very activations that the bfloat16 model had: what
is between these and the recorded ones is the error of computing alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
)

import capa_probe as cp

WAYS = ("capa_probe", "rounding", "eager")
COLUMNS = (
    "attention",
    "attention_text",
    "contribution",
    "removal_effect",
    "value_norm",
    "resid_pre_norm",
    "resid_mid_norm",
    "attn_update_norm",
    "ffn_update_norm",
    "attn_cosine",
    "ffn_cosine",
    "sink_strength",
)
IMAGE = 5
Table = dict[str, Tensor]  # column to (layer, position)


def build(offset: float, width: int = 512, layers: int = 8, seed: int = 0) -> PreTrainedModel:
    """A LLaVA around Qwen2, of random weights that bfloat16 represents exactly, in float32.

    Attention logits have a standard deviation of about 1 and all lie near ``offset``. Softmax does not see an offset
    that all keys share; Qwen2's checkpoints have one, from large biases of queries and keys.

    Args:
        offset: what biases of queries and keys add to every attention logit.
        width: d_model, of heads 64 wide (or 8, below 128).
        layers: decoder layers.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    d_head = 64 if width >= 128 else 8
    text = Qwen2Config(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // d_head,
        num_key_value_heads=width // d_head // 2,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=64,
        patch_size=4 if width >= 128 else 16,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
    )
    config._attn_implementation = "sdpa"
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif name.endswith(("q_proj.bias", "k_proj.bias")) and "language_model" in name:
                # The dimension that the rotary embedding turns most slowly holds the bias, and nothing else.
                parameter.zero_()
                parameter.view(-1, d_head)[:, d_head // 2 - 1] = (offset * d_head**0.5) ** 0.5
                weight = model.get_parameter(name.replace("bias", "weight"))
                weight.view(-1, d_head, width)[:, d_head // 2 - 1] = 0
            elif name.endswith("embed_tokens.weight"):
                nn.init.normal_(parameter)
            parameter.copy_(parameter.bfloat16())
    return model


def make_inputs(model: PreTrainedModel, seed: int = 0, n_text: int = 32) -> dict[str, Tensor]:
    """One prompt of random words with one image of noise, in float32."""
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.randint(6, 64, (n,), generator=generator) for n in (n_text // 4, n_text))
    image = torch.full((model.config.image_seq_length,), IMAGE)
    ids = torch.cat([before, image, after])[None]
    size = model.config.vision_config.image_size
    # bfloat16 holds the pixels exactly, so that all ways see the same image.
    pixels = torch.randn(1, 3, size, size, generator=generator).bfloat16().float()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def compare(offset: float, seed: int = 0, **sizes: Any) -> dict[str, Table]:
    """All ways on one model and prompt: way to column to (layer, position)."""
    model = build(offset, seed=seed, **sizes)
    inputs = make_inputs(model, seed)
    found = {"reference": profiled(cp.HookedLVLM(model), inputs)}
    lvlm = cp.HookedLVLM(model)
    handles = [
        module.register_forward_hook(_round_output) for module in model.modules() if _is_a_step(module)
    ]
    with lvlm.hooks([(lambda name: not name.endswith("hook_pattern"), lambda x, hook: rounded(x))]):
        found["rounding"] = profiled(lvlm, inputs)
    for handle in handles:
        handle.remove()
    half = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    in_half(model)
    lvlm = cp.HookedLVLM(model)
    found["capa_probe"], found["exact of capa_probe"] = profiled(lvlm, half), exact(lvlm, half)
    model.set_attn_implementation("eager")
    found["eager"], found["exact of eager"] = in_bfloat16(model, half), exact(lvlm, half)
    return found


def profiled(lvlm: cp.HookedLVLM, inputs: Mapping[str, Tensor]) -> Table:
    """The columns of a profile."""
    tokens = cp.profile(lvlm, [inputs], probes="all", progress=False).tokens
    return {
        name: torch.tensor(tokens[name].to_numpy(dtype=float)).reshape(lvlm.n_layers, -1) for name in COLUMNS
    }


def in_half(model: PreTrainedModel) -> None:
    """To bfloat16, as ``from_pretrained(dtype=torch.bfloat16)`` does: parameters alone.

    ``model.to(torch.bfloat16)`` would round the rotary embedding's frequencies as well, which turns late positions by
    a large angle.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()


def rounded(x: Tensor) -> Tensor:
    """To the nearest bfloat16, in float32."""
    return x.bfloat16().to(x.dtype)


def _is_a_step(module: nn.Module) -> bool:
    """Whether the output of a module is one that a bfloat16 forward rounds: it has no parts of its own."""
    return not [*module.children()]


def _round_output(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):  # cosines and sines of the rotary embedding
        return tuple(rounded(x) for x in output)
    return rounded(output) if output.is_floating_point() else None


def in_bfloat16(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Table:
    """The columns, computed in bfloat16 from what an eager model returns and what plain module hooks see."""
    layers = model.model.language_model.layers
    seen: list[dict[str, Tensor]] = [{} for _ in layers]
    handles = []
    for store, layer in zip(seen, layers, strict=True):

        def keep(name: str, store: dict[str, Tensor] = store) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                store[name] = (output[0] if isinstance(output, tuple) else output)[0]

            return hook

        handles += [
            layer.self_attn.register_forward_hook(keep("attn_out")),
            layer.self_attn.v_proj.register_forward_hook(keep("value")),
            layer.mlp.register_forward_hook(keep("mlp_out")),
        ]
    with torch.no_grad():
        out = model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for layer, store, attentions, residual in zip(
        layers, seen, out.attentions, out.hidden_states[:-1], strict=True
    ):
        w_o = layer.self_attn.o_proj.weight.detach()
        value = store["value"].unflatten(-1, (-1, w_o.shape[1] // len(attentions[0])))
        updates = (residual[0], residual[0] + store["attn_out"], store["attn_out"], store["mlp_out"])
        found.append(columns(model, inputs, attentions[0], value, w_o, *updates))
    assert all(x.dtype == torch.bfloat16 for row in found for x in row.values())
    return {name: torch.stack([row[name] for row in found]).double() for name in COLUMNS}


def exact(lvlm: cp.HookedLVLM, inputs: Mapping[str, Tensor]) -> Table:
    """The columns in float64, of the activations that the model has as it runs."""
    points = ("attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_v")
    points += ("hook_resid_pre", "hook_resid_mid", "hook_attn_out", "hook_mlp_out")
    names = [f"blocks.{layer}.{point}" for layer in range(lvlm.n_layers) for point in points]
    with torch.no_grad():
        _, cache = lvlm.run_with_cache(**inputs, names_filter=names, use_cache=False)
    found = []
    for number, layer in enumerate(lvlm.family.layers(lvlm.model)):
        q, k, v, *updates = (cache[f"blocks.{number}.{point}"][0].double() for point in points)
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        pattern = (scores * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf).softmax(dim=-1)
        w_o = layer.self_attn.o_proj.weight.detach().double()
        found.append(columns(lvlm.model, inputs, pattern, v, w_o, *updates))
    return {name: torch.stack([row[name] for row in found]) for name in COLUMNS}


def columns(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    pattern: Tensor,
    value: Tensor,
    w_o: Tensor,
    pre: Tensor,
    mid: Tensor,
    attn_out: Tensor,
    mlp_out: Tensor,
) -> Table:
    """The columns of one layer, each (position,), in the dtype of what is given.

    Args:
        model: for its epsilon.
        inputs: the prompt.
        pattern: (head, query, key).
        value: (key, kv_head, d_head).
        w_o: (d_model, head * d_head).
        pre: residual stream that enters the layer, (position, d_model); so the others.
        mid: between attention and FFN.
        attn_out: what attention adds.
        mlp_out: what the FFN adds.
    """
    after = int((inputs["input_ids"][0] == IMAGE).nonzero().max()) + 1
    row, eps = pattern[:, -1], model.config.text_config.rms_norm_eps
    per_head = value.repeat_interleave(len(row) // value.shape[1], dim=1)  # key, head, d_head
    weighted = row.T[..., None] * per_head
    change = (row / (1 - row)).T[..., None] * (weighted.sum(dim=0) - per_head)
    return {
        "attention": row.mean(dim=0),
        "attention_text": pattern[:, after:].mean(dim=(0, 1)),
        "contribution": (weighted.flatten(1) @ w_o.T).norm(dim=-1),
        "removal_effect": (change.flatten(1) @ w_o.T).norm(dim=-1),
        "value_norm": value.norm(dim=-1).mean(dim=-1),
        "resid_pre_norm": pre.norm(dim=-1),
        "resid_mid_norm": mid.norm(dim=-1),
        "attn_update_norm": attn_out.norm(dim=-1),
        "ffn_update_norm": mlp_out.norm(dim=-1),
        "attn_cosine": F.cosine_similarity(pre, pre + attn_out, dim=-1),
        "ffn_cosine": F.cosine_similarity(mid, mid + mlp_out, dim=-1),
        "sink_strength": (pre * torch.rsqrt(pre.square().mean(-1, keepdim=True) + eps)).abs().amax(-1),
    }


def relative_error(found: Table, reference: Table, column: str) -> Tensor:
    """``|found - reference| / |reference|``: (layer, position)."""
    return (found[column] - reference[column]).abs() / reference[column].abs()


def quantiles(error: Tensor) -> dict[str, float]:
    """Median and 95th percentile; NaN (a removal effect of 0 / 0) counts as infinite."""
    values = error.nan_to_num(nan=torch.inf).flatten().numpy()
    return {
        "median": float(np.median(values)),
        "p95": float(np.quantile(values, 0.95, method="higher")),
    }

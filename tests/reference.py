"""The columns of prefill from an eager forward and plain module hooks, for tests of one layer or one new column.

``tests/oracles`` has every column of every table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def activations(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Any, list[dict[str, Tensor]]]:
    """One forward of an eager model: its output, and per layer what plain module hooks see."""
    layers = model.model.language_model.layers
    seen: list[dict[str, Tensor]] = [{} for _ in layers]
    handles = []
    for store, layer in zip(seen, layers, strict=True):

        def keep(name: str, store: dict[str, Tensor] = store) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                store[name] = (output[0] if isinstance(output, tuple) else output).clone()

            return hook

        handles += [
            layer.self_attn.register_forward_hook(keep("attn_out")),
            layer.self_attn.v_proj.register_forward_hook(keep("v")),
            layer.mlp.register_forward_hook(keep("mlp_out")),
        ]
    with torch.no_grad():
        out = model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return out, seen


def prefill_columns(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    sample: int,
    layer: int,
    query: int,
    text_queries: list[int],
) -> dict[int, dict[str, float]]:
    """Column values of every non-padding position of one sample and layer, by padded position."""
    out, seen = activations(model, inputs)
    config = model.config.get_text_config()
    n_heads, n_kv = config.num_attention_heads, config.num_key_value_heads
    d_head = config.hidden_size // n_heads
    attention = out.attentions[layer][sample].double()
    pre = out.hidden_states[layer][sample].double()
    acts = {name: x[sample].double() for name, x in seen[layer].items()}
    values = acts["v"].view(-1, n_kv, d_head)
    w_o = model.model.language_model.layers[layer].self_attn.o_proj.weight.detach().double()
    positions = inputs["attention_mask"][sample].nonzero().flatten().tolist()

    def through_w_o(per_head: list[Tensor]) -> Tensor:
        total = torch.zeros(config.hidden_size, dtype=torch.float64)
        for h, vector in enumerate(per_head):
            total += w_o[:, h * d_head : (h + 1) * d_head] @ vector
        return total

    table: dict[int, dict[str, float]] = {}
    for i in positions:
        v = [values[i, h * n_kv // n_heads] for h in range(n_heads)]
        without = []
        for h in range(n_heads):
            kv = h * n_kv // n_heads
            full = sum(attention[h, query, j] * values[j, kv] for j in positions)
            rest = sum(attention[h, query, j] for j in positions if j != i)
            reduced = sum(attention[h, query, j] * values[j, kv] for j in positions if j != i) / rest
            without.append(reduced - full)
        mid = pre[i] + acts["attn_out"][i]
        rms = math.sqrt(float((pre[i] ** 2).mean()) + config.rms_norm_eps)
        strengths = sorted(((abs(float(x)) / rms, d) for d, x in enumerate(pre[i])), reverse=True)

        def cosine(a: Tensor, b: Tensor) -> float:
            return float(a @ b / (a.norm() * b.norm()))

        row = {
            "attention": sum(float(attention[h, query, i]) for h in range(n_heads)) / n_heads,
            "attention_text": math.nan,
            "contribution": float(
                through_w_o([attention[h, query, i] * v[h] for h in range(n_heads)]).norm()
            ),
            "removal_effect": float(through_w_o(without).norm()),
            "value_norm": sum(float(values[i, g].norm()) for g in range(n_kv)) / n_kv,
            "resid_pre_norm": float(pre[i].norm()),
            "resid_mid_norm": float(mid.norm()),
            "attn_update_norm": float(acts["attn_out"][i].norm()),
            "ffn_update_norm": float(acts["mlp_out"][i].norm()),
            "attn_cosine": cosine(pre[i], mid),
            "ffn_cosine": cosine(mid, mid + acts["mlp_out"][i]),
        }
        if text_queries:
            received = [float(attention[h, q, i]) for h in range(n_heads) for q in text_queries]
            row["attention_text"] = sum(received) / len(received)
        for rank, (strength, dim) in enumerate(strengths[:4], start=1):
            suffix = "" if rank == 1 else f"_{rank}"
            row[f"sink_strength{suffix}"], row[f"sink_dim{suffix}"] = strength, dim
        table[i] = row
    return table

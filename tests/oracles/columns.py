"""Every measured column of the token table, worked out in loops from what one decoder layer does to one sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tests import naive

Vector = list[float]
Row = dict[str, Any]


class Layer(NamedTuple):
    """What one decoder layer does to one sample, as nested lists over that sample's own positions.

    Attributes:
        attention: [head][query][key] probabilities.
        values: [kv_head][key][d_head].
        pre: [query][d_model] residual stream entering the layer.
        attn_out: [query][d_model] what attention adds.
        mlp_out: [query][d_model] what the FFN adds.
        w_o: [d_model][head * d_head] output projection.

    At prefill every position is a query, at a decode step the last one alone.
    """

    attention: naive.Nested
    values: naive.Nested
    pre: list[Vector]
    attn_out: list[Vector]
    mlp_out: list[Vector]
    w_o: list[Vector]


def measured(
    layer: Layer, eps: float, text_queries: Sequence[int], sink_dims: Sequence[int] | None = None
) -> list[Row]:
    """The measured columns of one sample and layer, a dict per position; the last position is the query token.

    Args:
        layer: what the layer does.
        eps: of the model's RMSNorm.
        text_queries: positions of the text after the last image; none at a decode step.
        sink_dims: the dimensions that sink strength is restricted to.
    """
    n_heads, n_keys = len(layer.attention), len(layer.values[0])
    row = [head[-1] for head in layer.attention]
    contribution = naive.attention_contribution([row], [layer.values], layer.w_o)[0]
    removal = [math.nan] if n_keys == 1 else naive.removal_effect([row], [layer.values], layer.w_o)[0]
    value_norm = naive.value_norms([layer.values])[0]
    own = [_own_columns(layer, q, eps, sink_dims) for q in range(len(layer.pre))]
    missing = {name: -1 if name.startswith("sink_dim") else math.nan for name in own[0]}
    own = [missing] * (n_keys - len(own)) + own
    found = []
    for i in range(n_keys):
        received = [layer.attention[h][q][i] for h in range(n_heads) for q in text_queries]
        found.append(
            {
                "attention": math.fsum(row[h][i] for h in range(n_heads)) / n_heads,
                "attention_text": math.fsum(received) / len(received) if received else math.nan,
                "contribution": contribution[i],
                "removal_effect": removal[i],
                "value_norm": value_norm[i],
                **own[i],
            }
        )
    return found


def _own_columns(layer: Layer, i: int, eps: float, sink_dims: Sequence[int] | None) -> Row:
    """Columns along the residual stream of one position."""
    pre, attn_out, mlp_out = layer.pre[i], layer.attn_out[i], layer.mlp_out[i]
    mid = [a + b for a, b in zip(pre, attn_out, strict=True)]
    columns: Row = {
        "resid_pre_norm": naive.norm(pre),
        "resid_mid_norm": naive.norm(mid),
        "attn_update_norm": naive.norm(attn_out),
        "ffn_update_norm": naive.norm(mlp_out),
        "attn_cosine": naive.io_cosine(pre, attn_out),
        "ffn_cosine": naive.io_cosine(mid, mlp_out),
    }
    dims = range(len(pre)) if sink_dims is None else sink_dims
    strengths = naive.sink_strength(pre, eps, list(dims))
    for rank in range(4):
        suffix = "" if rank == 0 else f"_{rank + 1}"
        phi, dim = strengths[rank] if rank < len(strengths) else (math.nan, -1)
        columns[f"sink_strength{suffix}"], columns[f"sink_dim{suffix}"] = phi, dim
    return columns

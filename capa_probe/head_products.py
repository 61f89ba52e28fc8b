"""Contributions of the same keys to many queries: what heads write of a key is multiplied once and kept."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from capa_probe.measures import attention_contribution


def written_products(
    values: Float[Tensor, "batch kv_head key d_head"], weight: Float[Tensor, "d_model head_x_d_head"]
) -> Float[Tensor, "batch key head head"]:
    """Inner products ``(v[g(h), i] W_O[h]) . (v[g(k), i] W_O[k])`` of what two heads write of key ``i``.

    They do not depend on a query, so that :func:`contribution_of_products` has the contribution to every further query
    at head x head multiplications for each key, instead of another output projection.

    Args:
        values: (batch, kv_head, key, d_head) value vectors.
        weight: (d_model, head * d_head) of the output projection.

    Returns:
        (batch, key, head, head), float32: in a sum over heads that nearly cancel, too few digits
        (see :func:`contribution_of_products`).
    """
    batch, kv_heads, keys, d_head = values.shape
    of_heads = weight.reshape(len(weight), -1, d_head).permute(1, 2, 0)  # head d_head d_model, not copied
    heads, _, d_model = of_heads.shape
    products = torch.empty(batch, keys, heads, heads, device=values.device)
    chunk = max(1, 2**20 // (batch * heads * d_model))  # stays in a cache
    for start in range(0, keys, chunk):
        some = values[:, :, start : start + chunk].to(weight.dtype)
        by_head = some.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1).reshape(heads, -1, d_head)
        written = torch.bmm(by_head, of_heads).float().transpose(0, 1)  # batch_x_key head d_model
        found = torch.bmm(written, written.transpose(1, 2))
        products[:, start : start + chunk] = found.reshape(batch, -1, heads, heads)
    return products


def contribution_of_products(
    attention: Float[Tensor, "batch query head key"],
    products: Float[Tensor, "batch key head head"],
    values: Float[Tensor, "batch kv_head key d_head"],
    weight: Float[Tensor, "d_model head_x_d_head"],
) -> Float[Tensor, "batch query key"]:
    """:func:`capa_probe.measures.attention_contribution` to several query tokens by way of :func:`written_products`.

    Where heads cancel to less than 1/16 of the sum of their lengths, rounding of the products would show; those keys
    are projected.

    Args:
        attention: (batch, query, head, key) attention probabilities.
        products: (batch, key, head, head) of these keys.
        values: (batch, kv_head, key, d_head) value vectors.
        weight: (d_model, head * d_head) of the output projection.

    Returns:
        (batch, query, key) norms in the units of the residual stream, float32.
    """
    # Scaled, since the squares of small probabilities leave float32.
    largest = attention.amax(dim=2).clamp(min=torch.finfo(torch.float32).tiny)  # batch query key
    a = (attention / largest.unsqueeze(2)).permute(0, 3, 1, 2)  # batch key query head
    squares = ((a @ products) * a).sum(dim=-1).transpose(1, 2)
    alone = products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()  # batch key head
    lengths = (a @ alone.unsqueeze(-1)).squeeze(-1).transpose(1, 2)
    contribution = squares.clamp(min=0).sqrt() * largest
    cancelled = squares < lengths.square() / 256
    for query in cancelled.any(dim=2).any(dim=0).nonzero().flatten().tolist():
        at = cancelled[:, query].any(dim=0).nonzero().flatten()
        exact = attention_contribution(attention[:, query][..., at], values[:, :, at], weight)
        contribution[:, query, at] = torch.where(cancelled[:, query, at], exact, contribution[:, query, at])
    return contribution

"""Attention masks over entries that are a part of the input's positions."""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor, batch: int = 0) -> Tensor:
    """Positions ``index`` (batch, kept) of a tensor with axes (..., batch, position, last).

    Args:
        x: such as hidden states (batch, position, d_model); its batch axis may have length 1.
        index: (batch, kept).
        batch: which axis is the batch; the position axis follows it.
    """
    index = index.to(x.device)
    x = x.movedim((batch, batch + 1), (0, 1))
    if x.shape[0] != index.shape[0]:
        x = x.expand(index.shape[0], *x.shape[1:])
    rows = torch.arange(index.shape[0], device=x.device)[:, None]
    return x[rows, index].movedim((0, 1), (batch, batch + 1))


def entries_mask(
    mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    first: int,
    hidden_queries: Tensor | None = None,
) -> Tensor:
    """The mask of an attention call whose queries and keys are a part of the input's positions.

    Args:
        mask: what the model made for all positions, (batch or 1, 1, position, all positions), bool or additive; None
            stands for plain causal attention.
        query: (batch, query) input position of every query.
        key: (batch, key) input position of every key.
        visible: bool (batch, key), which keys may be seen.
        first: input position of the first row of ``mask``.
        hidden_queries: bool (batch, query), queries that are dropped tokens or filling and are the last keys: each sees
            itself, so that no softmax is empty.

    Returns:
        (batch, 1, query, key), additive where ``mask`` is, else bool.
    """
    batch, bias = query.shape[0], None
    if mask is None:
        allowed = key[:, None, :] <= query[:, :, None]
    else:
        mask = mask[:, 0].expand(batch, -1, -1)
        rows = torch.arange(batch, device=mask.device)[:, None, None]
        picked = mask[rows, (query - first).to(mask.device)[:, :, None], key.to(mask.device)[:, None, :]]
        additive = picked.dtype != torch.bool
        bias, allowed = (picked, torch.ones_like(picked, dtype=torch.bool)) if additive else (None, picked)
    allowed = allowed & visible.to(allowed.device)[:, None, :]
    if hidden_queries is not None:
        n_queries, n_keys = query.shape[1], key.shape[1]
        itself = torch.eye(n_queries, dtype=torch.bool, device=allowed.device)
        own = torch.nn.functional.pad(itself, (n_keys - n_queries, 0))[None] & hidden_queries[..., None]
        allowed = allowed | own
        bias = None if bias is None else bias.masked_fill(own, 0)
    if bias is None:
        return allowed[:, None]
    return bias.masked_fill(~allowed, torch.finfo(bias.dtype).min)[:, None]

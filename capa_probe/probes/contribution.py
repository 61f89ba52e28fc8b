"""Attention contribution: what each token really adds to the residual stream of the current query token."""

from __future__ import annotations

import torch
from torch import Tensor

from capa_probe.lvlm.tap import AttentionCall
from capa_probe.measures import attention_contribution, contribution_of_products, written_products
from capa_probe.probes.base import AttentionProbe, StepContext

#: Keys that products of further ones have room for, before those known are copied.
_ROOM = 64


class Contribution(AttentionProbe):
    """CAPA's score ``C[i] = || sum_h A[h, i] v[g(h), i] W_O[h] ||``."""

    name = "contribution"
    columns = ("contribution",)

    def measure(self, call: AttentionCall, row: Tensor, context: StepContext) -> dict[str, Tensor]:
        """``contribution`` (batch, key), in units of the residual stream."""
        products = _products(call, context)
        if products is None:
            return {"contribution": attention_contribution(row, call.value, call.project)}
        weight = call.projection_weight()
        assert weight is not None
        return {"contribution": contribution_of_products(row, products, call.value, weight)}


def _products(call: AttentionCall, context: StepContext) -> Tensor | None:
    """(batch, key, head, head) products of all keys, of which a decode step computes those of its own token.

    None at prefill, which needs every key once, and where they cannot be had or do not pay.
    """
    weight = call.projection_weight()
    if context.step == 0 or context.memory is None or weight is None:
        return None
    place, n, new = (Contribution.name, call.layer), call.value.shape[2], call.query.shape[2]
    known, buffer = context.memory.get(place, (0, None))
    if buffer is None or known + new != n:
        # The first step; or a cache that drops or moves keys, as one with a sliding window does.
        known, buffer = 0, None
    if buffer is None or n > buffer.shape[1]:
        grown = torch.empty(
            len(call.value),
            n + _ROOM,
            *2 * (call.query.shape[1],),
            device=call.value.device,
        )
        if buffer is not None:
            grown[:, :known] = buffer[:, :known]
        buffer = grown
    buffer[:, known:n] = written_products(call.value[:, :, known:], weight)
    context.memory[place] = (n, buffer)
    return buffer[:, :n]

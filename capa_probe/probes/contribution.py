"""Attention contribution: what each token really adds to the residual stream of the current query token."""

from __future__ import annotations

import torch
from torch import Tensor

from capa_probe.lvlm.tap import AttentionCall
from capa_probe.measures import attention_contribution, contribution_of_products, written_products
from capa_probe.probes.base import AttentionProbe, StepContext


class Contribution(AttentionProbe):
    """CAPA's score ``C[i] = || sum_h A[h, i] v[g(h), i] W_O[h] ||``."""

    name = "contribution"
    columns = ("contribution",)

    def measure(self, call: AttentionCall, row: Tensor, context: StepContext) -> dict[str, Tensor]:
        """``contribution`` (batch, key), in units of the residual stream."""
        products = _products(call, context)
        if products is None:
            return {"contribution": attention_contribution(row, call.value, call.project)}
        return {"contribution": contribution_of_products(row, products)}


def _products(call: AttentionCall, context: StepContext) -> Tensor | None:
    """(batch, key, head, head) products of all keys, of which a decode step computes those of its own token.

    None at prefill, which needs every key once, and where they cannot be had or do not pay.
    """
    weight = call.projection_weight()
    if context.step == 0 or context.memory is None or weight is None or call.value.device.type == "mps":
        return None
    place = (Contribution.name, call.layer)
    known, new = context.memory.get(place), call.query.shape[2]
    if known is not None and known.shape[1] + new == call.value.shape[2]:
        products = torch.cat([known, written_products(call.value[:, :, -new:], weight)], dim=1)
    else:  # the first step; or a cache that drops or moves keys, as one with a sliding window does
        products = written_products(call.value, weight)
    context.memory[place] = products
    return products

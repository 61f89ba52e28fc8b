"""How much attention each token receives: from the current query token, and from the question's text."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from capa_probe.lvlm.tap import AttentionCall
from capa_probe.probes.base import AttentionProbe, StepContext

#: Query rows computed at a time for the mean over text queries; bounds memory at batch x head x this x key.
QUERY_CHUNK = 32


class Attention(AttentionProbe):
    """Mean over heads of the attention probability, from one query and averaged over the text after the images."""

    name = "attention"
    columns = ("attention", "attention_text")
    may_be_nan = ("attention_text",)  # without an image

    def measure(self, call: AttentionCall, row: Tensor, context: StepContext) -> dict[str, Tensor]:
        """``attention`` and, at prefill, ``attention_text``, each (batch, key); the latter NaN without an image."""
        columns = {"attention": row.mean(dim=1)}
        if context.step == 0:
            columns["attention_text"] = mean_over_queries(call, context.spans.after_images)
        return columns


def mean_over_queries(call: AttentionCall, queries: Tensor) -> Tensor:
    """Attention averaged over heads and over chosen queries, computed in chunks of query rows.

    Args:
        call: an attention call whose query axis is the prompt.
        queries: bool (batch, query), which to average over.

    Returns:
        (batch, key), float32; NaN for a sample with no chosen query.
    """
    queries = queries.to(call.query.device)
    total = torch.zeros(call.key.shape[0], call.key.shape[2], device=call.query.device)
    wanted = queries.any(dim=0).nonzero().flatten()
    if len(wanted):
        for start in range(int(wanted[0]), int(wanted[-1]) + 1, QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, int(wanted[-1]) + 1)
            rows = call.probabilities(start, stop)  # batch head query key
            weights = queries[:, None, start:stop].float().expand(-1, rows.shape[1], -1) / rows.shape[1]
            total += (weights.flatten(1).unsqueeze(1) @ rows.flatten(1, 2)).squeeze(1)
    count = queries.sum(dim=1, keepdim=True)
    return torch.where(count > 0, total / count.clamp(min=1), math.nan)

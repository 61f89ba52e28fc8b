"""Attention contribution: what each token really adds to the residual stream of the current query token."""

from __future__ import annotations

from torch import Tensor

from capa_probe.lvlm.tap import AttentionCall
from capa_probe.measures import attention_contribution
from capa_probe.probes.base import AttentionProbe, StepContext


class Contribution(AttentionProbe):
    """CAPA's score ``C[i] = || sum_h A[h, i] v[g(h), i] W_O[h] ||``."""

    name = "contribution"
    columns = ("contribution",)

    def measure(self, call: AttentionCall, row: Tensor, context: StepContext) -> dict[str, Tensor]:
        """``contribution`` (batch, key), in units of the residual stream."""
        return {"contribution": attention_contribution(row, call.value, call.project)}

"""Removal effect: how the attention output of the current query token would change without each token."""

from __future__ import annotations

from torch import Tensor

from capa_probe.lvlm.tap import AttentionCall
from capa_probe.measures import removal_effect
from capa_probe.probes.base import AttentionProbe, StepContext


class RemovalEffect(AttentionProbe):
    """Exact local effect of pruning one token; a second output projection per layer, hence opt-in."""

    name = "removal_effect"
    columns = ("removal_effect",)
    may_be_nan = columns  # without another key
    default = False

    def measure(self, call: AttentionCall, row: Tensor, context: StepContext) -> dict[str, Tensor]:
        """``removal_effect`` (batch, key), in units of the residual stream; NaN where no other key is seen."""
        return {"removal_effect": removal_effect(row, call.value, call.project)}

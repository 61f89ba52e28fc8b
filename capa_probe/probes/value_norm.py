"""Value norms: how long the value vector is that each token offers to attention."""

from __future__ import annotations

from torch import Tensor

from capa_probe.lvlm.tap import AttentionCall
from capa_probe.measures import value_norms
from capa_probe.probes.base import AttentionProbe, StepContext


class ValueNorm(AttentionProbe):
    """L2 norm of the value vector, mean over KV heads."""

    name = "value_norm"
    columns = ("value_norm",)
    passed = None  # the vector is what it was

    def measure(self, call: AttentionCall, row: Tensor, context: StepContext) -> dict[str, Tensor]:
        """``value_norm`` (batch, key)."""
        return {"value_norm": value_norms(call.value)}

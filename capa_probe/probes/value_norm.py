"""Value norms: how long the value vector is that each token offers to attention."""

from __future__ import annotations

import torch
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
        if context.memory is None:
            return {"value_norm": value_norms(call.value)}
        place, n, new = (ValueNorm.name, call.layer), call.value.shape[2], call.query.shape[2]
        before = context.memory.get(place)
        if context.step == 0 or before is None or before.shape[1] + new != n:
            norms = value_norms(call.value)
        else:  # the cache has grown by this step's token
            norms = torch.cat([before, value_norms(call.value[:, :, -new:])], dim=1)
        context.memory[place] = norms
        return {"value_norm": norms}

"""FFN input-output cosine: does the FFN change the direction of a token's residual stream at all?"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from capa_probe.measures import io_cosine
from capa_probe.probes.base import ResidualProbe, StepContext


class FFNCosine(ResidualProbe):
    """``cos(x, x + FFN(norm(x)))`` with x the residual stream entering the FFN block (CAPA)."""

    name = "ffn_cosine"
    columns = ("ffn_cosine",)
    points = ("hook_resid_mid", "hook_mlp_out")

    def measure(self, activations: Mapping[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """``ffn_cosine`` (batch, query)."""
        return {"ffn_cosine": io_cosine(activations["hook_resid_mid"], activations["hook_mlp_out"])}

"""Sink strength: how far the largest dimensions of a token's residual stream stand out, and which they are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from capa_probe.measures import sink_strength
from capa_probe.probes.base import ResidualProbe, StepContext

#: How many of the largest dimensions are kept per token.
TOP = 4


class SinkStrength(ResidualProbe):
    """phi of the residual stream entering the layer: the four largest dimensions ("See What You Are Told")."""

    name = "sink_strength"
    columns = tuple(
        f"{column}{suffix}"
        for suffix in ("", *(f"_{rank}" for rank in range(2, TOP + 1)))
        for column in ("sink_strength", "sink_dim")
    )
    points = ("hook_resid_pre",)

    def measure(self, activations: Mapping[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """``sink_strength`` to ``sink_dim_4``, each (batch, query); dimension -1 beyond the dimensions asked for."""
        strength, dim = sink_strength(
            activations["hook_resid_pre"], eps=context.norm_eps, dims=context.sink_dims, top=TOP
        )
        values = [x for rank in range(TOP) for x in (strength[..., rank], dim[..., rank])]
        return dict(zip(self.columns, values, strict=True))

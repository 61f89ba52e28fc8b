"""Sink strength: how far the largest dimensions of a token's residual stream stand out, and which they are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from capa_probe.measures import sink_strength
from capa_probe.probes.base import ResidualProbe, StepContext
from capa_probe.schema import SINK_COLUMNS, SINK_RANKS


class SinkStrength(ResidualProbe):
    """phi of the residual stream entering the layer: the four largest dimensions ("See What You Are Told")."""

    name = "sink_strength"
    columns = tuple(column for pair in SINK_COLUMNS for column in pair)
    may_be_nan = tuple(strength for strength, _ in SINK_COLUMNS[1:])  # fewer dimensions than columns
    points = ("hook_resid_pre",)

    def measure(self, activations: Mapping[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """``sink_strength`` to ``sink_dim_4``, each (batch, query); dimension -1 beyond the dimensions asked for."""
        strength, dim = sink_strength(
            activations["hook_resid_pre"], eps=context.norm_eps, dims=context.sink_dims, top=SINK_RANKS
        )
        values = [x for rank in range(SINK_RANKS) for x in (strength[..., rank], dim[..., rank])]
        return dict(zip(self.columns, values, strict=True))

"""Residual updates: how long the residual stream is, and what attention and FFN add to it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from capa_probe.measures import io_cosine
from capa_probe.probes.base import ResidualProbe, StepContext


class Residual(ResidualProbe):
    """Norms of the residual stream and its two updates, and how far attention turns it."""

    name = "residual"
    columns = ("resid_pre_norm", "resid_mid_norm", "attn_update_norm", "ffn_update_norm", "attn_cosine")
    points = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out")

    def measure(self, activations: Mapping[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Four L2 norms and ``attn_cosine = cos(x, x + attention output)``, each (batch, query), in float32."""
        pre, attn_out, mid, mlp_out = (activations[point].float() for point in self.points)
        return {
            "resid_pre_norm": pre.norm(dim=-1),
            "resid_mid_norm": mid.norm(dim=-1),
            "attn_update_norm": attn_out.norm(dim=-1),
            "ffn_update_norm": mlp_out.norm(dim=-1),
            "attn_cosine": io_cosine(pre, attn_out),
        }

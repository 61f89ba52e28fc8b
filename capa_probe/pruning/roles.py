"""Which visual tokens are attention sinks at a layer, and which of those are Anchors or Dumps, while the model runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from capa_probe.measures import sink_strength

#: Below this layer nothing is called a sink (CAPA).
FIRST_SINK_LAYER = 2


def sinks(
    residual: Tensor, visual: Tensor, tau: float, dims: Sequence[int] | None = None, eps: float = 1e-6
) -> Tensor:
    """Visual tokens whose sink strength exceeds ``tau``: bool (batch, position).

    Args:
        residual: (batch, position, d_model) residual stream entering the layer.
        visual: bool (batch, position).
        tau: absolute threshold.
        dims: sink dimensions; None for any that exceeds ``tau`` on at most half of the sample's visual tokens: one that
            is large on most tokens is an offset, which makes none of them a sink.
        eps: of the model's RMSNorm.
    """
    if dims is not None:
        strength, _ = sink_strength(residual, eps, dims)
        return (strength[..., 0] > tau) & visual
    x = residual.float()
    massive = (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)).abs() > tau
    massive &= visual[..., None]
    offset = 2 * massive.sum(dim=1) > visual.sum(dim=1, keepdim=True)
    return (massive & ~offset[:, None]).any(dim=-1)


def anchors(contribution: Tensor, sink: Tensor, visual: Tensor) -> Tensor:
    """Sinks whose contribution is at least the median of the sample's non-sink visual tokens: bool (batch, position).

    The other sinks are Probability Dumps. Where a sample has no non-sink visual token there is nothing to compare with,
    and every sink counts as an Anchor, since a Dump is what may go.

    Args:
        contribution: (batch, position) attention contribution.
        sink: bool (batch, position).
        visual: bool (batch, position).
    """
    others = torch.where(visual & ~sink, contribution, math.nan)
    middle = others.nanquantile(0.5, dim=1, keepdim=True).nan_to_num(-math.inf)
    return sink & (contribution >= middle)

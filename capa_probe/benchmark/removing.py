"""Pruners that remove visual tokens by their role, or as many others at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from capa_probe.errors import CapaProbeError
from capa_probe.measures import resolve_tau
from capa_probe.pruning import Pruner, Scoring
from capa_probe.pruning.keep import Keep
from capa_probe.pruning.random_tokens import random_scores
from capa_probe.pruning.roles import FIRST_SINK_LAYER, anchors, sinks

Role: TypeAlias = Literal["dump", "anchor"]
Instead: TypeAlias = Literal["role", "non_sinks", "visual"]
#: What :func:`roles` says of each token.
NO_SINK, DUMP, ANCHOR = 0.0, 1.0, 2.0
_CODES = {"dump": DUMP, "anchor": ANCHOR}


@dataclass(frozen=True)
class RemoveRole(Pruner):
    """Removes all sinks of one role, or as many other visual tokens of the same sample at random.

    Roles are those at the layer before the pruning layer, told while the model runs: from its input residual stream and
    the contribution to its attention. Which dimensions make a sink cannot be told from one prompt: with those that
    :func:`capa_probe.classify_sinks` found at that layer over a set of samples, roles are the same as there.

    Attributes:
        dims: sink dimensions at the layer before the pruning layer; at least one.
        role: the sinks that go, or are counted.
        instead: what goes: "role" itself, or at random as many "non_sinks", or as many of all "visual" tokens. Where
            there are fewer non-sinks than that, all of them.
        tau: absolute threshold on sink strength, or "relative".
        seed: of the draw.
    """

    dims: tuple[int, ...] = ()
    role: Role = "dump"
    instead: Instead = "role"
    tau: float | str = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.role not in _CODES:
            raise CapaProbeError(f'role={self.role!r} was given; give "dump" or "anchor".')
        if not self.dims:
            raise CapaProbeError("dims=() was given; give at least one sink dimension.")

    @property
    def uses_residual(self) -> bool:
        """Sinks are found in the residual stream."""
        return True

    def score_tokens(self, scoring: Scoring) -> Tensor:
        """0 for what goes, 1 for what stays."""
        role = roles(scoring, self.dims, self.tau)
        theirs = role == _CODES[self.role]
        if self.instead == "role":
            return 1.0 - theirs.float()
        visual = scoring.visual.to(role.device)
        eligible = visual & (role == NO_SINK) if self.instead == "non_sinks" else visual
        draw = random_scores(scoring, self.seed).to(role.device).masked_fill(~eligible, -1.0)
        # Rank of each token in the draw; the first n of what may go, go.
        rank = draw.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return 1.0 - (eligible & (rank < theirs.sum(dim=1, keepdim=True))).float()

    def choose(
        self, scores: Tensor, image: Tensor, alive: Tensor, keep: Keep, protected: Tensor | None
    ) -> Tensor:
        """What stays, whatever the budget."""
        return alive & ((image < 0) | (scores > 0))


def roles(scoring: Scoring, dims: Sequence[int], tau: float | str) -> Tensor:
    """Role of every token at the scored layer: (batch, key) float32, one of ``NO_SINK``, ``DUMP``, ``ANCHOR``.

    Args:
        scoring: with the residual stream.
        dims: sink dimensions.
        tau: absolute threshold on sink strength, or "relative".
    """
    assert scoring.residual is not None
    visual = scoring.visual.to(scoring.residual.device)
    threshold = resolve_tau(tau, scoring.residual.shape[-1])
    sink = sinks(scoring.residual, visual, threshold, dims, scoring.norm_eps)
    sink &= scoring.layer >= FIRST_SINK_LAYER
    anchor = anchors(scoring.contribution.to(sink.device), sink, visual)
    return torch.where(anchor, ANCHOR, torch.where(sink, DUMP, NO_SINK))

"""FastV: attention from the last token (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from capa_probe.pruning.base import Pruner
from capa_probe.pruning.keep import Keep
from capa_probe.pruning.scoring import Scoring


@dataclass(frozen=True)
class FastV(Pruner):
    """Keeps the visual tokens that the last prompt token attends to most, in the layer before; mean over heads.

    As in the authors' code (pkunlp-icler/FastV), with their defaults K = 2 and R = 50 %.
    """

    layers: tuple[int, ...] = (2,)
    keep: Keep | tuple[Keep, ...] = 0.5

    @property
    def scored_by(self) -> str:
        """One row of the attention pattern."""
        return "attention"

    def score_tokens(self, scoring: Scoring) -> Tensor:
        """Mean attention probability over heads."""
        return scoring.row.mean(dim=1)

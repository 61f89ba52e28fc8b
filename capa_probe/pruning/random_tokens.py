"""Random visual tokens: the yardstick of every score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capa_probe.pruning.base import Pruner
from capa_probe.pruning.scoring import Scoring


@dataclass(frozen=True)
class Random(Pruner):
    """Keeps visual tokens drawn at random.

    The draw depends on the seed, the layer and the sample's own tokens, not on what else is in the batch.

    Attributes:
        seed: of the draw.
    """

    seed: int = 0

    uses_attention = False

    @property
    def scored_by(self) -> str:
        """Nothing that is counted."""
        return "random"

    def score_tokens(self, scoring: Scoring) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return random_scores(scoring, self.seed)


def random_scores(scoring: Scoring, seed: int) -> Tensor:
    """A uniform number for every visual token, float32 (batch, key); the same whatever the batch holds beside it."""
    scores = torch.zeros(scoring.image.shape)
    for row, visual in enumerate(scoring.visual.cpu()):
        own = scoring.ids[row][~scoring.padding[row]].tolist()
        mixed = hash((seed, scoring.prune_layer, scoring.step, *own))
        generator = torch.Generator().manual_seed(mixed % 2**63)
        scores[row, visual] = torch.rand(int(visual.sum()), generator=generator)
    return scores.to(scoring.image.device)

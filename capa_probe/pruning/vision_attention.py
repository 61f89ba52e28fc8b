"""Attention received in the vision tower: tokens are dropped before the decoder sees any."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from capa_probe.pruning.base import Pruner
from capa_probe.pruning.scoring import Scoring


@dataclass(frozen=True)
class VisionAttention(Pruner):
    """Keeps the visual tokens whose patches receive most attention from the other patches, before the decoder.

    The attention is that of the tower's feature layer, mean over heads, without a CLS token; of patches that are merged
    into one token, the mean. It is the first of the two scores of FoPru (arXiv 2411.14164), and needs no CLS token. In
    windowed layers a patch receives attention from its window alone. The question plays no part.
    """

    layers: tuple[int, ...] = (0,)

    uses_attention = False
    tower = ("attention",)

    def score_tokens(self, scoring: Scoring) -> Tensor:
        """Attention received, mean over the patches of a token."""
        assert scoring.tower is not None
        assert scoring.tower.received is not None
        return scoring.tower.received.mean(dim=-1)

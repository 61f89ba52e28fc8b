"""Which visual tokens the scenes of a batch have, where images differ in how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from demo_training.families.base import Layout


@dataclass(frozen=True)
class Seen:
    """The visual tokens of a batch, one row per scene, short rows padded behind.

    Attributes:
        steps: (3, batch, token) position ids as seen from an image's first; 0 at padding.
        there: (batch, token) False at padding.
        length: (batch,) how far each image moves the text behind it on.
    """

    steps: Tensor
    there: Tensor
    length: Tensor

    @classmethod
    def of(cls, layouts: Sequence[Layout], tokens: Sequence[Sequence[int]] | None = None) -> Seen:
        """Of these images; ``tokens`` chooses some of each."""
        chosen = [list(some) for some in tokens] if tokens else [[*range(each.n_tokens)] for each in layouts]
        most = max(map(len, chosen))
        there = torch.tensor([[i < len(some) for i in range(most)] for some in chosen])
        steps = torch.zeros(3, len(chosen), most, dtype=torch.long)
        for b, (layout, some) in enumerate(zip(layouts, chosen, strict=True)):
            steps[:, b, : len(some)] = torch.from_numpy(layout.steps[:, some].copy())
        return cls(steps, there, torch.tensor([layout.length for layout in layouts]))


def padded(visual: Tensor, there: Tensor) -> Tensor:
    """(token, d) of all scenes, one after the other, to (batch, token, d) with zeros where ``there`` is False."""
    found = visual.new_zeros(*there.shape, visual.shape[-1])
    found[there] = visual
    return found

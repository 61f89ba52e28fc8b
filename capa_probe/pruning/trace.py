"""What a pruner did: which tokens it kept where, and how many were left in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from capa_probe.pruning.showing import describe_trace, trace_html


@dataclass
class Trace:
    """Record of the latest prefill under a pruner, and of the steps after it; small tensors on the CPU.

    With beams or several returned sequences, a row of the batch is one of them, as in the model's own forward.

    Attributes:
        kept: pruning layer to bool (batch, position), in input positions: the tokens that the attention of that layer
            and of all later ones sees (with ``score_at="same"``, of the layers after it). False at padding.
        scores: pruning layer to float32 (batch, position), NaN at tokens that were not scored.
        visual: bool (batch, position), the original visual tokens.
        text: bool (batch, position), all other tokens that are not padding.
        lengths: how many positions each layer's hidden states had at prefill; shorter layers save time.
        tokens: (layer, batch) tokens that each layer's attention saw at prefill, padding left out.
        visual_tokens: (layer, batch) the visual ones of them.
        steps: with re-scoring at every step, for each decode step the kept set of every pruning layer.
        prefills: number of prefills since the pruner was attached.
        saves_prefill: whether tokens were gone at prefill already; False with re-scoring at every step.
    """

    kept: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    visual: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    text: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    lengths: tuple[int, ...] = ()
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    visual_tokens: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    steps: list[dict[int, Tensor]] = field(default_factory=list)
    prefills: int = 0
    saves_prefill: bool = True

    def begin(self, visual: Tensor, padding: Tensor) -> None:
        """Start the record of a new prefill."""
        self.visual, self.text = visual.cpu(), (~visual & ~padding).cpu()
        self.kept, self.scores, self.steps = {}, {}, []
        self.prefills += 1

    def end(self, layers: Sequence[tuple[int, Tensor]]) -> None:
        """Note what every layer saw at prefill.

        Args:
            layers: for each, the length of its hidden states, and bool (batch, position): what its attention saw.
        """
        self.lengths = tuple(length for length, _ in layers)
        seen = torch.stack([alive.to(layers[0][1].device) for _, alive in layers]).cpu()
        self.tokens, self.visual_tokens = seen.sum(dim=2), (seen & self.visual).sum(dim=2)

    def __repr__(self) -> str:
        return describe_trace(self)

    def _repr_html_(self) -> str:
        return trace_html(self)

"""What a pruning method may know when it scores visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import AttentionCall
from capa_probe.lvlm.tower_view import TowerView
from capa_probe.measures import attention_contribution, removal_effect


@dataclass(frozen=True)
class Scoring:
    """One layer's view of a batch, in which a method scores the visual tokens.

    Axes: ``key`` runs over what the layer's attention sees, in which dropped tokens may be missing; ``position`` over
    the input.

    Attributes:
        layer: whose attention is scored.
        prune_layer: the pruning layer that the scores are for.
        step: 0 at prefill, t when the t-th generated token is the query.
        query: (batch,) index of the current query token on the query axis: the last prompt token that is not padding at
            prefill, the generated token at a decode step.
        positions: (batch, key) input position of every key.
        image: (batch, key) image index of visual tokens that are still there; -1 at all others.
        ids: (batch, position) input ids of this forward.
        padding: bool (batch, position) of this forward.
        norm_eps: epsilon of the model's RMSNorm.
        attention: the layer's attention call; None for a method that reads no attention.
        residual: (batch, query, d_model) residual stream entering the layer; only where a method asks for it.
        tower: what the vision tower made of the images, with axes (batch, key, patch, ...), zeros at keys that are not
            visual; only where a method asks for it.
    """

    layer: int
    prune_layer: int
    step: int
    query: Tensor
    positions: Tensor
    image: Tensor
    ids: Tensor
    padding: Tensor
    norm_eps: float
    attention: AttentionCall | None = None
    residual: Tensor | None = None
    tower: TowerView | None = None

    @property
    def visual(self) -> Tensor:
        """Bool (batch, key), the visual tokens that are to be scored."""
        return self.image >= 0

    @property
    def call(self) -> AttentionCall:
        """The layer's attention call: q, k, v, rows of the pattern on demand, the output projection."""
        assert self.attention is not None
        return self.attention

    @cached_property
    def row(self) -> Tensor:
        """(batch, head, key) attention probabilities of the current query token, float32."""
        return self.call.row(self.query)

    @cached_property
    def contribution(self) -> Tensor:
        """(batch, key) attention contribution of visual tokens to the current query token, float32."""
        chosen = self._scored_keys
        heads, value = self.row.shape[1], self.call.value
        row = self.row.gather(2, chosen[:, None].expand(-1, heads, -1))
        index = chosen[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[3])
        return self._spread(attention_contribution(row, value.gather(2, index), self.call.project))

    @cached_property
    def removal_effect(self) -> Tensor:
        """(batch, key) what removing a visual token changes in the current query token's attention output, float32."""
        return self._spread(removal_effect(self.row, self.call.value, self.call.project, self._scored_keys))

    @cached_property
    def _scored_keys(self) -> Tensor:
        """(batch, chosen) keys that go through the output projection: the visual ones; shorter rows are filled up.

        At least one, since a decode step may look at a prompt without an image.
        """
        n = max(1, int(self.visual.sum(dim=1).max()))
        last = self.visual.int().argsort(dim=1, stable=True)[:, self.visual.shape[1] - n :]
        return last.to(self.row.device)

    def _spread(self, scores: Tensor) -> Tensor:
        """From scores of the scored keys to (batch, key)."""
        zeros = self.row.new_zeros(self.row.shape[0], self.row.shape[2])
        return zeros.scatter(1, self._scored_keys, scores)

    def check(self, scores: Tensor, method: str) -> Tensor:
        """Scores as float32, if they have the right shape.

        Raises:
            CapaProbeError: they have another shape than (batch, key).
        """
        if scores.shape != self.image.shape:
            raise CapaProbeError(
                f"{method} returned scores of shape {tuple(scores.shape)} at layer {self.layer}; return one per key, "
                f"of shape {tuple(self.image.shape)}."
            )
        return scores.detach().float()

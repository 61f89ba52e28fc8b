"""Attention contribution: what each token really adds to the residual stream of the current query token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from capa_probe.head_products import contribution_of_products, written_products
from capa_probe.lvlm.tap import AttentionCall
from capa_probe.measures import attention_contribution
from capa_probe.probes.base import AttentionProbe, StepContext

#: Decode steps whose contributions are computed together: one token's vectors alone take as long as those of many.
STEPS_TOGETHER = 16
#: Keys that products of further ones have room for, before those known are copied.
_ROOM = 64


class Contribution(AttentionProbe):
    """CAPA's score ``C[i] = || sum_h A[h, i] v[g(h), i] W_O[h] ||``."""

    name = "contribution"
    columns = ("contribution",)

    def measure(self, call: AttentionCall, row: Tensor, context: StepContext) -> dict[str, Tensor]:
        """``contribution`` (batch, key), in units of the residual stream; at decode steps filled by ``finish``."""
        weight, memory = call.projection_weight(), context.memory
        if memory is None or weight is None:
            return {"contribution": attention_contribution(row, call.value, call.project)}
        place = (self.name, call.layer)
        before: _Steps | None = memory.get(place)
        # At prefill, and where a cache drops or moves keys, as one with a sliding window does.
        anew = before is None or not before.grew_by_one(call)
        if before is not None and anew:
            before.fill()
        steps = _Steps(call, weight) if before is None or anew else before
        memory[place] = steps
        contribution = steps.add(call, row)
        # A cache of fixed length writes over its values, which then cannot wait; a column to which dropped keys are
        # added is copied, and must be known by then.
        in_place = call.value.shape[2] == context.spans.padding.shape[1] + context.step
        if anew or not in_place or steps.n_waiting == STEPS_TOGETHER:
            steps.fill()
        return {"contribution": contribution}

    def finish(self, context: StepContext) -> None:
        """Fill the columns of the steps that still wait."""
        for steps in (context.memory or {}).values():
            if isinstance(steps, _Steps):
                steps.fill()


class _Steps:
    """Steps of one layer over a cache that grows by a key each, and the products of its keys, each computed once."""

    def __init__(self, call: AttentionCall, weight: Tensor) -> None:
        self._weight = weight
        self._value = call.value
        self._products: Tensor | None = None  # with room at the end of its key axis
        self._n_known = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []  # a step's attention and the contribution to fill

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def grew_by_one(self, call: AttentionCall) -> bool:
        return call.value.shape[2] == self._value.shape[2] + call.query.shape[2]

    def add(self, call: AttentionCall, row: Tensor) -> Tensor:
        """(batch, key), to be filled."""
        self._value = call.value
        contribution = torch.empty(len(row), row.shape[2], device=row.device)
        self._waiting.append((row, contribution))
        return contribution

    def fill(self) -> None:
        """Compute the contributions of all steps that wait."""
        if not self._waiting:
            return
        products, n = self._products_of_all(), self._value.shape[2]
        attention = torch.stack([F.pad(row, (0, n - row.shape[2])) for row, _ in self._waiting], dim=1)
        found = contribution_of_products(attention, products, self._value, self._weight)
        for step, (_, contribution) in enumerate(self._waiting):
            contribution.copy_(found[:, step, : contribution.shape[1]])
        self._waiting.clear()

    def _products_of_all(self) -> Tensor:
        """(batch, key, head, head), of which those of new keys are computed."""
        known, n = self._n_known, self._value.shape[2]
        new = written_products(self._value[:, :, known:], self._weight)
        if self._products is None or n > self._products.shape[1]:
            grown = new.new_empty(len(new), n + _ROOM, *new.shape[2:])
            if self._products is not None:
                grown[:, :known] = self._products[:, :known]
            self._products = grown
        self._products[:, known:n] = new
        self._n_known = n
        return self._products[:, :n]

"""What the engine knows of the forward that is running."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Forward:
    """State of one forward.

    Attributes:
        seen: input positions that the cache held on entry; 0 at prefill.
        ids: (batch, position) input ids.
        padding: bool (batch, position).
        image: (batch, position) image index of the forward's visual tokens, -1 elsewhere.
        alive: bool (batch, position), what the coming layers' attention sees of this forward.
        index: (batch, slot) position of every row of the hidden states, ascending.
        real: bool (batch, slot), False for slots that hold a dropped token or only fill up the batch.
        stage: prunings so far.
        now: bool (batch, entry), with re-scoring: what the rest of this decode step sees of the cache.
        entries: (batch, entry), with re-scoring: image index of the cache's entries; ``alive`` is over them too.
    """

    seen: int
    ids: Tensor
    padding: Tensor
    image: Tensor
    alive: Tensor
    index: Tensor
    real: Tensor
    stage: int = 0
    hides: bool = False
    shift: Tensor | None = None
    cache: Any = None
    now: Tensor | None = None
    entries: Tensor | None = None
    rope_ids: Tensor | None = None
    scores: dict[int, Tensor] = field(default_factory=dict)
    protected: dict[int, Tensor] = field(default_factory=dict)
    residuals: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
    layers: list[tuple[int, Tensor]] = field(default_factory=list)
    #: Masks and rotary embeddings, which are the same for all layers of a stage.
    made: dict[Any, Any] = field(default_factory=dict)
    #: Stage to bool (batch, slot), visual tokens among the rows of its hidden states.
    visual_rows: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        #: Asked once, since it waits for the device.
        self.has_images = bool((self.image >= 0).any())

    @property
    def prefill(self) -> bool:
        """Whether the cache was empty on entry."""
        return self.seen == 0

    @property
    def images(self) -> Tensor:
        """Image index of what is ranked, -1 elsewhere: (batch, position), or (batch, entry) with re-scoring."""
        return self.image if self.entries is None else self.entries

    @property
    def last(self) -> Tensor:
        """(batch,) position of each sample's last token that is not padding."""
        columns = torch.arange(self.ids.shape[1], device=self.padding.device)
        return torch.where(self.padding, -1, columns).amax(dim=1)

"""The KV cache of a pruned layer: every entry knows its input position and whether it may be seen.

That knowledge lives in the cache itself, so that it follows wherever generation takes the cache: rows are repeated,
reordered (beam search), selected, cropped, or carried over to a second turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from capa_probe.errors import CapaProbeError


class PrunedLayer(DynamicLayer):  # type: ignore[misc]
    """A dynamic cache layer with fewer entries than the input has positions, or with entries that are hidden.

    Attributes:
        seen: input positions so far, dropped ones included; what the model takes for the cache's length.
        hides: whether some entry is not visible.
        shift: (batch,) what is added to the rotary position of new tokens, or None.
        stage: how many prunings came before it; layers of one stage hold the same positions.
    """

    _layer_type = None

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.hides = False
        self.shift: Tensor | None = None
        self.stage = 0
        # Of the prompt's entries; those that follow are all visible and at successive positions.
        self._positions = self._visible = self._image = torch.zeros(0, 0)
        self._awaited = 0

    @property
    def n_later(self) -> int:
        """Number of entries after the prompt's."""
        return int(self.keys.shape[-2]) - self._positions.shape[1]

    @property
    def positions(self) -> Tensor:
        """(batch, entry) input position of every entry."""
        later = torch.arange(self.seen - self.n_later, self.seen, device=self._positions.device)
        return torch.cat([self._positions, later.expand(len(self._positions), -1)], dim=1)

    @property
    def visible(self) -> Tensor:
        """Bool (batch, entry), False for a dropped token and for filling."""
        return torch.nn.functional.pad(self._visible, (0, self.n_later), value=True)

    @property
    def image(self) -> Tensor:
        """(batch, entry) image index of a visual token of the prompt; -1 for any other entry."""
        return torch.nn.functional.pad(self._image, (0, self.n_later), value=-1)

    def expect_prompt(self, positions: Tensor, visible: Tensor, image: Tensor, n_positions: int) -> None:
        """Say what the entries of the coming update are: each (batch, entry), of ``n_positions`` input positions."""
        self._positions, self._visible, self._image = positions, visible, image
        self._awaited = n_positions

    def expect(self, n_positions: int) -> None:
        """Announce an update by so many new tokens, none of them dropped."""
        self._awaited = n_positions

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append entries; see ``DynamicLayer``.

        Raises:
            CapaProbeError: no pruner announced it.
        """
        if self._awaited == 0:
            raise CapaProbeError(
                "A KV cache that a pruner made was given to a model without one; continue it inside a pruner's "
                "with block, or start with a new cache."
            )
        self.seen, self._awaited = self.seen + self._awaited, 0
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return updated

    def get_seq_length(self) -> int:
        """Input positions so far: what positions and masks of new tokens are counted from."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that the model makes, in input positions; the pruner picks its columns."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.__init__()  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as long as they came after the prompt.

        Raises:
            CapaProbeError: they are of the prompt, some of whose tokens have been dropped.
        """
        n = abs(tokens_to_remove)
        if n > self.n_later:
            raise CapaProbeError(
                f"{n} tokens were to be cropped from a KV cache that holds {self.n_later} after a pruned prompt; crop "
                "no more than those, or start with a new cache."
            )
        super().crop(-n)
        self.seen -= n

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows in another order, as beam search does."""
        super().reorder_cache(beam_idx)
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._rows(lambda x: x[indices])

    def _rows(self, take: Callable[[Tensor], Tensor]) -> None:
        self._positions, self._visible, self._image = map(take, (self._positions, self._visible, self._image))
        self.shift = None if self.shift is None else take(self.shift)


def check_cache(cache: Any) -> None:
    """Refuse a cache whose layers cannot differ in length.

    Raises:
        CapaProbeError: it is static, quantized, or has sliding windows.
    """
    kinds = {type(layer) for layer in getattr(cache, "layers", [])}
    if (
        isinstance(cache, Cache)
        and kinds <= {DynamicLayer, PrunedLayer}
        and (kinds or cache.layer_class_to_replicate is DynamicLayer)
    ):
        return
    other = sorted(kind.__name__ for kind in kinds - {DynamicLayer, PrunedLayer})
    name = f"{type(cache).__name__} with {other[0]}s" if other else type(cache).__name__
    raise CapaProbeError(
        f"A {name} was given, whose layers cannot differ in length; a pruner needs a DynamicCache, "
        "so leave cache_implementation at its default."
    )


def pruned_layer(cache: Cache, layer: int) -> PrunedLayer:
    """The pruned cache layer at a place where nothing is cached yet, put there if need be."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    if not isinstance(cache.layers[layer], PrunedLayer):
        cache.layers[layer] = PrunedLayer()
    return cache.layers[layer]


def at(cache: Cache | None, layer: int) -> PrunedLayer | None:
    """The cache layer, if a pruner made it and it holds anything."""
    layers = getattr(cache, "layers", [])
    found = layers[layer] if layer < len(layers) else None
    return found if isinstance(found, PrunedLayer) and found.seen else None

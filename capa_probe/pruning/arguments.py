"""What a decoder layer is given in place of the model's own arguments: mask and rotary embeddings of what is left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from capa_probe.pruning.cache import PrunedLayer
from capa_probe.pruning.forward import Forward
from capa_probe.pruning.masks import entries_mask, take
from capa_probe.pruning.rotary import compacted


def at_prefill(
    forward: Forward, rotary: nn.Module, hidden: Tensor, kwargs: dict[str, Any], closed: bool
) -> dict[str, Any]:
    """Arguments of the layers of one stage, at prefill.

    Args:
        forward: the running forward, from which tokens have been dropped.
        rotary: the decoder's rotary embedding.
        hidden: (batch, slot, d_model) hidden states of what is left.
        kwargs: what the model gives its layers, for all positions.
        closed: whether the gaps in the rotary positions are closed up.
    """
    cos_sin = kwargs["position_embeddings"]
    if closed:
        assert forward.rope_ids is not None
        ids, forward.shift = compacted(forward.rope_ids, forward.alive)
        cos_sin = _rotate(rotary, ids, hidden)
    changed: dict[str, Any] = {"attention_mask": _prefill_mask(forward, kwargs.get("attention_mask"))}
    if forward.index.shape[1] == forward.ids.shape[1]:
        return {**changed, "position_embeddings": cos_sin}
    changed["position_embeddings"] = tuple(take(x, forward.index, x.ndim - 3) for x in cos_sin)
    given = kwargs.get("position_ids")
    if given is not None:
        changed["position_ids"] = take(given[..., None], forward.index, given.ndim - 2)[..., 0]
    return changed


def at_continuation(
    forward: Forward, entry: PrunedLayer, rotary: nn.Module, hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of the layers of one stage, at a decode step or in a later turn.

    Args:
        forward: the running forward.
        entry: the KV cache of a layer of the stage.
        rotary: the decoder's rotary embedding.
        hidden: (batch, position, d_model) hidden states of the new tokens.
        kwargs: what the model gives its layers.
    """
    batch, length = forward.ids.shape
    changed: dict[str, Any] = {}
    mask = kwargs.get("attention_mask")
    if entry.hides or mask is not None or forward.now is not None:
        visible = torch.nn.functional.pad(entry.visible, (0, length), value=True)
        if forward.now is not None:
            visible = visible & forward.now.to(visible.device)
        positions = entry.positions
        new = entry.seen + forward.index.to(positions.device)
        key = torch.cat([positions, new], dim=1)
        changed["attention_mask"] = entries_mask(mask, new, key, visible, entry.seen)
    if entry.shift is not None:
        assert forward.rope_ids is not None
        shift = entry.shift.to(forward.rope_ids.device)[:, None]
        changed["position_embeddings"] = _rotate(
            rotary, forward.rope_ids.expand(-1, batch, -1) + shift, hidden
        )
    return changed


def _prefill_mask(forward: Forward, mask: Tensor | None) -> Tensor | None:
    if mask is None and not forward.hides:
        return None
    alone = ~forward.real
    alone[:, -1] = False  # the last row sees the sample's tokens, even where it is padding
    return entries_mask(mask, forward.index, forward.index, forward.real, 0, hidden_queries=alone)


def _rotate(rotary: Any, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    # Not called as a module, so that hooks on it see the model's own positions only.
    cos_sin: tuple[Tensor, Tensor] = rotary.forward(hidden, ids[0] if len(ids) == 1 else ids)
    return cos_sin

"""What comes into a forward: its tokens, and which of them are visual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM
from capa_probe.pruning.forward import Forward
from capa_probe.pruning.keep import image_index


def prefill(lvlm: HookedLVLM, given: Mapping[str, Any]) -> Forward:
    """A prompt, with an empty KV cache.

    Args:
        lvlm: the model.
        given: what its inner model was called with.

    Raises:
        CapaProbeError: there are no ids, video input, or visual tokens that do not match the images.
    """
    ids, padding, image = locate(lvlm, given)
    return Forward(0, ids, padding, image, ~padding, _all_rows(ids), ~padding)


def continuation(lvlm: HookedLVLM, given: Mapping[str, Any], seen: int) -> Forward:
    """A decode step, or a later turn, on a KV cache that holds ``seen`` positions."""
    ids = given.get("input_ids")
    if ids is None:
        ids = given["inputs_embeds"].new_full(given["inputs_embeds"].shape[:2], -1, dtype=torch.long)
    visual = ids == lvlm.family.image_token_id(lvlm.model)
    encoded = given.get("mm_encoder_outputs") or {}
    if given.get("pixel_values") is None and encoded.get("image") is None:
        visual = torch.zeros_like(visual)  # a model may well generate the placeholder
    alive = torch.ones_like(visual)
    return Forward(seen, ids, ~alive, image_index(visual), alive, _all_rows(ids), alive)


def _all_rows(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)


def locate(lvlm: HookedLVLM, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, padding (bool), and image index (-1 outside images) of a prompt, each (batch, position).

    Args:
        lvlm: the model.
        given: what its inner model was called with.

    Raises:
        CapaProbeError: there are no ids, video input, or visual tokens that do not match the images.
    """
    encoded = given.get("mm_encoder_outputs") or {}
    features = encoded.get("image")
    if encoded.get("video") is not None:
        raise CapaProbeError("Video input was given; only images are supported.")
    if features is None or given.get("input_ids") is None:
        spans = lvlm.spans({name: value for name, value in given.items() if value is not None})
        image = torch.full(spans.visual.shape, -1, device=spans.visual.device)
        for span in spans.images:
            image[span.sample, span.positions.to(image.device)] = span.index
        return given["input_ids"], spans.padding, image
    # generate() has encoded the images already and hands on their features.
    ids, mask = given["input_ids"], given.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise CapaProbeError(
            f"An attention_mask of shape {tuple(mask.shape)} was given with input_ids of shape "
            f"{tuple(ids.shape)}; give one of the same shape, 1 at tokens and 0 at padding."
        )
    padding = torch.zeros_like(ids, dtype=torch.bool) if mask is None else mask == 0
    visual = (ids == lvlm.family.image_token_id(lvlm.model)) & ~padding
    size = len(features.pooler_output[0]) if lvlm.family.images_adjoin else None
    return ids, padding, image_index(visual, size)

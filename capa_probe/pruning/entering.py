"""What comes into a forward: where its visual tokens are, and whether this way of running it can be pruned."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM
from capa_probe.pruning.keep import image_index


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
    # LLaVA alone writes nothing around an image, but its images are all of one size.
    size = len(features.pooler_output[0]) if lvlm.family.name == "llava" else None
    return ids, padding, image_index(visual, size)


def refuse_modes(cache: Any) -> None:
    """Refuse ways of generating in which a prompt cannot be pruned once and for all.

    Args:
        cache: the KV cache that the forward was given, or None.

    Raises:
        CapaProbeError: assisted generation, a prefill in chunks, or generation without a cache.
    """
    callers = _generation_callers()
    settings = callers["_prefill"].f_locals.get("generation_config") if "_prefill" in callers else None
    if getattr(settings, "prefill_chunk_size", None) is not None:
        raise CapaProbeError(
            "Generation with prefill_chunk_size was asked for, which would score each piece of the prompt as if it "
            "were all of it; leave prefill_chunk_size at None."
        )
    if "_assisted_decoding" in callers:
        raise CapaProbeError(
            "Assisted generation was asked for, whose drafts would be scored as the prompt; generate without "
            "assistant_model and prompt_lookup_num_tokens."
        )
    if cache is None and callers:
        raise CapaProbeError(
            "Generation with use_cache=False was asked for, which would score and prune anew for every token; "
            "leave use_cache at True."
        )


def _generation_callers() -> dict[str, FrameType]:
    """The functions of ``generate`` that the present forward runs in, by name; none in a plain forward."""
    found = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.generation.utils":
            found[frame.f_code.co_name] = frame
        frame = frame.f_back
    return found

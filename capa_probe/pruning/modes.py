"""Ways of generating in which a prompt cannot be pruned once and for all."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from capa_probe.errors import CapaProbeError


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
            "Generation without a KV cache was asked for (use_cache=False, or guidance_scale), which would score and "
            "prune anew for every token; leave both at their defaults."
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

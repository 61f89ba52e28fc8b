"""Tiny models that generate as long as they are asked to, and only words."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from tests import tiny

#: A generated placeholder of an image would be taken for one when the oracle runs over the whole text again.
NO_WORDS = list(range(tiny.IMAGE, tiny.TEXT["vocab_size"]))


def build(family: str, attn: str = "sdpa", **text: Any) -> PreTrainedModel:
    """A random model of ``tests.tiny``; ``text`` overrides the decoder's sizes."""
    model = tiny.build(family, attn=attn, **text)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = NO_WORDS
    return model

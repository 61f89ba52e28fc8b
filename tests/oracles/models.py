"""Tiny models that generate as long as they are asked to, and only words."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from tests import tiny

#: A generated placeholder of an image would be taken for one when the oracle runs over the whole text again; padding
#: has a residual stream of zeros, whose direction is nowhere.
NO_WORDS = [tiny.PAD, *range(tiny.IMAGE, tiny.TEXT["vocab_size"])]


def build(family: str, attn: str = "sdpa", **text: Any) -> PreTrainedModel:
    """A random model of ``tests.tiny``, its norms' weights too; ``text`` overrides the decoder's sizes."""
    model = tiny.build(family, attn=attn, **text)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # all ones, they would hide where they are left out
        for name, parameter in model.model.language_model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = NO_WORDS
    return model

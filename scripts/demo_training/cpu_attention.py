"""Attention in float32 inside bfloat16 autocast: SDPA's backward in bfloat16 takes a CPU three times as long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_in_float32"


@contextmanager
def attention_in_float32(decoder: nn.Module) -> Iterator[None]:
    """Within, a decoder on a CPU attends in float32; its ordinary attention is back afterwards."""
    before = decoder.config._attn_implementation
    if next(decoder.parameters()).device.type == "cpu":
        decoder.set_attn_implementation(NAME)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: (batch, head, position, d_head) to (batch, position, head, d_head)."""
    if attention_mask is None:
        raise ValueError("packed turns come with a mask")
    groups = query.shape[1] // key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        key, value = (x.float().repeat_interleave(groups, dim=1) for x in (key, value))
        found = F.scaled_dot_product_attention(
            query.float(), key, value, attn_mask=attention_mask, scale=scaling
        )
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

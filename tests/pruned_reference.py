"""Pruning worked out by hand: scores in plain Python, and a full forward whose attention patterns are edited.

Nothing here uses ``capa_probe.pruning``: dropped tokens are taken out of ``hook_pattern`` and the rest is renormalised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import capa_probe as cp
from tests import naive, tiny

#: Tokens that generation must not yield, since a full forward would take them for an image.
SUPPRESSED = [tiny.IMAGE, tiny.START, tiny.END, 63]


def last(lvlm: cp.HookedLVLM, inputs: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """Logits at each sample's last token: (batch, vocabulary)."""
    return logits[torch.arange(len(logits)), lvlm.spans(inputs).last]


def contribution(lvlm: cp.HookedLVLM, inputs: Mapping[str, Tensor], layer: int) -> list[list[float]]:
    """Contribution of every position to the last token, in a forward from which nothing is dropped."""
    names = [f"blocks.{layer}.attn.hook_pattern", f"blocks.{layer}.attn.hook_v"]
    _, cache = lvlm.run_with_cache(**inputs, names_filter=names, use_cache=False)
    spans = lvlm.spans(inputs)
    row = cache[names[0]][torch.arange(len(spans.last)), :, spans.last]
    weight = lvlm.model.model.language_model.layers[layer].self_attn.o_proj.weight
    value = cache[names[1]].transpose(1, 2)
    return naive.attention_contribution(row.tolist(), value.tolist(), weight.tolist())


def best(scores: list[list[float]], spans: Any, count: Callable[[int], int]) -> Tensor:
    """The kept set, with ``count`` of the visual tokens of each sample: bool (batch, position)."""
    kept = spans.text.clone()
    for row, own in enumerate(scores):
        visual = spans.visual[row].nonzero().flatten().tolist()
        chosen = sorted(visual, key=lambda position: (-own[position], position))[: count(len(visual))]
        kept[row, chosen] = True
    return kept


def edited_logits(lvlm: cp.HookedLVLM, inputs: Mapping[str, Tensor], kept: Mapping[int, Tensor]) -> Tensor:
    """Logits of a full forward in which, from each pruning layer on, no attention falls on what is not kept."""

    def edit(dropped: Tensor) -> Callable[[Tensor, Any], Tensor]:
        def hook(pattern: Tensor, hook: Any) -> Tensor:
            left = pattern.masked_fill(dropped[:, None, None, :], 0)
            return left / left.sum(dim=-1, keepdim=True).clamp(min=1e-30)

        return hook

    hooks, dropped = [], None
    for layer in range(lvlm.n_layers):
        if layer in kept:
            longer = inputs["input_ids"].shape[1] - kept[layer].shape[1]
            padding = inputs["attention_mask"] == 0
            dropped = ~torch.nn.functional.pad(kept[layer], (0, longer), value=True) & ~padding
        if dropped is not None:
            hooks.append((f"blocks.{layer}.attn.hook_pattern", edit(dropped)))
    return lvlm.run_with_hooks(**inputs, fwd_hooks=hooks, use_cache=False).logits


def edited_generation(
    lvlm: cp.HookedLVLM, inputs: Mapping[str, Tensor], kept: Mapping[int, Tensor], n: int
) -> Tensor:
    """Greedy tokens (batch, n), each from a full forward of its own without a KV cache."""
    grown, length = dict(inputs), inputs["input_ids"].shape[1]
    for _ in range(n):
        logits = edited_logits(lvlm, grown, kept)[:, -1]
        logits[:, SUPPRESSED] = -torch.inf
        chosen = logits.argmax(dim=-1)
        grown = longer(grown, chosen[:, None])
    return grown["input_ids"][:, length:]


def longer(inputs: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Inputs with text tokens added at the end of every row."""
    grown = dict(inputs)
    grown["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            grown[name] = torch.nn.functional.pad(inputs[name], (0, ids.shape[1]), value=value)
    return grown


def row_alone(family: str, inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample of a padded batch, by itself and without padding."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    counts = (ids == tiny.IMAGE).sum(dim=1).tolist()
    alone = {name: inputs[name][row, mask[row]][None] for name in ("input_ids", "attention_mask")}
    first, n = sum(counts[:row]), counts[row]
    if n == 0:
        return alone
    if family == "qwen2_5_vl":
        alone["mm_token_type_ids"] = (alone["input_ids"] == tiny.IMAGE).int()
        alone["pixel_values"] = inputs["pixel_values"][4 * first : 4 * (first + n)]
        ends = (inputs["image_grid_thw"].prod(dim=1) // 4).cumsum(dim=0)
        alone["image_grid_thw"] = inputs["image_grid_thw"][(ends > first) & (ends <= first + n)]
    else:
        per = {"llava": 16, "internvl": 4}[family]
        alone["pixel_values"] = inputs["pixel_values"][first // per : (first + n) // per]
    return alone


def kv_lengths(cache: Any) -> list[int]:
    """Length of the KV cache in each layer, as it lies in memory."""
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths == [layer.values.shape[2] for layer in cache.layers]
    return lengths


def decoder(model: PreTrainedModel) -> Any:
    """The decoder stack."""
    return model.model.language_model

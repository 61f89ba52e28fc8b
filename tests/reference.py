"""What an eager forward and plain module hooks see, for tests that work out a number from it in loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def activations(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Any, list[dict[str, Tensor]]]:
    """One forward of an eager model: its output, and per layer what plain module hooks see."""
    layers = model.model.language_model.layers
    seen: list[dict[str, Tensor]] = [{} for _ in layers]
    handles = []
    for store, layer in zip(seen, layers, strict=True):

        def keep(name: str, store: dict[str, Tensor] = store) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                store[name] = (output[0] if isinstance(output, tuple) else output).clone()

            return hook

        handles += [
            layer.self_attn.register_forward_hook(keep("attn_out")),
            layer.self_attn.v_proj.register_forward_hook(keep("v")),
            layer.mlp.register_forward_hook(keep("mlp_out")),
        ]
    with torch.no_grad():
        out = model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return out, seen

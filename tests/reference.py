"""The columns of prefill from an eager forward and plain module hooks, whatever the decoder is made of.

``tests/oracles/loops.py`` works the same activations out from hidden states and weights, for the families of
``tests/tiny.py``, and follows decode steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny
from tests.oracles.columns import Layer, Row, measured


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


def prefill(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Row]:
    """Rows of the token table at prefill, in its order: sample, layer, position and every measured column.

    Args:
        model: on the eager backend.
        inputs: a batch, padded on either side.
    """
    out, seen = activations(model, inputs)
    config = model.config.get_text_config()
    rows: list[Row] = []
    for sample, mask in enumerate(inputs["attention_mask"].bool()):
        visual = (inputs["input_ids"][sample, mask] == tiny.IMAGE).nonzero().flatten().tolist()
        text = range(visual[-1] + 1, int(mask.sum())) if visual else ()
        for index, module in enumerate(model.model.language_model.layers):
            w_o = module.self_attn.o_proj.weight.detach()
            d_head = w_o.shape[1] // config.num_attention_heads
            own = {name: x[sample, mask].double() for name, x in seen[index].items()}
            layer = Layer(
                attention=out.attentions[index][sample][:, mask][..., mask].double().tolist(),
                values=own["v"].unflatten(-1, (-1, d_head)).transpose(0, 1).tolist(),
                pre=out.hidden_states[index][sample, mask].double().tolist(),
                attn_out=own["attn_out"].tolist(),
                mlp_out=own["mlp_out"].tolist(),
                w_o=w_o.double().tolist(),
            )
            found = measured(layer, config.rms_norm_eps, text)
            where = {"sample": str(sample), "layer": index}
            rows += [where | {"position": i} | row for i, row in enumerate(found)]
    return rows

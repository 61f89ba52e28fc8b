"""Both tables of a profile, recomputed from what ``transformers`` itself returns, one number at a time.

Each prompt runs alone and without padding on the eager backend, and each decode step as a forward over the prompt and
the tokens generated so far, without a KV cache. From ``hidden_states``, ``attentions`` and the weights, everything else
is worked out in loops over Python floats: values, what attention and FFN add, and every column (``columns.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import mul
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny
from tests.oracles import models
from tests.oracles.columns import Layer, Row, Vector, measured
from tests.oracles.prompts import TEXT, Prompt, batch


def table(
    model: PreTrainedModel,
    family: str,
    prompts: Sequence[Prompt],
    steps: int = 0,
    sink_dims: Sequence[int] | None = None,
) -> list[Row]:
    """Rows of the token table, ordered by sample, step, layer and position.

    Args:
        model: on the eager backend.
        family: its family.
        prompts: each is a sample.
        steps: decode steps.
        sink_dims: the dimensions that sink strength is restricted to.
    """
    rows: list[Row] = []
    for sample, prompt in enumerate(prompts):
        inputs, ids = dict(batch(family, [prompt])), list(prompt.ids)
        for step in range(steps + 1):
            out = _forward(model, inputs, ids)
            places = [*prompt.places, *[TEXT] * step]
            text = _after_images(prompt) if step == 0 else []
            first = 0 if step == 0 else len(ids) - 1
            for index, layer in enumerate(_layers(model, out, first)):
                columns = measured(layer, model.config.get_text_config().rms_norm_eps, text, sink_dims)
                for position, (place, values) in enumerate(zip(places, columns, strict=True)):
                    where = dict(zip(("kind", "image", "tile", "row", "col"), place, strict=True))
                    who = {"sample": str(sample), "step": step, "layer": index, "position": position}
                    rows.append(who | where | values)
            logits = out.logits[0, -1].tolist()
            words = [word for word in range(len(logits)) if word not in models.NO_WORDS]
            ids.append(max(words, key=logits.__getitem__))
            if ids[-1] == model.generation_config.eos_token_id:
                break
    return rows


def summary(rows: Sequence[Row], measures: Sequence[str]) -> list[Row]:
    """Rows of the layers table, from rows of the token table."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("sample", "step", "layer", "kind")), []).append(row)
    found = []
    for key, own in groups.items():
        line: Row = dict(zip(("sample", "step", "layer", "kind"), key, strict=True)) | {"n_tokens": len(own)}
        for measure in measures:
            values = sorted(row[measure] for row in own if not math.isnan(row[measure]))
            line[f"{measure}_mean"] = math.fsum(values) / len(values) if values else math.nan
            for name, share in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
                line[f"{measure}_{name}"] = _quantile(values, share)
        found.append(line)
    return found


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the two values around ``share * (n - 1)``."""
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] * (1 - (place - below)) + ordered[above] * (place - below)


def _forward(model: PreTrainedModel, inputs: dict[str, Any], ids: Sequence[int]) -> Any:
    """An eager forward over one prompt and what was generated after it."""
    assert model.config.get_text_config()._attn_implementation == "eager"
    tensors = dict(inputs) | {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }
    if "mm_token_type_ids" in tensors:
        tensors["mm_token_type_ids"] = (tensors["input_ids"] == tiny.IMAGE).int()
    with torch.no_grad():
        return model(**tensors, output_attentions=True, output_hidden_states=True, use_cache=False)


def _layers(model: PreTrainedModel, out: Any, first: int) -> Iterator[Layer]:
    """Every decoder layer of a forward over one sample, worked out from its inputs, attention and weights.

    The residual stream that comes out must be the one that the model handed to the next layer.

    Args:
        model: which ran.
        out: its output.
        first: queries before this position are left out.
    """
    decoder, config = model.model.language_model, model.config.get_text_config()
    n_kv, n_heads, eps = config.num_key_value_heads, config.num_attention_heads, config.rms_norm_eps
    for index, module in enumerate(decoder.layers):
        weights = {name: _floats(weight) for name, weight in module.named_parameters()}
        entering = _floats(out.hidden_states[index][0])
        attention = _floats(out.attentions[index][0, :, first:])
        normed = [_rms_norm(x, weights["input_layernorm.weight"], eps) for x in entering]
        flat = [_linear(x, weights, "self_attn.v_proj") for x in normed]
        d_head = len(flat[0]) // n_kv
        values = [[v[g * d_head : (g + 1) * d_head] for v in flat] for g in range(n_kv)]
        coordinates = [list(zip(*keys, strict=True)) for keys in values]  # [kv_head][d_head][key]
        layer = Layer(attention, values, entering[first:], [], [], weights["self_attn.o_proj.weight"])
        for q, x in enumerate(layer.pre):
            z: Vector = []
            for h in range(n_heads):
                z += [_dot(attention[h][q], own) for own in coordinates[h * n_kv // n_heads]]
            layer.attn_out.append(_linear(z, weights, "self_attn.o_proj"))
            mid = _add(x, layer.attn_out[-1])
            inner = _rms_norm(mid, weights["post_attention_layernorm.weight"], eps)
            gate, up = _linear(inner, weights, "mlp.gate_proj"), _linear(inner, weights, "mlp.up_proj")
            hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
            layer.mlp_out.append(_linear(hidden, weights, "mlp.down_proj"))
            post = _add(mid, layer.mlp_out[-1])
            if index == len(decoder.layers) - 1:  # transformers returns this one after the final norm
                post = _rms_norm(post, _floats(decoder.norm.weight), eps)
            _same(post, _floats(out.hidden_states[index + 1][0, first + q]))
        yield layer


def _after_images(prompt: Prompt) -> list[int]:
    """Positions of the text after the last image; none without an image."""
    visual = [i for i, place in enumerate(prompt.places) if place[0] == "visual"]
    return list(range(visual[-1] + 1, len(prompt.ids))) if visual else []


def _floats(x: Tensor) -> Any:
    return x.detach().double().tolist()


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(map(mul, a, b))  # enough in float64, and several times faster than naive.dot


def _add(a: Vector, b: Vector) -> Vector:
    return [x + y for x, y in zip(a, b, strict=True)]


def _linear(x: Vector, weights: dict[str, Any], name: str) -> Vector:
    bias = weights.get(f"{name}.bias") or [0.0] * len(weights[f"{name}.weight"])
    return [_dot(row, x) + b for row, b in zip(weights[f"{name}.weight"], bias, strict=True)]


def _rms_norm(x: Vector, weight: Vector, eps: float) -> Vector:
    scale = math.sqrt(_dot(x, x) / len(x) + eps)
    return [w * value / scale for w, value in zip(weight, x, strict=True)]


def _same(mine: Vector, theirs: Vector) -> None:
    size = max(map(abs, theirs))
    assert all(abs(a - b) <= 1e-5 * size for a, b in zip(mine, theirs, strict=True)), (
        "the loops are not the model"
    )

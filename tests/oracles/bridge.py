"""TransformerLens's own ``TransformerBridge`` as an oracle: written by others, on eager attention, sharing no code.

It knows LLaVA and Qwen2.5-VL, not InternVL, and takes one prompt at a time.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

import capa_probe as cp
from tests import processors, tiny
from tests.oracles import models
from tests.oracles.columns import Layer, Row, measured

FAMILIES = ("llava", "qwen2_5_vl")
#: Hook point of a layer here to the one of the bridge. ``docs/oracles.md`` shows this table.
LAYER_NAMES = {
    name: name
    for name in (
        "hook_resid_pre",
        "attn.hook_rot_q",
        "attn.hook_rot_k",
        "attn.hook_v",
        "attn.hook_pattern",
        "attn.hook_z",
        "hook_attn_out",
        "hook_resid_mid",
        "mlp.hook_in",
        "hook_mlp_out",
        "hook_resid_post",
    )
}
#: The bridge's own hook_embed is the embedding of placeholders, before image features take their places.
NAMES = {"hook_embed": "blocks.0.hook_resid_pre"}
#: The bridge has no hook points after M-RoPE.
MISSING = {"qwen2_5_vl": ("attn.hook_rot_q", "attn.hook_rot_k"), "llava": ()}


class Case(NamedTuple):
    """A model with two images in its prompt, and what the bridge around a copy of it says.

    Attributes:
        family: of the model.
        lvlm: the model, on SDPA.
        inputs: one prompt with two images.
        bridge: around a copy of the model.
        logits: (batch, position, token) of the bridge.
        theirs: its cache.
    """

    family: str
    lvlm: cp.HookedLVLM
    inputs: dict[str, Tensor]
    bridge: Any
    logits: Tensor
    theirs: ActivationCache

    def names(self) -> dict[str, str]:
        """Every hook point that both have, ours to theirs."""
        missing = MISSING[self.family]
        return NAMES | {
            f"blocks.{layer}.{ours}": f"blocks.{layer}.{theirs}"
            for layer in range(self.lvlm.n_layers)
            for ours, theirs in LAYER_NAMES.items()
            if ours not in missing
        }


def make(family: str, folder: Path) -> Case:
    """A case whose checkpoint is written to ``folder``."""
    processors.save(family, folder)
    model = models.build(family)
    model.config.architectures = [type(model).__name__]
    bridge: Any = TransformerBridge.boot_transformers(
        str(folder),
        hf_model=copy.deepcopy(model),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
    )
    lvlm = cp.HookedLVLM(model, processors.shared(family))
    images = [processors.image(24, 40, 1), processors.image(16, 16, 2)]
    inputs = dict(lvlm.prepare(images, "what is it, and where?"))
    return Case(family, lvlm, inputs, bridge, *run(bridge, inputs))


def run(bridge: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ActivationCache]:
    """Logits and cache of the bridge."""
    others = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        return bridge.run_with_cache(inputs["input_ids"], **others)


def longer(inputs: dict[str, Tensor], new: Tensor) -> dict[str, Tensor]:
    """The same prompt with generated tokens (batch, token) after it."""
    ids = torch.cat([inputs["input_ids"], new], dim=1)
    tensors = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        tensors["mm_token_type_ids"] = (ids == tiny.IMAGE).int()
    return tensors


def layer(case: Case, cache: ActivationCache, index: int, first: int = 0) -> Layer:
    """One layer of a cache as lists, for the loops to compute its columns; queries from position ``first`` on."""
    seen = {name: cache[f"blocks.{index}.{name}"][0].double() for name in LAYER_NAMES if "rot" not in name}
    module = case.lvlm.family.layers(case.lvlm.model)[index]
    return Layer(
        attention=seen["attn.hook_pattern"][:, first:].tolist(),
        values=seen["attn.hook_v"].transpose(0, 1).tolist(),
        pre=seen["hook_resid_pre"][first:].tolist(),
        attn_out=seen["hook_attn_out"][first:].tolist(),
        mlp_out=seen["hook_mlp_out"][first:].tolist(),
        w_o=module.self_attn.o_proj.weight.detach().double().tolist(),
    )


def columns(case: Case, steps: int) -> list[Row]:
    """The measured columns of prefill and decode steps, worked out from the bridge's caches."""
    rows: list[Row] = []
    inputs, eps = case.inputs, case.lvlm.norm_eps
    image_ends = int((inputs["input_ids"][0] == tiny.IMAGE).nonzero().max()) + 1
    for step in range(steps + 1):
        logits, cache = (case.logits, case.theirs) if step == 0 else run(case.bridge, inputs)
        n = inputs["input_ids"].shape[1]
        text = range(image_ends, n) if step == 0 else ()
        for index in range(case.lvlm.n_layers):
            found = measured(layer(case, cache, index, 0 if step == 0 else n - 1), eps, text)
            rows += [{"step": step, "layer": index, "position": i} | row for i, row in enumerate(found)]
        words = logits[:, -1:].clone()
        words[..., models.NO_WORDS] = -torch.inf
        inputs = longer(inputs, words.argmax(dim=-1))
    return rows

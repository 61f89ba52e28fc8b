"""The ways to run a prompt that are compared: plain, profiled, and measured with other tools."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _overhead_models import bridge, twin
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import capa_probe as cp

#: Name of a variant to what it is called in tables, in their order.
TITLES = {
    "plain": "plain forward, SDPA",
    "profile": "`cp.profile`, default probes, tables on disk",
    "profile_all": "`cp.profile`, with `removal_effect`",
    "eager": "HF eager, `output_attentions`, `output_hidden_states`",
    "transformerlens": "TransformerLens `run_with_cache`, everything",
    "transformerlens_filtered": "TransformerLens `run_with_cache`, what a profile needs",
    "nnsight": "nnsight, saving what a profile needs",
}
#: What the columns of a profile are computed from, by TransformerLens's names.
_NEEDED = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "attn.hook_v",
    "attn.hook_pattern",
)
_PLAIN = {"use_cache": False, "logits_to_keep": 1}

#: Runs some prompts, one after the other.
Variant = Callable[[list[dict[str, Tensor]]], object]


def available(names: list[str]) -> list[str]:
    """Those of the variants whose packages are installed, in the order of ``TITLES``; "all" stands for all."""
    chosen = [name for name in TITLES if name in names or "all" in names]
    return [name for name in chosen if name != "nnsight" or find_spec("nnsight") is not None]


def variants(model: LlavaForConditionalGeneration, names: list[str]) -> dict[str, Variant]:
    """The variants of these names on one model; all share its weights."""
    makers: dict[str, Callable[[], Variant]] = {
        "plain": lambda: _each(lambda inputs: model(**inputs, **_PLAIN)),
        "profile": lambda: profiled(cp.HookedLVLM(model), "default"),
        "profile_all": lambda: profiled(cp.HookedLVLM(model), "all"),
        "eager": lambda: _eager(model),
        "transformerlens": lambda: _transformerlens(model, None),
        "transformerlens_filtered": lambda: _transformerlens(model, _needed),
        "nnsight": lambda: _nnsight(model),
    }
    return {name: makers[name]() for name in names}


def _each(run: Callable[[dict[str, Tensor]], Any]) -> Variant:
    def over(prompts: list[dict[str, Tensor]]) -> None:
        with torch.no_grad():
            for inputs in prompts:
                run(inputs)

    return over


def profiled(lvlm: cp.HookedLVLM, probes: str, steps: int = 0) -> Variant:
    """A profile of all prompts in one call, its tables written to a folder that is removed."""

    def over(prompts: list[dict[str, Tensor]]) -> None:
        folder = Path(tempfile.mkdtemp())
        try:
            cp.profile(lvlm, prompts, out=folder / "run", steps=steps, probes=probes, progress=False)
        finally:
            shutil.rmtree(folder)

    return over


def _eager(model: LlavaForConditionalGeneration) -> Variant:
    other = twin(model, "eager")
    return _each(lambda x: other(**x, **_PLAIN, output_attentions=True, output_hidden_states=True))


def _needed(name: str) -> bool:
    return name.startswith("blocks.") and name.split(".", 2)[2] in _NEEDED


def _transformerlens(model: LlavaForConditionalGeneration, names: Callable[[str], bool] | None) -> Variant:
    bridged = bridge(model)

    def run(inputs: dict[str, Tensor]) -> object:
        others = {name: x for name, x in inputs.items() if name != "input_ids"}
        return bridged.run_with_cache(inputs["input_ids"], **others, **_PLAIN, names_filter=names)

    return _each(run)


def _nnsight(model: LlavaForConditionalGeneration) -> Variant:
    import nnsight

    traced = nnsight.NNsight(twin(model, "eager"))

    def run(inputs: dict[str, Tensor]) -> Any:
        with traced.trace(**inputs, **_PLAIN):
            saved = nnsight.save([])
            for layer in traced.model.language_model.layers:
                saved.append(layer.input)
                saved.append(layer.self_attn.v_proj.output)
                saved.append(layer.self_attn.output[0])
                saved.append(layer.self_attn.output[1])
                saved.append(layer.post_attention_layernorm.input)
                saved.append(layer.mlp.output)
        return saved

    return _each(run)

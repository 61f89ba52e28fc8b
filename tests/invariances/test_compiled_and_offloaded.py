"""Models that something else has been at: torch.compile is refused by name, accelerate's device maps are measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import CompileConfig, PreTrainedModel

import capa_probe as cp
from capa_probe.pruning.ffn import SkipFFN
from capa_probe.pruning.random_tokens import Random
from tests import processors, tiny
from tests.invariances.comparing import profiled

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)


# -- torch.compile


def whole(model: PreTrainedModel) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: PreTrainedModel) -> Any:
    model.compile(backend="eager")
    return model


def its_forward(model: PreTrainedModel) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def its_text_tower(model: PreTrainedModel) -> Any:
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    return model


def one_layer(model: PreTrainedModel) -> Any:
    model.model.language_model.layers[2].compile(backend="eager")
    return model


WAYS = {
    whole: "A model that is",
    in_place: "A model that is",
    its_forward: "A model that is",
    its_text_tower: "A model whose model.language_model is",
    one_layer: "A model whose model.language_model.layers.2 is",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_is_refused_by_name(way: Callable[[PreTrainedModel], Any]) -> None:
    match = f"{WAYS[way]} compiled with torch.compile was given.*compile afterwards"
    with pytest.raises(cp.CapaProbeError, match=match):
        cp.HookedLVLM(way(tiny.build("llava")))


@pytest.mark.parametrize("way", [in_place, one_layer])
def test_a_model_compiled_after_it_was_wrapped_is_refused_when_listening_begins(
    way: Callable[[PreTrainedModel], Any],
) -> None:
    lvlm, inputs = cp.HookedLVLM(tiny.build("llava")), tiny.inputs("llava")
    way(lvlm.model)
    with pytest.raises(cp.CapaProbeError, match="compiled"):
        profiled(lvlm, [inputs])
    with pytest.raises(cp.CapaProbeError, match="compiled"):
        lvlm.run_with_cache(**inputs)
    with pytest.raises(cp.CapaProbeError, match="compiled"):
        lvlm.add_hook("blocks.0.hook_mlp_out", lambda x, hook: None)
    with pytest.raises(cp.CapaProbeError, match="compiled"), lvlm.attention_calls(lambda call: None):
        pass
    for attached in (Random(layers=(1,), keep=0.5), SkipFFN(layers=(2,))):
        with pytest.raises(cp.CapaProbeError, match="compiled"), attached.attach(lvlm):
            pass


def test_generation_that_would_compile_the_model_does_not_do_so_under_a_profile() -> None:
    """With a static cache transformers compiles decode steps by itself, and keeps what it compiled."""
    model, inputs = tiny.build("llava"), tiny.inputs("llava")
    model.generation_config.eos_token_id = None
    wanted = profiled(cp.HookedLVLM(model), [inputs], steps=2)
    settings = CompileConfig(backend="eager")
    settings._compile_all_devices = True  # as it does on a GPU
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = settings
    found = profiled(cp.HookedLVLM(model), [inputs], steps=2)
    assert not hasattr(model, "_compiled_call")
    for name in ("attention", "contribution", "value_norm", "ffn_update_norm"):
        one, other = (torch.tensor(table[name].to_numpy()) for table in (found, wanted))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


# -- accelerate


def split(family: str) -> dict[str, str]:
    """Vision tower and every other decoder layer in memory, the rest on disk."""
    vision = "model.visual" if family == "qwen2_5_vl" else "model.vision_tower"
    text = "model.language_model"
    places = {
        vision: "cpu",
        f"{text}.embed_tokens": "cpu",
        f"{text}.norm": "cpu",
        f"{text}.rotary_emb": "cpu",
    }
    if family != "qwen2_5_vl":
        places["model.multi_modal_projector"] = "disk"
    layers = {f"{text}.layers.{layer}": ("disk" if layer % 2 else "cpu") for layer in range(4)}
    return {**places, **layers, "lm_head": "disk"}


def dispatched(model: PreTrainedModel, family: str, folder: Path) -> PreTrainedModel:
    return dispatch_model(model, split(family), main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADS: dict[str, Callable[[PreTrainedModel, str, Path], Any]] = {
    "a device map of memory and disk": dispatched,
    "all in main memory, brought in when needed": lambda model, family, folder: cpu_offload(
        model, torch.device("cpu")
    ),
    "all on disk": lambda model, family, folder: disk_offload(model, folder, torch.device("cpu")),
}


@FAMILIES
@pytest.mark.parametrize("way", OFFLOADS)
def test_an_offloaded_model_gives_the_same_tables(family: str, way: str, tmp_path: Path) -> None:
    inputs, models = tiny.inputs(family), [tiny.build(family, attn="sdpa") for _ in range(2)]
    for model in models:
        model.generation_config.eos_token_id = None
        for layer in model.model.language_model.layers:  # a bias that is offloaded, too
            old, torch_seed = layer.self_attn.o_proj, torch.Generator().manual_seed(1)
            new = torch.nn.Linear(old.in_features, old.out_features)
            new.weight.data, new.bias.data = (
                old.weight.data,
                torch.randn(old.out_features, generator=torch_seed),
            )
            layer.self_attn.o_proj = new
    wanted = profiled(cp.HookedLVLM(models[0]), [inputs], steps=2)
    model = OFFLOADS[way](models[1], family, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    seen: list[torch.Tensor] = []
    greedy = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        plain, ids = model(**inputs).logits, model.generate(**inputs, **greedy)
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    lvlm = cp.HookedLVLM(model)
    assert lvlm.device == torch.device("cpu")
    found, last = profiled(lvlm, [inputs], steps=2), torch.zeros(3, dtype=torch.long)
    # The bias is taken off again rather than left out, which rounds.
    for name in wanted.columns:
        if name in ("contribution", "removal_effect"):
            one, other = (torch.tensor(table[name].to_numpy()) for table in (found, wanted))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
        else:
            assert found[name].equals(wanted[name]), name
    assert [getattr(module, "_hf_hook", None) for module in model.modules()] == hooks
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)
        with lvlm.attention_calls(lambda call: seen.append(call.row(last))):
            assert torch.equal(model(**inputs).logits, plain)
            assert torch.equal(model.generate(**inputs, **greedy), ids)
    assert len(seen) == 4 * (1 + 3)


def test_a_checkpoint_loaded_over_several_devices(tmp_path: Path) -> None:
    folder = processors.save("internvl", tmp_path / "model")
    question = cp.Sample("one", processors.image(20, 40), "what is it?")
    wanted = profiled(cp.HookedLVLM.from_pretrained(folder), [question], steps=1)
    spread = cp.HookedLVLM.from_pretrained(
        folder, device_map=split("internvl") | {"lm_head": "cpu"}, offload_folder=tmp_path / "weights"
    )
    assert set(spread.model.hf_device_map.values()) == {"cpu", "disk"}
    assert profiled(spread, [question], steps=1).equals(wanted)

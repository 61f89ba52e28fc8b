"""``HookedLVLM.from_pretrained``: checkpoint folders of all three families, and what is wrong with others."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, PixtralVisionConfig, Qwen2VLConfig

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from tests import processors, tiny

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
NATIVE = ("llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct", "OpenGVLab/InternVL3-8B-hf")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per family, as a hub checkpoint has it."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: processors.save(family, root / family) for family in tiny.FAMILY_NAMES}


def refused(path: str | Path, match: str, **kwargs: Any) -> str:
    """The one sentence that loading ends with."""
    with pytest.raises(CapaProbeError, match=match) as error:
        cp.HookedLVLM.from_pretrained(path, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    assert 20 < len(text) < 600
    return text


def config_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@FAMILIES
def test_a_round_trip_gives_the_same_model_and_processor(family: str, checkpoints: dict[str, Path]) -> None:
    lvlm = cp.HookedLVLM.from_pretrained(checkpoints[family])
    assert lvlm.family.name == family
    assert lvlm.attention_backend == "sdpa"
    assert not lvlm.model.training
    original = cp.HookedLVLM(tiny.shared(family), processors.shared(family))
    assert type(lvlm.model) is type(original.model)
    assert type(lvlm.processor) is type(original.processor)
    images = [processors.image(20, 40), [processors.image(16, 16, 1), processors.image(30, 20, 2)], None]
    inputs, wanted = (x.prepare(images, ["what is it?", "and these?", "hello"]) for x in (lvlm, original))
    assert set(inputs) == set(wanted)
    assert inputs.tilings == wanted.tilings
    for name in wanted:
        torch.testing.assert_close(inputs[name], wanted[name], rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(lvlm(**inputs).logits, original(**wanted).logits)


@FAMILIES
def test_a_loaded_checkpoint_can_be_profiled(family: str, checkpoints: dict[str, Path]) -> None:
    lvlm = cp.HookedLVLM.from_pretrained(str(checkpoints[family]))
    sample = cp.Sample("a", processors.image(20, 40), "what is it?")
    loaded = cp.profile(lvlm, [sample], progress=False)
    original = cp.profile(
        cp.HookedLVLM(tiny.shared(family), processors.shared(family)), [sample], progress=False
    )
    assert loaded.tokens.equals(original.tokens)
    assert loaded.manifest["model"] == str(checkpoints[family])


def test_dtype_and_further_arguments_reach_transformers(checkpoints: dict[str, Path]) -> None:
    load, path = cp.HookedLVLM.from_pretrained, checkpoints["llava"]
    assert load(path).model.dtype == torch.float32  # "auto" is the checkpoint's own
    assert load(path, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load(path, dtype=torch.float16).model.dtype == torch.float16
    assert load(path, attn_implementation="eager").attention_backend == "eager"
    assert load(path, device_map="cpu").device == torch.device("cpu")


def test_auto_dtype_is_the_checkpoint_s(tmp_path: Path) -> None:
    tiny.build("llava").to(torch.bfloat16).save_pretrained(tmp_path)
    processors.build("llava").save_pretrained(tmp_path)
    assert cp.HookedLVLM.from_pretrained(tmp_path).model.dtype == torch.bfloat16


def test_a_folder_that_is_missing_or_empty(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nowhere"), "./nowhere", "../nowhere/model", "runs/today/model"):
        refused(path, "model folder .* does not exist; give an existing one or a name on the hub")
    refused(tmp_path, r"holds no config\.json; give the folder of a Hugging Face checkpoint")


def test_a_hub_name_without_network_fails_at_once() -> None:
    started = time.perf_counter()
    text = refused(
        "no-such-organisation/no-such-model", "neither as a local folder nor on the Hugging Face hub"
    )
    assert time.perf_counter() - started < 5
    assert "revision" not in text
    assert "the revision" in refused("no-such-organisation/no-such-model", "hub", revision="v2")


def test_models_of_other_families_are_refused_with_what_is_supported(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**tiny.TEXT)).save_pretrained(tmp_path / "text")
    other = Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"])
    other.save_pretrained(tmp_path / "other")
    # A model type that is known, in a class that is not.
    reward = tiny.shared("llava").config.to_dict() | {"architectures": ["LlavaForRewardModelling"]}
    config_folder(tmp_path / "reward", **reward)
    for name, kind in (
        ("text", r"llama \(LlamaForCausalLM\)"),
        ("other", r"qwen2_vl \(Qwen2VLForConditionalGeneration\)"),
        ("reward", r"llava \(LlavaForRewardModelling\)"),
    ):
        text = refused(tmp_path / name, f"is of type {kind}; supported are")
        assert all(
            f"{family} (such as {model})" in text
            for family, model in zip(tiny.FAMILY_NAMES, NATIVE, strict=True)
        )
        assert "to add a family, write one file in capa_probe/lvlm/families." in text


def test_a_llava_with_a_pixtral_tower_is_refused(tmp_path: Path) -> None:
    config = LlavaConfig(vision_config=PixtralVisionConfig(), text_config=LlamaConfig(**tiny.TEXT))
    config.save_pretrained(tmp_path)
    refused(tmp_path, "Pixtral vision tower .* give one with a CLIP or SigLIP tower")


def test_remote_code_is_never_executed(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    folder = config_folder(
        tmp_path / "chat",
        model_type="internvl_chat",
        architectures=["InternVLChatModel"],
        auto_map={"AutoConfig": "configuration.ChatConfig", "AutoModel": "modeling.ChatModel"},
    )
    trap = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\n"
    for name in ("configuration.py", "modeling.py"):
        (folder / name).write_text(trap, encoding="utf-8")
    text = refused(folder, "remote code is never executed; use its transformers-native version, such as")
    assert all(name in text for name in NATIVE)
    refused(checkpoints["llava"], "trust_remote_code=True was given", trust_remote_code=True)
    # A native checkpoint that also names code is loaded without it.
    both = tmp_path / "both"
    shutil.copytree(checkpoints["llava"], both)
    config = json.loads((both / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForImageTextToText": "modeling.ChatModel"}
    (both / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (both / "modeling.py").write_text(trap, encoding="utf-8")
    assert type(cp.HookedLVLM.from_pretrained(both).model).__module__.startswith("transformers.")
    assert not list(tmp_path.rglob("executed"))


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names].clear()


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("model.safetensors"), "could not be loaded: .*model.safetensors"),
        (overwrite("model.safetensors", b"\x08" + bytes(7) + b"no json!"), "could not be loaded: .*header"),
        (remove("processor_config.json"), "could not be loaded: .*processor"),
        (remove("tokenizer.json", "tokenizer_config.json"), "could not be loaded: .*tokenizer"),
        (overwrite("config.json", b"{"), "config .*json cannot be read: .*line 1"),
        (overwrite("config.json", b'{"hidden_size": 4}'), "model_type"),
        (overwrite("config.json", b'{"model_type": "martian"}'), "martian"),
    ],
    ids=["weights", "header", "processor", "tokenizer", "json", "no-type", "unknown-type"],
)
def test_a_damaged_folder(
    damage: Callable[[Path], None], message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoints["llava"], tmp_path / "copy")
    damage(tmp_path / "copy")
    refused(tmp_path / "copy", message)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "float17"}, "dtype"),
        ({"nonsense": 1}, "nonsense"),
        ({"attn_implementation": "flash_attention_2"}, "[Ff]lash"),
    ],
)
def test_arguments_that_transformers_refuses(
    kwargs: dict[str, Any], message: str, checkpoints: dict[str, Path]
) -> None:
    refused(checkpoints["llava"], message, **kwargs)


def test_a_model_object_of_the_wrong_kind() -> None:
    with pytest.raises(CapaProbeError, match=r"object of type str was given; .*from_pretrained"):
        cp.HookedLVLM("llava-hf/llava-1.5-7b-hf")
    with pytest.raises(CapaProbeError, match=r"is of type llama; supported are llava"):
        cp.HookedLVLM(LlamaForCausalLM(LlamaConfig(**tiny.TEXT)))


def test_options_of_the_hub_reach_config_model_and_processor(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoints["llava"], tmp_path / "sub")
    lvlm = cp.HookedLVLM.from_pretrained(tmp_path, subfolder="sub", local_files_only=True)
    assert lvlm.family.name == "llava"
    assert lvlm.processor is not None
    refused(tmp_path, "holds no config.json")
    refused(checkpoints["llava"], r"config= was given", config=LlavaConfig())

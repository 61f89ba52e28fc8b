"""The shipped demo models: ordinary checkpoints that answer, and say in their cards what was measured."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

import capa_probe as cp
from capa_probe.demo import DEMO_MODELS, demo_data_path, demo_model_path
from capa_probe.demo.drawing import blank_like
from capa_probe.demo.worlds import WORLDS, World
from demo_training.evaluation import answer, misses_bar

MEGABYTE = 10**6
FAMILIES = pytest.mark.parametrize("family", DEMO_MODELS)
#: Class of the model, kind of its tower and of its decoder.
KINDS = {
    "llava": (LlavaForConditionalGeneration, LlavaProcessor, "clip_vision_model", "llama"),
    "qwen2.5-vl": (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        "qwen2_5_vl_vision",
        "qwen2_5_vl_text",
    ),
    "internvl": (InternVLForConditionalGeneration, InternVLProcessor, "internvl_vision", "qwen2"),
}
#: How many visual tokens the images of the test questions have.
N_VISUAL = {"llava": {144}, "qwen2.5-vl": {64, 72, 108, 144, 192}, "internvl": {36, 108, 144, 180}}


@cache
def folder(family: str) -> Path:
    return demo_model_path(family)


@cache
def model(family: str) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder(family)).eval()


@cache
def processor(family: str) -> ProcessorMixin:
    return AutoProcessor.from_pretrained(folder(family))


def world(family: str) -> World:
    return WORLDS[DEMO_MODELS[family].world]


@cache
def samples(family: str) -> tuple[cp.Sample, ...]:
    folder(family)  # without the model, its questions may be missing too
    return tuple(cp.load_samples(demo_data_path("test", world(family).name)))


@FAMILIES
def test_it_is_an_ordinary_checkpoint_of_the_promised_size(family: str) -> None:
    files = {path.name: path for path in folder(family).iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"}
    assert wanted <= set(files)
    assert sum(path.stat().st_size for path in files.values()) <= 24 * MEGABYTE
    plain = {".json", ".safetensors", ".jinja", ".md", ".png", ".parquet"}
    assert all(path.suffix in plain for path in files.values())
    kind, processor_kind, vision, decoder = KINDS[family]
    config = model(family).config
    assert type(model(family)) is kind
    assert type(processor(family)) is processor_kind
    text = config.text_config
    assert text.hidden_size >= 256
    assert text.num_hidden_layers >= 8
    assert text.num_key_value_heads < text.num_attention_heads
    assert (config.vision_config.model_type, text.model_type) == (vision, decoder)


@FAMILIES
def test_its_visual_tokens_are_as_many_as_promised(family: str) -> None:
    lvlm = cp.HookedLVLM(model(family), processor(family))
    one_of_each = {sample.open_images()[0].size: sample for sample in samples(family)}.values()
    found = set()
    for sample in one_of_each:
        spans = lvlm.spans(lvlm.prepare(sample.open_images(), sample.question))
        found.add(int(spans.visual.sum()))
        if family == "llava":
            assert spans.images[0].grid == (12, 12)
    assert found == N_VISUAL[family]


@FAMILIES
def test_it_answers(family: str) -> None:
    """A fifth of the shipped questions; the card reports all of them."""
    plain_tasks = world(family).plain_tasks
    chosen = [
        sample
        for task in world(family).tasks
        for sample in [s for s in samples(family) if s.task == task][: 36 if task in plain_tasks else 12]
    ]
    images = [sample.open_images()[0] for sample in chosen]
    questions = [sample.question for sample in chosen]
    found = answer(model(family), processor(family), images, questions)
    right = [text in sample.answers for text, sample in zip(found, chosen, strict=True)]
    plain = [r for r, sample in zip(right, chosen, strict=True) if sample.task in plain_tasks]
    assert sum(plain) / len(plain) >= 0.9
    blind = answer(model(family), processor(family), [blank_like(image) for image in images], questions)
    blind_right = [text in sample.answers for text, sample in zip(blind, chosen, strict=True)]
    assert sum(right) - sum(blind_right) > len(chosen) / 3


@FAMILIES
def test_its_own_words_do_as_well(family: str) -> None:
    """Answers do not hang on how the samples file writes a question."""
    chosen = samples(family)[:21]
    images = [sample.open_images()[0] for sample in chosen]
    as_written = answer(model(family), processor(family), images, [sample.question for sample in chosen])
    first_lower = [sample.question[0].lower() + sample.question[1:] for sample in chosen]
    lower = answer(model(family), processor(family), images, first_lower)
    assert as_written == lower


@FAMILIES
def test_generation_is_the_same_in_a_padded_batch_and_alone(family: str) -> None:
    chosen = samples(family)[:8]
    images = [sample.open_images()[0] for sample in chosen]
    questions = [sample.question for sample in chosen]
    together, alone = (
        answer(model(family), processor(family), images, questions, batch_size=size) for size in (32, 1)
    )
    assert together == alone


@FAMILIES
def test_the_card_reports_the_evaluation(family: str) -> None:
    card = (folder(family) / "README.md").read_text(encoding="utf-8")
    results = json.loads((folder(family) / "evaluation.json").read_text(encoding="utf-8"))
    assert not list(misses_bar(results, world(family)))
    for task in world(family).tasks:
        r = results[task]
        if r["low"] <= max(r["blank"], r["majority"]):  # three looks: the card says that it was not learned
            assert (task, family == "llava") == ("chain", False)
            assert f"- `{task}` is answered right in {r['accuracy']:.2f} of the cases" in card
        row = re.search(
            rf"\| {task} \| (\d+) \| ([\d.]+) \| ([\d.]+)-([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", card
        )
        assert row, task
        n, accuracy, low, high, blank, majority = (float(value) for value in row.groups())
        assert n == r["n"]
        found = {"accuracy": accuracy, "low": low, "high": high, "blank": blank, "majority": majority}
        for value, shown in found.items():
            assert shown == pytest.approx(r[value], abs=5e-4)
    assert (folder(family) / "training_curve.png").is_file()

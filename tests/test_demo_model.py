"""The shipped demo model: an ordinary checkpoint that answers, and says in its card what was measured."""

from __future__ import annotations

import json
import re

import pytest
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import capa_probe as cp
from capa_probe.demo import demo_data_path, demo_model_path
from capa_probe.demo.drawing import blank_image
from capa_probe.demo.worlds import RICH
from demo_training.evaluation import answer, misses_bar

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(demo_model_path()).eval()


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return AutoProcessor.from_pretrained(demo_model_path())


def test_it_is_an_ordinary_checkpoint_of_the_promised_size(model: LlavaForConditionalGeneration) -> None:
    folder = demo_model_path()
    assert isinstance(model, LlavaForConditionalGeneration)
    files = {path.name: path for path in folder.iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"}
    assert wanted <= set(files)
    assert sum(path.stat().st_size for path in files.values()) <= 24 * MEGABYTE
    assert all(path.suffix in {".json", ".safetensors", ".jinja", ".md", ".png"} for path in files.values())
    text = model.config.text_config
    assert text.hidden_size >= 256
    assert text.num_hidden_layers >= 8
    assert text.num_key_value_heads < text.num_attention_heads
    assert model.config.vision_config.model_type == "clip_vision_model"
    assert text.model_type == "llama"


def test_it_has_144_visual_tokens_on_a_square_grid() -> None:
    lvlm = cp.HookedLVLM.from_pretrained(demo_model_path())
    sample = cp.load_samples(demo_data_path(), limit=1)[0]
    spans = lvlm.spans(lvlm.prepare(sample.open_images(), sample.question))
    assert int(spans.visual.sum()) == 144
    assert spans.images[0].grid == (12, 12)


def test_it_answers(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """A tenth of the shipped questions; the card reports all of them."""
    samples = [
        sample
        for task in RICH.tasks
        for sample in [s for s in cp.load_samples(demo_data_path()) if s.task == task][:12]
    ]
    images = [sample.open_images()[0] for sample in samples]
    questions = [sample.question for sample in samples]
    found = answer(model, processor, images, questions)
    right = [text in sample.answers for text, sample in zip(found, samples, strict=True)]
    plain = [r for r, sample in zip(right, samples, strict=True) if sample.task in RICH.plain_tasks]
    assert sum(plain) / len(plain) >= 0.9
    blind = answer(model, processor, [blank_image()] * len(samples), questions)
    blind_right = [text in sample.answers for text, sample in zip(blind, samples, strict=True)]
    assert sum(right) - sum(blind_right) > len(samples) / 3


def test_its_own_words_do_as_well(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Answers do not hang on how the samples file writes a question."""
    samples = cp.load_samples(demo_data_path(), limit=21)
    images = [sample.open_images()[0] for sample in samples]
    as_written = answer(model, processor, images, [sample.question for sample in samples])
    lower = answer(
        model, processor, images, [sample.question[0].lower() + sample.question[1:] for sample in samples]
    )
    assert as_written == lower


def test_generation_is_the_same_in_a_padded_batch_and_alone(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    samples = cp.load_samples(demo_data_path(), limit=8)
    images = [sample.open_images()[0] for sample in samples]
    questions = [sample.question for sample in samples]
    assert answer(model, processor, images, questions) == answer(
        model, processor, images, questions, batch_size=1
    )


def test_the_card_reports_the_evaluation() -> None:
    card = (demo_model_path() / "README.md").read_text(encoding="utf-8")
    results = json.loads((demo_model_path() / "evaluation.json").read_text(encoding="utf-8"))
    assert not list(misses_bar(results))
    for task in RICH.tasks:
        r = results[task]
        assert r["low"] > max(r["blank"], r["majority"]), task
        row = re.search(
            rf"\| {task} \| (\d+) \| ([\d.]+) \| ([\d.]+)-([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", card
        )
        assert row, task
        n, accuracy, low, high, blank, majority = (float(value) for value in row.groups())
        assert n == r["n"]
        found = {"accuracy": accuracy, "low": low, "high": high, "blank": blank, "majority": majority}
        for value, shown in found.items():
            assert shown == pytest.approx(r[value], abs=5e-4)
    assert (demo_model_path() / "training_curve.png").is_file()

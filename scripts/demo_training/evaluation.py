"""How well the model answers: one question per prompt, greedy generation, against the same model shown nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from capa_probe.demo.dataset import majority_baseline
from capa_probe.demo.drawing import blank_image
from capa_probe.demo.worlds import RICH, World
from capa_probe.samples import Sample

MAX_NEW_TOKENS = 8


def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    batch_size: int = 32,
) -> list[str]:
    """The model's answer to each question about its image."""
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        here = slice(start, start + batch_size)
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            )
            for question in questions[here]
        ]
        inputs = processor(images=list(images[here]), text=prompts, padding=True, return_tensors="pt").to(
            model.device
        )
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[Sample],
    world: World = RICH,
) -> dict[str, dict[str, float]]:
    """For each task: n, accuracy with its 95 % Wilson interval, and accuracy with a blank image and
    of always giving the most frequent answer."""
    questions = [sample.question for sample in samples]
    seen = answer(model, processor, [sample.open_images()[0] for sample in samples], questions)
    blind = answer(model, processor, [blank_image(world)] * len(samples), questions)
    majority, results = majority_baseline(samples), {}
    for task in world.tasks:
        chosen = [i for i, sample in enumerate(samples) if sample.task == task]
        right = sum(seen[i] in samples[i].answers for i in chosen)
        low, high = wilson(right, len(chosen))
        results[task] = {
            "n": len(chosen),
            "accuracy": right / len(chosen),
            "low": low,
            "high": high,
            "blank": sum(blind[i] in samples[i].answers for i in chosen) / len(chosen),
            "majority": majority[task][1],
        }
    return results


def mean_of(results: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> float:
    """Mean accuracy over tasks."""
    return sum(results[task]["accuracy"] for task in tasks) / len(tasks)


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share."""
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def misses_bar(results: Mapping[str, Mapping[str, float]], world: World = RICH) -> Iterable[str]:
    """What of the bar the model misses: mean of the plain tasks 0.92, of those that take several looks 0.80."""
    plain = mean_of(results, world.plain_tasks)
    two_hop = mean_of(results, world.two_hop_tasks)
    if plain < 0.92:
        yield f"mean of the plain tasks {plain:.3f} < 0.92"
    if two_hop < 0.80:
        yield f"mean of the two-hop tasks {two_hop:.3f} < 0.80"

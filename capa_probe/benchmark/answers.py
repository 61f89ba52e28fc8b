"""Greedy answers and next-token distributions of a model, pruned or not, one row per sample."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capa_probe.benchmark.setup import chunks
from capa_probe.errors import CapaProbeError
from capa_probe.flops import Shape, prefill_cost
from capa_probe.flops.counting import FORWARD
from capa_probe.lvlm import HookedLVLM
from capa_probe.lvlm.inputs import LVLMInputs
from capa_probe.lvlm.spans import TokenSpans
from capa_probe.memory import memory_errors
from capa_probe.pruning import Pruner
from capa_probe.pruning.cost import prompt_cost
from capa_probe.samples import Sample


def normalise(text: str) -> str:
    """An answer as it is compared: lower case, single spaces, no full stop or other punctuation at its ends."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'")


def is_correct(text: str, answers: Sequence[str]) -> float:
    """1.0 if an answer is one of the accepted ones (normalised exact match), else 0.0; NaN where none is known."""
    if not answers:
        return math.nan
    return float(normalise(text) in {normalise(answer) for answer in answers})


@dataclass(frozen=True)
class Answered:
    """What a batch of prompts gave.

    Attributes:
        texts: the greedy answers.
        log_probs: float32 (batch, vocab) log-probabilities of the first new token.
        kept: visual tokens that the last layer's attention saw, one per sample.
        visual: visual tokens of the prompts.
        flops: of each prefill, vision tower and scoring included (:mod:`capa_probe.flops`, convention "forward").
        seconds: wall time of generating the answers of the batch, preparation left out, per sample.
    """

    texts: list[str]
    log_probs: Tensor
    kept: list[int]
    visual: list[int]
    flops: list[int]
    seconds: float


def prepare(lvlm: HookedLVLM, samples: Sequence[Sample]) -> LVLMInputs:
    """A batch of samples as left-padded model inputs.

    Raises:
        BadImageError: an image cannot be used.
        CapaProbeError: a sample cannot be prepared; the message names those of the batch.
    """
    images = [sample.open_images() for sample in samples]
    try:
        return lvlm.prepare(images, [sample.question for sample in samples], padding_side="left")
    except CapaProbeError as error:
        raise CapaProbeError(f"Sample {', '.join(sample.id for sample in samples)}: {error}") from error


def answer(
    lvlm: HookedLVLM,
    samples: Sequence[Sample],
    pruner: Pruner | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 16,
) -> Iterator[Answered]:
    """Generate greedy answers batch by batch, under a pruner if one is given.

    The distribution comes from the logits of the same ``generate`` call: no second forward.

    Args:
        lvlm: the model.
        samples: with images.
        pruner: attached to the model meanwhile.
        batch_size: samples per batch.
        max_new_tokens: at which an answer is cut off.

    Raises:
        CapaProbeError: samples that cannot be prepared, logits that are not finite, or too little memory.
    """
    shape = Shape.of(lvlm.model.config)
    for batch in chunks(samples, batch_size):
        inputs = prepare(lvlm, batch)
        spans = lvlm.spans(inputs)
        with (
            memory_errors(f"sample {batch[0].id} ({len(batch)} in the batch)"),
            torch.inference_mode(),
            nullcontext() if pruner is None else pruner.attach(lvlm) as trace,
        ):
            started = _clock(lvlm)
            out = lvlm.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
            seconds = _clock(lvlm) - started
        log_probs = out.logits[0].float().log_softmax(dim=-1).cpu()
        if bool(log_probs.isnan().any()):
            row = int(log_probs.isnan().any(dim=1).nonzero()[0])
            raise CapaProbeError(
                f"The logits of sample {batch[row].id} are not finite; load the model in bfloat16 or float32, or leave "
                "the sample out."
            )
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in lvlm.processor.batch_decode(new, skip_special_tokens=True)]
        visual = spans.visual.sum(dim=1).tolist()
        text = spans.text.sum(dim=1).tolist()
        kept, flops = list(visual), []
        for row in range(len(batch)):
            grids = _grids(spans, inputs, row)
            if pruner is None or trace is None:
                cost = prefill_cost(shape, visual=visual[row], text=text[row], grids=grids)
            else:
                cost = prompt_cost(shape, pruner, trace, row=row, grids=grids, convention=FORWARD)
                kept[row] = int(trace.visual_tokens[-1, row])
            flops.append(cost.total)
        yield Answered(texts, log_probs, kept, visual, flops, seconds / len(batch))


def _clock(lvlm: HookedLVLM) -> float:
    if lvlm.device.type == "cuda":
        torch.cuda.synchronize(lvlm.device)
    return time.perf_counter()


def _grids(spans: TokenSpans, inputs: Mapping[str, Any], row: int) -> list[tuple[int, int]] | None:
    """Patches (rows, columns) of a sample's images, where the model's inputs hold them."""
    grid = inputs.get("image_grid_thw")
    if grid is None:
        return None
    first = sum(image.sample < row for image in spans.images)
    own = sum(image.sample == row for image in spans.images)
    return [(int(rows), int(cols)) for _, rows, cols in grid[first : first + own].tolist()]

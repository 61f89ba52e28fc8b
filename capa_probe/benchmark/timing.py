"""Measured time of prefill and decode steps, of several ways to run one prompt, so that their ratio can be trusted."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from capa_probe.lvlm import HookedLVLM


@dataclass(frozen=True)
class Times:
    """Seconds, one number for each repeat.

    Attributes:
        prefill: of the whole forward until the first token's logits: vision tower, projector, decoder, scoring.
        step: per generated token after the first, the median of one repeat's steps; none if no step was timed.
    """

    prefill: tuple[float, ...]
    step: tuple[float, ...]


def time_interleaved(
    lvlm: HookedLVLM,
    inputs: Mapping[str, Any],
    ways: Sequence[Callable[[], AbstractContextManager[Any]]],
    *,
    steps: int = 8,
    repeats: int = 5,
) -> list[Times]:
    """Time a prompt and some greedy decode steps under several contexts, turn by turn.

    Each way runs once without being timed. Then all of them run in every repeat, in an order that is reversed from one
    to the next, so that a machine that slows down does so for all. Every way takes the same number of steps, past an
    end-of-sequence token too. A step is one forward of one token on the KV cache; what ``generate`` does around it is
    not timed.

    Args:
        lvlm: the model.
        inputs: tensors of one prompt, without padding.
        ways: each makes the context to run under, such as a pruner's ``attach``.
        steps: decode steps per repeat; 0 times the prefill alone.
        repeats: at least 1.
    """
    measured: list[list[tuple[float, list[float]]]] = [[] for _ in ways]
    for repeat in range(-1, repeats):
        order = range(len(ways)) if repeat % 2 else range(len(ways) - 1, -1, -1)
        for way in order:
            with ways[way]():
                found = _one(lvlm, inputs, steps)
            if repeat >= 0:
                measured[way].append(found)
    return [
        Times(
            tuple(prefill for prefill, _ in own),
            tuple(median(each) for _, each in own if each),
        )
        for own in measured
    ]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """No pause for it in the middle, as in ``timeit``."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@torch.no_grad()
@_no_garbage_collection()
def _one(lvlm: HookedLVLM, inputs: Mapping[str, Any], steps: int) -> tuple[float, list[float]]:
    start = _now(lvlm)
    out = lvlm.model(**inputs, use_cache=True, logits_to_keep=1)
    end = _now(lvlm)
    prefill, each = end - start, []
    for _ in range(steps):
        start = end
        chosen = out.logits[:, -1:].argmax(dim=-1)
        out = lvlm.model(input_ids=chosen, past_key_values=out.past_key_values, use_cache=True)
        end = _now(lvlm)
        each.append(end - start)
    return prefill, each


def _now(lvlm: HookedLVLM) -> float:
    if lvlm.device.type == "cuda":
        torch.cuda.synchronize(lvlm.device)
    return time.perf_counter()

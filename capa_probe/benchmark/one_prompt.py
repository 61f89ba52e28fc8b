"""One prompt, answered by a model and by the same model under a pruner: answers, tokens, cost, time, divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from capa_probe.benchmark.timing import Times, time_interleaved
from capa_probe.errors import CapaProbeError
from capa_probe.flops import CAPA, CONVENTIONS, Cost, Shape, decode_cost, prefill_cost
from capa_probe.lvlm import HookedLVLM
from capa_probe.measures import hellinger, kl_divergence
from capa_probe.pruning.base import Pruner
from capa_probe.pruning.cost import prompt_cost, step_cost
from capa_probe.pruning.trace import Trace

_FORWARD = CONVENTIONS["forward"]


@dataclass(frozen=True)
class Side:
    """What one of the two did: the model itself, or the model under a pruner.

    Attributes:
        answer: the greedy answer, without special tokens.
        ids: its tokens.
        visual_tokens: per layer, what its attention saw at prefill.
        kv_entries: per layer, positions that the KV cache held after prefill.
        kv_bytes: size of their keys and values in memory.
        prefill: FLOPs of the prefill, as the convention "forward" counts.
        step: FLOPs of the first decode step, likewise.
        prefill_capa: multiply-accumulates of visual tokens in the decoder at prefill, as the CAPA paper counts.
        prefill_seconds: measured, one number per repeat.
        step_seconds: measured per generated token after the first, one number per repeat.
    """

    answer: str
    ids: tuple[int, ...]
    visual_tokens: tuple[int, ...]
    kv_entries: tuple[int, ...]
    kv_bytes: int
    prefill: Cost
    step: Cost
    prefill_capa: Cost
    prefill_seconds: tuple[float, ...]
    step_seconds: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "answer": self.answer,
            "ids": list(self.ids),
            "visual_tokens": list(self.visual_tokens),
            "kv_entries": list(self.kv_entries),
            "kv_bytes": self.kv_bytes,
            "prefill_flops": {"total": self.prefill.total, **self.prefill.parts},
            "step_flops": {"total": self.step.total, **self.step.parts},
            "prefill_macs_capa": self.prefill_capa.total,
            "prefill_seconds": list(self.prefill_seconds),
            "step_seconds": list(self.step_seconds),
        }


@dataclass(frozen=True)
class OnePrompt:
    """One prompt, with and without a pruner.

    Attributes:
        vanilla: the model itself.
        pruned: under the pruner; None where the prompt holds no image, so that there is nothing to prune.
        n_visual: visual tokens of the prompt.
        n_text: its other tokens.
        kept_per_step: with re-scoring at every step, visual tokens that each layer's attention saw in the first step.
        compared_token: which generated token's distributions are compared, from 1: the first that pruning can change.
        kl: KL(vanilla || pruned) of the two, in nats; NaN where there is none.
        hellinger: their Hellinger distance; likewise.
        kept: pruning layer to the positions of the visual tokens that were kept; with re-scoring at every step, in
            the first step.
    """

    vanilla: Side
    pruned: Side | None
    n_visual: int
    n_text: int
    kept_per_step: tuple[int, ...] = ()
    compared_token: int = 1
    kl: float = math.nan
    hellinger: float = math.nan
    kept: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def speedups(self, what: Literal["prefill", "step"]) -> list[float]:
        """Vanilla time over pruned time, one number per repeat; none where nothing was timed."""
        if self.pruned is None:
            return []
        sides = (getattr(side, f"{what}_seconds") for side in (self.vanilla, self.pruned))
        return [before / after for before, after in zip(*sides, strict=True)]

    def as_json(self) -> dict[str, Any]:
        """As JSON values; null for what does not apply."""
        return {
            "n_visual": self.n_visual,
            "n_text": self.n_text,
            "vanilla": self.vanilla.as_json(),
            "pruned": None if self.pruned is None else self.pruned.as_json(),
            "kept": {str(layer): list(positions) for layer, positions in self.kept.items()},
            "kept_per_step": list(self.kept_per_step),
            "compared_token": self.compared_token,
            "kl_nats": _number(self.kl),
            "hellinger": _number(self.hellinger),
            "prefill_speedups": self.speedups("prefill"),
            "step_speedups": self.speedups("step"),
        }


def run_one_prompt(
    lvlm: HookedLVLM,
    inputs: Mapping[str, Any],
    pruner: Pruner,
    *,
    max_new_tokens: int = 32,
    repeats: int = 5,
) -> OnePrompt:
    """Answer one prompt with and without a pruner, and measure both.

    Args:
        lvlm: the model; with a processor, answers come as text.
        inputs: tensors of one prompt, such as :meth:`HookedLVLM.prepare` makes.
        pruner: the method.
        max_new_tokens: length of an answer, at most; as many tokens are timed, whatever the answer's length.
        repeats: how often both are timed, after one run that is not; 0 times nothing.

    Raises:
        CapaProbeError: a batch of several prompts, or a pruner that does not fit the model or the prompt.
    """
    if len(inputs["input_ids"]) != 1:
        raise CapaProbeError(
            f"A batch of {len(inputs['input_ids'])} prompts was given; give one prompt at a time, without padding."
        )
    spans = lvlm.spans(inputs)
    n_visual, n_text = int(spans.visual.sum()), int(spans.text.sum())
    ways: list[Callable[[], AbstractContextManager[Any]]] = [nullcontext]
    if n_visual:
        ways.append(lambda: pruner.attach(lvlm))
    answers = [_answer(lvlm, inputs, way, max_new_tokens) for way in ways]
    times = [Times((), ()) for _ in ways]
    if repeats:
        times = time_interleaved(lvlm, inputs, ways, steps=max_new_tokens - 1, repeats=repeats)
    unpruned = (n_visual,) * lvlm.n_layers
    vanilla = _side(answers[0], times[0], unpruned, _vanilla_cost(lvlm, inputs, n_visual, n_text))
    if not n_visual:
        return OnePrompt(vanilla, None, n_visual, n_text)
    trace = answers[1].trace
    assert trace is not None
    left = tuple(trace.visual_tokens[:, 0].tolist())
    pruned = _side(answers[1], times[1], left, _pruned_cost(lvlm, inputs, pruner, trace))
    return OnePrompt(vanilla, pruned, n_visual, n_text, kept=_kept(trace), **_compared(pruner, answers))


def _kept(trace: Trace) -> dict[int, tuple[int, ...]]:
    """Positions of the visual tokens that each pruning layer kept."""
    sets = trace.steps[0] if trace.steps else trace.kept
    return {
        layer: tuple((kept & trace.visual)[0].nonzero()[:, 0].tolist())
        for layer, kept in sorted(sets.items())
    }


def _side(answer: _Answer, times: Times, visual_tokens: tuple[int, ...], costs: Mapping[str, Cost]) -> Side:
    return Side(
        answer=answer.text,
        ids=answer.ids,
        visual_tokens=visual_tokens,
        kv_entries=answer.kv_entries,
        kv_bytes=answer.kv_bytes,
        prefill_seconds=times.prefill,
        step_seconds=times.step,
        **costs,
    )


def _vanilla_cost(lvlm: HookedLVLM, inputs: Mapping[str, Any], visual: int, text: int) -> dict[str, Cost]:
    shape = Shape.of(lvlm.model.config)
    return {
        "prefill": prefill_cost(shape, visual=visual, text=text, grids=_grids(inputs), convention=_FORWARD),
        "step": decode_cost(shape, visual=visual, text=text, convention=_FORWARD),
        "prefill_capa": prefill_cost(shape, visual=visual, text=text, convention=CAPA),
    }


def _pruned_cost(
    lvlm: HookedLVLM, inputs: Mapping[str, Any], pruner: Pruner, trace: Trace
) -> dict[str, Cost]:
    shape = Shape.of(lvlm.model.config)
    return {
        "prefill": prompt_cost(shape, pruner, trace, grids=_grids(inputs), convention=_FORWARD),
        "step": step_cost(shape, pruner, trace, convention=_FORWARD),
        "prefill_capa": prompt_cost(shape, pruner, trace, convention=CAPA),
    }


@dataclass(frozen=True)
class _Answer:
    text: str
    ids: tuple[int, ...]
    logits: tuple[Tensor, ...]
    kv_entries: tuple[int, ...]
    kv_bytes: int
    trace: Trace | None = field(repr=False, default=None)


@torch.no_grad()
def _answer(
    lvlm: HookedLVLM,
    inputs: Mapping[str, Any],
    way: Callable[[], AbstractContextManager[Any]],
    max_new_tokens: int,
) -> _Answer:
    with way() as trace:
        out = lvlm.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
    ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    tokenizer = getattr(lvlm.processor, "tokenizer", None)
    text = "" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True).strip()
    layers = out.past_key_values.layers
    fed = len(ids) - 1  # the last token was not fed back
    entries = tuple(layer.keys.shape[2] - fed for layer in layers)
    size = sum(
        (layer.keys[:, :, :n].nbytes + layer.values[:, :, :n].nbytes)
        for layer, n in zip(layers, entries, strict=True)
    )
    return _Answer(text, tuple(ids), out.logits[:2], entries, size, trace)


def _compared(pruner: Pruner, answers: Sequence[_Answer]) -> dict[str, Any]:
    """How far the next-token distributions are apart, at the first token that pruning can change."""
    vanilla, pruned = answers
    at = int(pruner.every_step)  # the first token then comes from the whole prompt, in both
    trace = pruned.trace
    found: dict[str, Any] = {"compared_token": at + 1}
    if trace is not None and trace.steps:
        layers, counts = sorted(trace.steps[0]), []
        for layer in range(len(pruned.kv_entries)):
            last = max((of for of in layers if of <= layer), default=None)
            seen = trace.visual if last is None else trace.steps[0][last] & trace.visual
            counts.append(int(seen.sum()))
        found["kept_per_step"] = tuple(counts)
    if min(len(vanilla.logits), len(pruned.logits)) > at:
        one, two = vanilla.logits[at][0], pruned.logits[at][0]
        found["kl"] = float(kl_divergence(one, two))
        found["hellinger"] = float(hellinger(one.float().softmax(-1), two.float().softmax(-1)))
    return found


def ranges(counts: Sequence[int]) -> list[tuple[str, int]]:
    """Counts per layer as ranges of layers: ``[("0-2", 144), ("3-7", 36)]``."""
    found = []
    for count, own in groupby(range(len(counts)), key=lambda layer: counts[layer]):
        layers = list(own)
        found.append((str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}", count))
    return found


def _grids(inputs: Mapping[str, Any]) -> list[tuple[int, int]] | None:
    """Patch grids of the images, for a model in which every image has its own."""
    given = inputs.get("image_grid_thw")
    return None if given is None else [(int(rows), int(cols)) for _, rows, cols in given.tolist()]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value

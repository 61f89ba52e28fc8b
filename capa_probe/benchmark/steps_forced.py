"""Greedy answers as token ids, and the distributions along a given answer, each step decoded for itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from capa_probe.lvlm import HookedLVLM


@dataclass(frozen=True)
class Answers:
    """Answers of a batch, token by token.

    Attributes:
        ids: (batch, step) generated ids; filled up after a sample's last one.
        n_steps: per sample, how many ids its answer has, its stop token included.
        logits: float32 (step, batch, vocabulary): what each token was, or would have been, chosen from, before any
            penalty of the generation settings. Meaningless after a sample's last step.
    """

    ids: Tensor
    n_steps: tuple[int, ...]
    logits: Tensor


@torch.no_grad()
def greedy(lvlm: HookedLVLM, inputs: Mapping[str, Any], max_new_tokens: int) -> Answers:
    """The model's own greedy answers.

    Args:
        lvlm: the model.
        inputs: left-padded, as ``lvlm.prepare`` makes them.
        max_new_tokens: at which an answer is cut off.
    """
    return _generate(lvlm, inputs, max_new_tokens)


@torch.no_grad()
def forced(lvlm: HookedLVLM, inputs: Mapping[str, Any], answers: Answers) -> Tensor:
    """Next-token logits when every generated token is replaced by that of given answers (teacher forcing).

    It runs the model's own ``generate``, so that under a pruner the prompt is pruned by its own last token and the
    answer comes after it, one decode step per token, as in free generation. (One forward over prompt and answer would
    prune by the last token of the answer.)

    Args:
        lvlm: the model, with or without a pruner on it.
        inputs: the prompts of the answers.
        answers: to be forced.

    Returns:
        Float32 (step, batch, vocabulary); row t is what token t of the answer would have been chosen from.
    """
    force = _Force(inputs["input_ids"].shape[1], answers.ids)
    return _generate(lvlm, inputs, answers.ids.shape[1], logits_processor=LogitsProcessorList([force])).logits


def _generate(lvlm: HookedLVLM, inputs: Mapping[str, Any], max_new_tokens: int, **options: Any) -> Answers:
    out = lvlm.model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    ids = out.sequences[:, inputs["input_ids"].shape[1] :]
    stops = lvlm.model.generation_config.eos_token_id
    stop_ids = torch.as_tensor([] if stops is None else stops, device=ids.device).reshape(-1)
    running = (~torch.isin(ids, stop_ids)).int().cumprod(dim=1).sum(dim=1)
    n_steps = tuple(min(int(n) + 1, ids.shape[1]) for n in running)
    return Answers(ids, n_steps, torch.stack([step.float() for step in out.logits]))


def digest(*ids: str) -> str:
    """Sample ids as part of the key of a stored part."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


class _Force:
    """A logits processor that leaves one token possible at each step."""

    def __init__(self, n_prompt: int, ids: Tensor) -> None:
        self._n_prompt, self._ids = n_prompt, ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self._ids[:, input_ids.shape[1] - self._n_prompt].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)

"""The forward that probes listen to: a prefill, and decode steps after it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM, TokenSpans
from capa_probe.probes.recorder import Recorder, not_one_forward_per_step


def run(
    lvlm: HookedLVLM, inputs: Mapping[str, Any], spans: TokenSpans, recorder: Recorder, steps: int
) -> tuple[list[int], list[int | None]]:
    """One prefill and up to ``steps`` greedy decode steps under a recorder.

    Returns:
        For each sample, how many decode steps have a generated token other than a stop token as query, and the first
        step whose token was chosen from logits with NaN, if any.
    """
    length = spans.padding.shape[1]
    with torch.no_grad(), recorder.attached():
        if steps == 0:
            lvlm.model(**inputs, use_cache=False, logits_to_keep=1)
            return [0] * len(spans.padding), [None] * len(spans.padding)
        if bool((spans.last != length - 1).any()):
            raise CapaProbeError(
                f"steps={steps} was asked for on right-padded inputs, which cannot be continued; pad on the left "
                '(padding_side="left").'
            )
        # The model's own generation settings (stop tokens, penalties), made greedy.
        config = copy.deepcopy(lvlm.model.generation_config)
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        plain = {"return_dict_in_generate": False, "num_return_sequences": 1}
        config.update(**greedy, **plain, max_length=None, max_new_tokens=steps + 1, use_cache=True)
        config.disable_compile = True  # a compiled forward would keep these hooks, or run without them
        watch = _NaNWatch()
        processors = LogitsProcessorList([watch])
        generated: Tensor = lvlm.model.generate(
            **inputs, generation_config=config, logits_processor=processors
        )[:, length:]
    if len(recorder.steps) != generated.shape[1]:
        raise not_one_forward_per_step()
    stops = config.eos_token_id
    stop_ids = torch.as_tensor([] if stops is None else stops, device=generated.device).reshape(-1)
    running = (~torch.isin(generated, stop_ids)).int().cumprod(dim=1).sum(dim=1)
    n_steps = [min(steps, int(n), len(recorder.steps) - 1) for n in running]
    return n_steps, watch.first_steps(n_steps, steps)


class _NaNWatch:
    """Notes logits with NaN, from which generation would take any token without a word."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._found.append(scores.isnan().any(dim=1))
        return scores

    def first_steps(self, n_steps: Sequence[int], steps: int) -> list[int | None]:
        """For each sample, the first step whose token is chosen from NaN; None if none of those that count is."""
        rows = torch.stack(self._found, dim=1).tolist()
        counted = [row[: min(n + 1, steps)] for row, n in zip(rows, n_steps, strict=True)]
        return [row.index(True) + 1 if any(row) else None for row in counted]


def check_logits(ids: Sequence[str], nan_steps: Sequence[int | None]) -> None:
    """Refuse tokens that were chosen from logits with NaN.

    Raises:
        CapaProbeError: some were; the sample and the step are named.
    """
    for sample_id, step in zip(ids, nan_steps, strict=False):  # with a limit, ids may be fewer
        if step is not None:
            raise CapaProbeError(
                f"The logits that choose generated token {step} of sample {sample_id} hold NaN, though every layer is "
                "finite; check the final norm and the output head, or load the model in bfloat16 or float32."
            )

"""What a pruned forward cost, counted from its trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from capa_probe.flops import Convention, Cost, Shape, decode_cost, prefill_cost
from capa_probe.pruning.base import Pruner
from capa_probe.pruning.ffn import HadamardFFN, SkipFFN
from capa_probe.pruning.trace import Trace


def prompt_cost(
    shape: Shape,
    pruner: Pruner,
    trace: Trace,
    *,
    row: int = 0,
    grids: Sequence[tuple[int, int]] | None = None,
    convention: Convention,
) -> Cost:
    """Cost of the prefill that a trace records, scoring included; see :func:`capa_probe.flops.prefill_cost`.

    Masked execution costs what the model itself costs, and the scoring; so does re-scoring at every step, without it.

    Args:
        shape: sizes of the model.
        pruner: the method.
        trace: of it.
        row: of the batch.
        grids: patches (rows, columns) of the row's images, for a model whose images have grids of their own.
        convention: what is counted, and in which unit.
    """
    prompt = _prompt(pruner, trace, row)
    if pruner.every_step:
        prompt = {**prompt, "kept": None, "score": None}
    ffn: Any = getattr(pruner, "ffn", None)
    return prefill_cost(
        shape,
        **prompt,
        hadamard=ffn.layers if isinstance(ffn, HadamardFFN) else (),
        skip=ffn.layers if isinstance(ffn, SkipFFN) else (),
        grids=grids,
        convention=convention,
    )


def step_cost(shape: Shape, pruner: Pruner, trace: Trace, *, row: int = 0, convention: Convention) -> Cost:
    """Cost of the first decode step after that prefill; see :func:`capa_probe.flops.decode_cost`."""
    prompt = _prompt(pruner, trace, row)
    if not pruner.every_step:
        prompt["score"] = None
    return decode_cost(shape, **prompt, convention=convention)


def _prompt(pruner: Pruner, trace: Trace, row: int) -> dict[str, Any]:
    """Tokens, schedule and score, as the cost counter takes them."""
    visual, text = int(trace.visual[row].sum()), int(trace.text[row].sum())
    after = int(pruner.score_at == "same")
    hidden_only = pruner.execution == "masked" or pruner.every_step
    kept = {
        layer + after: visual if hidden_only else int((own[row] & trace.visual[row]).sum())
        for layer, own in trace.kept.items()
    }
    # A prompt without an image is not scored.
    return {"visual": visual, "text": text, "kept": kept, "score": pruner.scored_by if visual else None}

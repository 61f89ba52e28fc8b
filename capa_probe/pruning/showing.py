"""How pruners, their traces and FFN factors show themselves: in a line, and as a card in a notebook."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from capa_probe.analysis.redundancy import layer_ranges
from capa_probe.display import card, facts, short_path, table, text

if TYPE_CHECKING:
    from capa_probe.pruning.base import Pruner
    from capa_probe.pruning.ffn import HadamardFFN
    from capa_probe.pruning.trace import Trace

#: Fields that are always named.
_ALWAYS = ("layers", "keep")


def describe_pruner(pruner: Pruner) -> str:
    """The method, its layers and budget, and every setting that is not the default."""
    chosen = [f"{name}={value!r}" for name, value in _settings(pruner).items()]
    return f"{type(pruner).__qualname__}({', '.join(chosen)})"


def pruner_html(pruner: Pruner) -> str:
    """What a pruner does, and all of its settings."""
    chosen = _settings(pruner)
    rows = [
        (
            of.name,
            _written(getattr(pruner, of.name)),
            "" if of.name in chosen and not _is_default(pruner, of) else "default",
        )
        for of in fields(pruner)
    ]
    return card(
        type(pruner).__qualname__, text(_sentence(pruner)), table(("setting", "value", ""), rows, "left")
    )


def _written(value: Any) -> str:
    """A setting's value; of FFN factors no more than which layers they are for, since they have a card of their own."""
    layers = getattr(value, "layers", None)
    return repr(value) if layers is None else f"{type(value).__name__} in layers {layer_ranges(layers)}"


def _settings(pruner: Pruner) -> dict[str, Any]:
    return {
        of.name: getattr(pruner, of.name)
        for of in fields(pruner)
        if of.name in _ALWAYS or not _is_default(pruner, of)
    }


def _is_default(pruner: Pruner, of: Any) -> bool:
    value = getattr(pruner, of.name)
    return value is of.default or bool(value == of.default)


def _sentence(pruner: Pruner) -> str:
    if not pruner.layers:
        return "Drops no token."
    where = "after layer {}" if pruner.score_at == "same" else "from layer {} on"
    steps = [f"{_budget(keep)} {where.format(layer)}" for layer, keep in pruner.keeps.items()]
    how = "every decode step sees" if pruner.every_step else "keeps"
    return f"Of the visual tokens of each {pruner.budget}, {how} {', '.join(steps)}."


def _budget(keep: float) -> str:
    return f"{keep:,} tokens" if isinstance(keep, int) and keep > 1 else f"{100 * keep:g} %"


def describe_trace(trace: Trace) -> str:
    """What was kept, in a line."""
    if not trace.prefills:
        return "Trace(no forward has run)"
    kept = ", ".join(f"layer {layer}: {_kept(trace, mask)}" for layer, mask in sorted(trace.kept.items()))
    steps = f", {len(trace.steps)} decode steps" if trace.steps else ""
    return f"Trace({kept or 'nothing was pruned'}{steps})"


def trace_html(trace: Trace) -> str:
    """What was kept, and what every layer saw."""
    parts = [text(describe_trace(trace))]
    if trace.lengths:
        visual, seen = trace.visual_tokens.tolist(), trace.tokens.tolist()
        rows = [
            (layer, length, _joined(seen[layer]), _joined(visual[layer]))
            for layer, length in enumerate(trace.lengths)
        ]
        parts.append(table(("layer", "positions", "tokens seen", "of these visual"), rows))
    return card("Trace of the latest prefill", *parts)


def _kept(trace: Trace, mask: Any) -> str:
    kept, all_of = (mask & trace.visual).sum(dim=1).tolist(), trace.visual.sum(dim=1).tolist()
    return f"{_joined(kept)} of {_joined(all_of)} visual tokens"


def _joined(counts: Sequence[int], most: int = 8) -> str:
    """One number where all samples of a batch agree."""
    if len(set(counts)) == 1:
        return f"{counts[0]:,}"
    return " / ".join(f"{count:,}" for count in counts[:most]) + (" / ..." if len(counts) > most else "")


def hadamard_html(factors: HadamardFFN) -> str:
    """What was fitted on what, and how well, layer by layer."""
    known: Mapping[str, Any] = {
        "replaces": "x + FFN(norm(x)) by " + ("x * alpha" if factors.x == "residual" else "norm(x) * alpha"),
        "fitted on": f"{factors.n_tokens:,} visual tokens of {factors.n_samples:,} samples"
        if factors.n_samples
        else None,
        "model": short_path(str(factors.manifest["model"])) if factors.manifest.get("model") else None,
    }
    rows = [
        (
            layer,
            "unknown" if math.isnan(factors.r2[layer]) else f"{factors.r2[layer]:.4f}",
            f"{alpha.mean():.3f}",
            f"{alpha.std(correction=0):.3f}",
            f"{alpha.min():.3f} to {alpha.max():.3f}",
        )
        for layer, alpha in factors.alpha.items()
    ]
    heads = ("layer", "R²", "mean alpha", "its deviation", "range")
    return card("HadamardFFN", facts(known), table(heads, rows))

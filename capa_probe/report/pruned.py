"""Which visual tokens a pruned answer kept, for examples that ``capa-probe run --json`` was asked about as well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from capa_probe.examples import Example
from capa_probe.report.runs import ShownRun


def kept_tokens(run: ShownRun, example: Example, positions: list[int]) -> list[dict[str, Any]]:
    """Pruned answers to an example's question about its images.

    Args:
        run: the run, with the pruned answers that are known.
        example: the example.
        positions: of its visual tokens.

    Returns:
        For each answer, a ``label`` that no other has, the ``answer`` and, in ``layers``, pairs of the first layer
        that sees no more than these tokens and their indices among ``positions``; deeper layers come later.
    """
    index = {position: number for number, position in enumerate(positions)}
    key = _images_key(run, example.id)
    found: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    for answer in run.answers:
        if not _is_of(answer, key, (example.question, example.prompt)):
            continue
        label = _label(answer["pruner"])
        seen[label] += 1
        found.append(
            {
                "label": label if seen[label] == 1 else f"{label} ({seen[label]})",
                "answer": str(answer["pruned"]["answer"]),
                "layers": [
                    [_first_layer(answer["pruner"], int(layer)), [index[at] for at in kept if at in index]]
                    for layer, kept in sorted(answer["kept"].items(), key=lambda pair: int(pair[0]))
                ],
            }
        )
    return found


def strangers(run: ShownRun, shown: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on pruned answers that belong to none of the examples shown; "" where there are none."""
    asked = [(_images_key(run, each["id"]), (each["question"], each["prompt"])) for each in shown]
    others = sum(not any(_is_of(answer, *each) for each in asked) for answer in run.answers)
    if not others:
        return ""
    which = "One pruned answer" if others == 1 else f"{others} pruned answers"
    return f"{which} of {run.name} cannot be shown: no example has the same question about the same images."


def _images_key(run: ShownRun, sample: str) -> str:
    samples = run.prof.samples
    own = samples.loc[samples["sample"] == sample, "images"]
    return str(own.iloc[0]) if len(own) else ""


def _is_of(answer: Mapping[str, Any], images_key: str, words: Sequence[str]) -> bool:
    if answer["pruned"] is None or not images_key or answer["images_key"] != images_key:
        return False
    return answer["prompt"] in words


def _label(pruner: Mapping[str, Any]) -> str:
    """The method, by what and where it drops tokens, and what it does to FFNs."""
    parts = [str(pruner["method"])]
    layers = pruner["layers"]
    if layers:
        keep = pruner["keep"] if isinstance(pruner["keep"], list) else [pruner["keep"]]
        by = f" by {pruner['score'].replace('_', ' ')}" if pruner.get("score") else ""
        where = "after" if pruner.get("score_at") == "same" else "before"
        many = "s" * (len(layers) > 1)
        parts.append(
            f"keep {' and '.join(map(str, keep))}{by} {where} layer{many} {', '.join(map(str, layers))}"
        )
    if pruner.get("ffn"):
        parts.append("FFN skipped" if pruner["ffn"]["kind"] == "skip" else "FFN by the Hadamard product")
    return ", ".join(parts)


def _first_layer(pruner: Mapping[str, Any], layer: int) -> int:
    """The first layer whose attention sees what was kept."""
    return layer + (pruner.get("score_at") == "same")

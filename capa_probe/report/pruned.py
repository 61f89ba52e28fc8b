"""Which visual tokens a pruned answer kept, for examples that ``capa-probe run --json`` was asked about as well."""

from __future__ import annotations

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
        For each answer, a ``label``, the ``answer`` and, in ``layers``, pairs of the first layer that sees no more
        than these tokens and their indices among ``positions``; deeper layers come later.
    """
    if not run.answers:
        return []
    index = {position: number for number, position in enumerate(positions)}
    return [
        {
            "label": _label(answer["pruner"]),
            "answer": str(answer["pruned"]["answer"]),
            "layers": [
                [_first_layer(answer["pruner"], int(layer)), [index[at] for at in kept if at in index]]
                for layer, kept in sorted(answer["kept"].items(), key=lambda pair: int(pair[0]))
            ],
        }
        for answer in run.answers
        if _is_of(answer, example, _images_key(run, example.id))
    ]


def strangers(run: ShownRun, n_shown: int) -> str:
    """A sentence on pruned answers that belong to none of the examples; "" where there are none."""
    others = len(run.answers) - n_shown
    if not others:
        return ""
    which = "One pruned answer" if others == 1 else f"{others} pruned answers"
    return f"{which} of {run.name} cannot be shown: no example has the same question about the same images."


def _images_key(run: ShownRun, sample: str) -> str:
    samples = run.prof.samples
    own = samples.loc[samples["sample"] == sample, "images"]
    return str(own.iloc[0]) if len(own) else ""


def _is_of(answer: dict[str, Any], example: Example, images_key: str) -> bool:
    if answer["pruned"] is None or not images_key or answer["images_key"] != images_key:
        return False
    return answer["prompt"] in (example.question, example.prompt)


def _label(pruner: dict[str, Any]) -> str:
    keep = pruner["keep"] if isinstance(pruner["keep"], list) else [pruner["keep"]]
    layers = pruner["layers"]
    where = f"before layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
    return f"{pruner['method']}, keep {' and '.join(map(str, keep))} {where}"


def _first_layer(pruner: dict[str, Any], layer: int) -> int:
    """The first layer whose attention sees what was kept."""
    return layer + (pruner.get("score_at") == "same")

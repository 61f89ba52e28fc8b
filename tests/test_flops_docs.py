"""What docs/flops.md says about cost is what the counter says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import estimate_cost
import pytest
from transformers.utils import logging

from capa_probe.flops import CAPA, CONVENTIONS, FASTV, PYRAMIDDROP, Convention, Shape, prefill_cost
from capa_probe.lvlm.families import FAMILIES
from tests.flops_reference import LLAVA_7B, LLAVA_13B, QWEN_7B

PAGE = (Path(__file__).parents[1] / "docs" / "flops.md").read_text(encoding="utf-8")


def rows(start: str) -> list[list[str]]:
    """Cells of the table that a line starts, without its head."""
    lines = PAGE[PAGE.index(start) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_example_runs() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert 0 < namespace["pruned"].ratio(namespace["vanilla"]) < 1


def test_every_option_and_convention_is_explained() -> None:
    options = [cells[0] for cells in rows("| option |")]
    assert re.findall(r"`(\w+)`", " ".join(options)) == [
        field.name for field in dataclasses.fields(Convention)
    ]
    assert [cells[0] for cells in rows("| name | what")] == [f"`{name}`" for name in CONVENTIONS]


def test_savings_of_7b_models_are_those_counted() -> None:
    verbosity = logging.get_verbosity()
    cases = estimate_cost.cases()
    logging.set_verbosity(verbosity)
    found = []
    for case in cases:
        plan = FAMILIES[case.model.config.model_type].schedule
        shape, visual, cells = Shape.of(case.model.config), case.prompt.visual, [case.name]
        for name in ("capa", "fastv", "forward"):
            prompt: dict[str, Any] = {"visual": visual, "text": case.prompt.text, "grids": case.prompt.grids}
            prompt["convention"] = CONVENTIONS[name]
            vanilla = prefill_cost(shape, **prompt)
            pruned = prefill_cost(
                shape,
                **prompt,
                kept={plan.prune_layers[0]: round(visual / 4)},
                hadamard=plan.hadamard_layers,
                score="contribution",
            )
            saved = 100 * (1 - pruned.ratio(vanilla))
            cells.append(f"{saved:.1f} % of {vanilla.total / 1e12:.2f} T")
        found.append(cells)
    assert found == rows("| model | `capa` |")


@pytest.mark.parametrize("place", range(7))
def test_published_numbers_are_those_counted(place: int) -> None:
    def total(shape: Shape, convention: Convention, text: int = 0, **pruning: Any) -> float:
        return float(prefill_cost(shape, visual=576, text=text, convention=convention, **pruning).total)

    qwen = {"kept": {3: 144}, "hadamard": (*range(2, 6), *range(13, 20))}
    counted = [
        f"{total(LLAVA_7B, PYRAMIDDROP) / 1e12:.4f} T",
        f"{total(LLAVA_7B, PYRAMIDDROP, kept={8: 288, 16: 144, 24: 72}) / 1e12:.4f} T",
        f"{total(LLAVA_7B, PYRAMIDDROP, kept={10: 288, 20: 144}) / 1e12:.4f} T",
        f"{total(LLAVA_7B, FASTV, text=36) / 32e9:.1f} G",
        f"{total(LLAVA_13B, FASTV, text=36) / 40e9:.1f} G",
        f"{total(LLAVA_13B, FASTV, text=36, kept={2: 288}) / 40e9:.1f} G",
        f"{100 - 100 * total(QWEN_7B, CAPA, **qwen) / total(QWEN_7B, CAPA):.1f} %",
    ]
    cells = rows("| published |")
    assert len(cells) == len(counted)
    assert cells[place][3] == counted[place]
    # What is printed is what is counted, to as many digits as are printed.
    digits = len(cells[place][2].split()[0].partition(".")[2])
    assert round(float(counted[place].split()[0]), digits) == float(cells[place][2].split()[0])

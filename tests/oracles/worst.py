"""The worst disagreement with each oracle, by column and by hook point: ``python -m tests.oracles.worst`` shows it.

They are those of ``docs/oracles.md``; the models and prompts are those of the tests.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import capa_probe as cp
from capa_probe.lvlm.inputs import LVLMInputs
from capa_probe.probes import PROBES
from capa_probe.schema import LAYER_SCHEMA, MEASURES
from tests import tiny
from tests.oracles import bridge, compare, loops, models
from tests.oracles.prompts import Picture, batch, write

#: One image in the middle, two images and a long question, no image at all.
LAYOUTS: tuple[tuple[int | Picture, ...], ...] = (
    (3, Picture(2, 2), 4),
    (2, Picture(1, 2), 3, Picture(3, 1), 14),
    (6,),
)
STEPS = 2
COLUMNS = tuple(column for probe in PROBES.values() for column in probe.columns)


def profile(
    lvlm: cp.HookedLVLM, inputs: Iterable[LVLMInputs], steps: int = 0, **options: Any
) -> cp.LayerProfile:
    """Every row and every probe."""
    return cp.profile(lvlm, inputs, steps=steps, rows="all", probes="all", progress=False, **options)


def against_loops() -> dict[str, dict[str, float]]:
    """Column to family to the worst disagreement with the loops, over both backends; the layers table as one column."""
    found: dict[str, dict[str, float]] = {}
    for family in tiny.FAMILY_NAMES:
        prompts = [write(family, layout, seed) for seed, layout in enumerate(LAYOUTS)]
        wanted = loops.table(models.build(family, "eager"), family, prompts, STEPS)
        for attn in ("sdpa", "eager"):
            prof = profile(cp.HookedLVLM(models.build(family, attn)), [batch(family, prompts)], STEPS)
            far = compare.worst(prof.tokens, wanted)
            layers = compare.worst(prof.layers, loops.summary(wanted, MEASURES))
            assert set(layers) == set(LAYER_SCHEMA.names)
            far["every column of the layers table"] = max(layers.values())
            _keep(found, family, far)
    return found


def against_bridge() -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Column, and hook point, to family to the worst disagreement with the bridge.

    Of a hook point it is the largest difference as a share of the largest activation.
    """
    columns: dict[str, dict[str, float]] = {}
    points: dict[str, dict[str, float]] = {}
    for family in bridge.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            case = bridge.make(family, Path(folder))
        wanted = bridge.columns(case, steps=1)
        tokens = profile(case.lvlm, [LVLMInputs(case.inputs)], 1).tokens[list(wanted[0])]
        _keep(columns, family, compare.worst(tokens, wanted))
        with torch.no_grad():
            _, cache = case.lvlm.run_with_cache(**case.inputs)
        for ours, theirs in case.names().items():
            expected = case.theirs[theirs]
            far = float((cache[ours] - expected).abs().max() / expected.abs().max())
            _keep(points, family, {ours.split(".", 2)[-1] if ours.startswith("blocks") else ours: far})
    return columns, points


def _keep(found: dict[str, dict[str, float]], family: str, far: Mapping[str, float]) -> None:
    for name, value in far.items():
        own = found.setdefault(name, {})
        own[family] = max(value, own.get(family, 0.0))


def markdown(title: str, found: Mapping[str, Mapping[str, float]], names: Iterable[str]) -> list[str]:
    """A table with one row per name and one column per family; 0 is written out, a missing number as a dash."""
    families = list(next(iter(found.values())))
    lines = [f"| {title} | {' | '.join(families)} |", "|---|" + "---|" * len(families)]
    for name in names:
        numbers = [found[name].get(family) for family in families]
        shown = ["-" if x is None else "equal" if x == 0 else f"{x:.1e}" for x in numbers]
        lines.append(f"| {name if ' ' in name else f'`{name}`'} | {' | '.join(shown)} |")
    return lines


def main() -> None:
    """Write the tables of ``docs/oracles.md``."""
    of_loops, (of_bridge, of_points) = against_loops(), against_bridge()
    lines = markdown("column", of_loops, [*COLUMNS, "every column of the layers table"])
    lines += ["", *markdown("column", of_bridge, COLUMNS)]
    lines += ["", *markdown("hook point", of_points, of_points)]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

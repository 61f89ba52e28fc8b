"""Profiles for the trials of invariance, and what it means that two token tables are the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import capa_probe as cp
from capa_probe.probes.token_table import PLACE_COLUMNS
from capa_probe.schema import TOKEN_SCHEMA
from tests import processors, tiny
from tests.oracles import compare

#: What float32 lets differ, as a share of each number.
TOLERANCE = 1e-5
MEASURED = tuple(name for name in TOKEN_SCHEMA.names if name not in PLACE_COLUMNS)
DIMENSIONS = tuple(name for name in MEASURED if name.startswith("sink_dim"))


def profiled(lvlm: cp.HookedLVLM, samples: Iterable[Any], **options: Any) -> pd.DataFrame:
    """The whole token table: every probe, every row."""
    options = {"probes": "all", "rows": "all", "progress": False, **options}
    return cp.profile(lvlm, samples, **options).tokens


def in_order(tokens: pd.DataFrame) -> pd.DataFrame:
    """Rows by sample id, whatever order the samples came in."""
    return tokens.sort_values(["sample", "step", "layer", "position"], ignore_index=True)


def worst_difference(found: pd.DataFrame, wanted: pd.DataFrame) -> dict[str, float]:
    """Per measured column the largest relative difference of two tables, number by number.

    Cosines and the removal effect are on the scales that ``tests.oracles.compare`` has for them. Asserts on the way
    that the rows are the same ones, and that the same cells hold a value.
    """
    places = list(PLACE_COLUMNS)
    pd.testing.assert_frame_equal(found[places], wanted[places], check_exact=True)
    measured = list(MEASURED)
    return compare.worst(found[measured].astype(float), wanted[measured].astype(float).to_dict("records"))


def assert_same(found: pd.DataFrame, wanted: pd.DataFrame, tolerance: float = TOLERANCE) -> None:
    """Two tables hold the same rows, each value within a tolerance; 0 asks for the same bits."""
    if tolerance == 0:
        pd.testing.assert_frame_equal(found, wanted, check_exact=True)
        return
    worst = worst_difference(found, wanted)
    assert not [name for name in DIMENSIONS if worst[name]]  # the same dimensions, in the same order
    assert max(worst.values()) <= tolerance, worst


def samples() -> list[cp.Sample]:
    """Seven samples with none to three images, of very different length."""
    images = [processors.image(20, 40, 1), processors.image(16, 16, 2), processors.image(40, 24, 3)]
    return [
        cp.Sample("a", images[0], "what is it?"),
        cp.Sample("b", images[1:], "which of the two is darker, and why would anybody want to know?"),
        cp.Sample("c", (), "hello"),
        cp.Sample("d", images[2], "why?"),
        cp.Sample("e", images, "so many, so many: which one, then, would you keep if you had to?"),
        cp.Sample("f", images[1], "and this?"),
        cp.Sample("g", (), "a question with no picture, but with a good many words in it."),
    ]


def wrap(family: str) -> cp.HookedLVLM:
    """The shared tiny model of a family, with its processor."""
    return cp.HookedLVLM(tiny.shared(family), processors.shared(family))


def in_dtype(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs whose pixels are of a model's dtype."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}

"""What is measured on a sample depends on it alone: not on its batch, the padding, the order or the workers."""

from __future__ import annotations

import random
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import capa_probe as cp
from tests import processors, tiny
from tests.invariances.comparing import (
    TOLERANCE,
    assert_same,
    in_dtype,
    in_order,
    profiled,
    samples,
    worst_difference,
    wrap,
)

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)


# -- batches


@FAMILIES
def test_batch_mates_batch_size_and_order(family: str) -> None:
    lvlm, given = wrap(family), samples()
    alone = in_order(profiled(lvlm, given, steps=1))
    for batch_size, seed in ((1, 1), (3, 2), (7, 3)):
        shuffled = random.Random(seed).sample(given, len(given))
        found = profiled(lvlm, shuffled, steps=1, batch_size=batch_size)
        assert list(found["sample"].unique()) == [sample.id for sample in shuffled]
        # One by one, the order makes no difference at all.
        assert_same(in_order(found), alone, 0 if batch_size == 1 else TOLERANCE)


@FAMILIES
def test_what_stands_in_the_rest_of_the_batch_makes_no_difference_at_all(family: str) -> None:
    """Batch mates of the same shape but other words and pixels: the very same bits, prefill and decode."""
    model = tiny.build(family)
    model.generation_config.eos_token_id = None
    lvlm, inputs = cp.HookedLVLM(model), tiny.inputs(family)
    other = tiny.inputs(family, seed=7)
    first = slice(0, 1)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in other:
            other[name][first] = inputs[name][first]
    n_pixels = {"llava": 1, "qwen2_5_vl": 16, "internvl": 1}[family]  # rows of the first image
    other["pixel_values"][:n_pixels] = inputs["pixel_values"][:n_pixels]
    found, wanted = (profiled(lvlm, [batch], steps=2) for batch in (other, inputs))
    own = found["sample"] == "0"
    assert_same(found[own], wanted[own], tolerance=0)
    assert not found[~own].equals(wanted[~own])


# -- padding


def more_padding(inputs: dict[str, Tensor], n: int, side: str, filler: int = tiny.PAD) -> dict[str, Tensor]:
    """A batch with n more padding positions, hidden by the mask, that hold a token of choice."""
    widths = (n, 0) if side == "left" else (0, n)
    fillers = {"input_ids": filler, "attention_mask": 0, "mm_token_type_ids": 0}
    return {
        name: F.pad(x, widths, value=fillers[name]) if name in fillers else x for name, x in inputs.items()
    }


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_side_and_amount(family: str, dtype: torch.dtype) -> None:
    """In float64 all that is left of a difference is that statistics are kept in float32: nothing hides behind it."""
    lvlm = cp.HookedLVLM(tiny.build(family).to(dtype))
    batches = {side: in_dtype(tiny.inputs(family, padding_side=side), dtype) for side in ("left", "right")}
    wanted = profiled(lvlm, [batches["left"]])
    for side, n in (("right", 0), ("left", 33), ("right", 17)):
        found = profiled(lvlm, [more_padding(batches[side], n, side)])
        assert_same(found, wanted, TOLERANCE if dtype == torch.float32 else 1e-6)


@FAMILIES
def test_padding_amount_at_decode_steps(family: str) -> None:
    model = tiny.build(family)
    model.generation_config.eos_token_id = None
    lvlm, inputs = cp.HookedLVLM(model), tiny.inputs(family)
    wanted = profiled(lvlm, [inputs], steps=2)
    assert_same(profiled(lvlm, [more_padding(inputs, 9, "left")], steps=2), wanted)


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_under_the_padding_makes_no_difference_at_all(family: str, side: str) -> None:
    lvlm, inputs = wrap(family), tiny.inputs(family, padding_side=side)
    zeros, words = (more_padding(inputs, 5, side, filler) for filler in (tiny.PAD, 37))
    assert_same(profiled(lvlm, [words]), profiled(lvlm, [zeros]), tolerance=0)


def test_the_comparison_would_see_it() -> None:
    """One more visible token, one lost sample or one other dimension is a difference."""
    lvlm, inputs = wrap("llava"), tiny.inputs("llava")
    wanted = profiled(lvlm, [inputs])
    seen = more_padding(inputs, 0, "left")
    seen["attention_mask"] = seen["attention_mask"].clone()
    first = int(inputs["attention_mask"][0].argmax())
    seen["attention_mask"][0, first] = 0  # the first token of sample 0 is hidden
    found = profiled(lvlm, [seen])
    rows = (found["sample"] == "0").sum()
    with pytest.raises(AssertionError):
        assert_same(found, wanted)
    tail = found[found["sample"] == "0"].groupby("layer").tail(1)
    whole = wanted[wanted["sample"] == "0"].groupby("layer").tail(1)
    assert rows == (wanted["sample"] == "0").sum() - lvlm.n_layers
    assert abs(tail["attention"].to_numpy() - whole["attention"].to_numpy()).max() > 1e-4
    nudged = wanted.assign(contribution=wanted["contribution"] * (1 + 3e-5))
    assert worst_difference(nudged, wanted)["contribution"] > TOLERANCE
    with pytest.raises(AssertionError):
        assert_same(nudged, wanted)


# -- workers


class Prepared(Dataset[dict[str, Tensor]]):
    """Batches of prepared tensors, made in whichever process asks for them."""

    def __init__(self, family: str) -> None:
        self.family = family

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return tiny.inputs(self.family, seed=index)


class Questions(Dataset[cp.Sample]):
    """Samples, with their images drawn in whichever process asks for them."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> cp.Sample:
        return cp.Sample(str(index), processors.image(20, 30 + index, index), "what is it?")


@pytest.mark.parametrize("data", [Prepared("llava"), Questions()], ids=["tensors", "samples"])
def test_the_number_of_worker_processes_makes_no_difference_at_all(data: Any) -> None:
    lvlm, tables, prints = wrap("llava"), [], set()
    for workers in (0, 1, 2):
        loader = DataLoader(data, batch_size=None, num_workers=workers)
        prof = cp.profile(lvlm, loader, batch_size=2, probes="all", progress=False)
        tables.append(prof.tokens)
        prints.add(prof.manifest["data_fingerprint"])
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], check_exact=True)
    assert len(prints) == 1
    assert tables[0]["sample"].nunique() == (15 if isinstance(data, Prepared) else 5)


def test_the_number_of_threads() -> None:
    lvlm, before = wrap("qwen2_5_vl"), torch.get_num_threads()
    try:
        tables = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            tables.append(profiled(lvlm, samples(), batch_size=4))
    finally:
        torch.set_num_threads(before)
    assert_same(tables[1], tables[0])

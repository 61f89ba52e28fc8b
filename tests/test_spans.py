"""Where visual tokens, text and padding lie, from model inputs alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from tests import tiny

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
#: Visual tokens of the first, second and third image that tests/tiny.py puts into a batch.
TOKENS = {"llava": (16, 16, 16), "qwen2_5_vl": (4, 8, 8), "internvl": (4, 12, 20)}
GRIDS = {"llava": [(4, 4)] * 3, "qwen2_5_vl": [(2, 2), (2, 4), (4, 2)], "internvl": [None] * 3}


def wrap(family: str) -> cp.HookedLVLM:
    return cp.HookedLVLM(tiny.shared(family))


@given(
    st.sampled_from(tiny.FAMILY_NAMES),
    st.lists(st.integers(0, 2), min_size=1, max_size=3),
    st.sampled_from(["left", "right"]),
    st.integers(0, 99),
)
@settings(max_examples=30)
def test_every_position_is_of_one_kind_and_every_visual_token_of_one_image(
    family: str, images: list[int], side: str, seed: int
) -> None:
    inputs = tiny.inputs(family, tuple(images), side, seed, tail=(3, 5, 4)[: len(images)])
    spans = wrap(family).spans(inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for b in range(len(images)):
        for p in range(ids.shape[1]):
            kind = "padding" if not mask[b, p] else "visual" if ids[b, p] == tiny.IMAGE else "text"
            found = [name for name in ("visual", "text", "padding") if getattr(spans, name)[b, p]]
            assert found == [kind]
    assert [(span.sample, span.index) for span in spans.images] == [
        (b, i) for b, n in enumerate(images) for i in range(n)
    ]
    claimed = [(span.sample, p) for span in spans.images for p in span.positions.tolist()]
    assert sorted(claimed) == [tuple(place) for place in spans.visual.nonzero().tolist()]


@FAMILIES
def test_grids_as_the_decoder_sees_them(family: str) -> None:
    spans = wrap(family).spans(tiny.inputs(family, (1, 2, 0)))
    assert [len(span) for span in spans.images] == list(TOKENS[family])
    assert [span.grid for span in spans.images] == GRIDS[family]
    for span in spans.images:
        if span.grid is None:  # tiles are in no model tensor
            assert set(span.tile.tolist()) | set(span.row.tolist()) | set(span.col.tolist()) == {-1}
            continue
        rows, cols = span.grid
        wanted = [(r, c) for r in range(rows) for c in range(cols)]
        assert list(zip(span.row.tolist(), span.col.tolist(), strict=True)) == wanted
        assert set(span.tile.tolist()) == {0}


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
def test_last_unpadded_and_after_images(family: str, side: str) -> None:
    inputs = tiny.inputs(family, (1, 2, 0), side)
    spans = wrap(family).spans(inputs)
    mask = inputs["attention_mask"].bool()
    for b in range(3):
        real = mask[b].nonzero().flatten().tolist()
        assert spans.last[b] == real[-1]
        assert spans.unpadded[b, mask[b]].tolist() == list(range(len(real)))
        assert (spans.unpadded[b, ~mask[b]] == -1).all()
        visual = spans.visual[b].nonzero().flatten().tolist()
        after = [p for p in real if visual and p > visual[-1]]
        assert spans.after_images[b].nonzero().flatten().tolist() == after
    places = spans.places()
    assert (places["image"][spans.visual] >= 0).all()
    assert (places["image"][~spans.visual] == -1).all()
    assert places["image"][1][spans.visual[1]].unique().tolist() == [0, 1]


@FAMILIES
def test_a_batch_without_images(family: str) -> None:
    inputs = tiny.inputs(family, (0, 0))
    spans = wrap(family).spans(inputs)
    assert spans.images == ()
    assert not spans.visual.any()
    assert not spans.after_images.any()


def refused(family: str, match: str, **changes: Any) -> None:
    inputs = tiny.inputs(family, (1, 1)) | changes
    with pytest.raises(CapaProbeError, match=match):
        wrap(family).spans({name: value for name, value in inputs.items() if value is not None})


@FAMILIES
def test_what_does_not_fit_is_refused(family: str) -> None:
    inputs = tiny.inputs(family, (1, 1))
    ids = inputs["input_ids"].clone()
    ids[0, ids[0] == tiny.IMAGE] = 7
    refused(family, "visual tokens", input_ids=ids)
    refused(family, r"\d+ visual tokens but no pixel_values", pixel_values=None)
    refused(family, "Inputs without input_ids", input_ids=None)
    refused(family, "all padding", attention_mask=torch.zeros_like(inputs["attention_mask"]))
    refused(family, r"Video input \(pixel_values_videos\)", pixel_values_videos=torch.zeros(1))


def test_qwen_needs_its_grids() -> None:
    refused("qwen2_5_vl", "without image_grid_thw", image_grid_thw=None)
    refused("qwen2_5_vl", "more than one frame", image_grid_thw=torch.tensor([[2, 4, 4], [1, 4, 8]]))


def test_llava_images_that_do_not_fill_a_sample() -> None:
    inputs = tiny.inputs("llava", (1, 1))
    ids = inputs["input_ids"].clone()
    first = ids[0].tolist().index(tiny.IMAGE)
    ids[0, first], ids[1, -1] = 7, tiny.IMAGE  # the right number in all, in the wrong places
    refused("llava", "Sample 0 of the batch holds 15 visual tokens", input_ids=ids)

"""Where visual tokens, text and padding lie, from model inputs alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.families import Tiling
from capa_probe.lvlm.inputs import LVLMInputs
from tests import processors, tiny

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


def test_qwen_images_that_run_over_a_sample() -> None:
    inputs = tiny.inputs("qwen2_5_vl", (1, 1))  # 4 and 8 visual tokens
    swapped = inputs["image_grid_thw"].flip(0)
    refused(
        "qwen2_5_vl", "Sample 0 .* has 4 visual tokens left for an image of 2 x 4", image_grid_thw=swapped
    )


def test_video_is_refused_by_every_name_it_goes_by() -> None:
    grid = torch.tensor([[2, 4, 4]])
    refused("qwen2_5_vl", r"Video input \(video_grid_thw\).*only images", video_grid_thw=grid)


def test_internvl_images_that_do_not_fill_their_tiles() -> None:
    inputs = tiny.inputs("internvl", (1, 1))
    ids = inputs["input_ids"].clone()
    ids[0, ids[0].tolist().index(tiny.IMAGE)] = 7
    ids[1, ids[1].tolist().index(tiny.END)] = tiny.IMAGE  # the right number in all, in the wrong places
    refused("internvl", "Sample 0 .* image of 3 visual tokens, which is no multiple of the 4", input_ids=ids)


def test_a_cls_token_that_llava_keeps_has_no_place() -> None:
    model = tiny.build("llava")
    model.config.vision_feature_select_strategy = "full"
    image = torch.full((17,), tiny.IMAGE)
    ids = torch.cat([torch.tensor([tiny.BOS, 5]), image, torch.tensor([9]), image, torch.tensor([4])])[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 16, 16),
    }
    with torch.no_grad():
        model(**inputs)  # the model itself wants 17 tokens for each image
    for index, span in enumerate(cp.HookedLVLM(model).spans(inputs).images):
        assert span.positions.tolist() == list(range(2 + 18 * index, 19 + 18 * index))
        assert (span.row[0], span.col[0]) == (-1, -1)
        assert span.row[1:].tolist() == [n // 4 for n in range(16)]
        assert span.col[1:].tolist() == [n % 4 for n in range(16)]


TILINGS = (
    Tiling(1, 1, False),
    Tiling(1, 2, True),
    Tiling(2, 2, True),
)  # as tests/tiny.py has 1, 3 and 5 tiles


def test_internvl_tiles_and_thumbnails() -> None:
    inputs = LVLMInputs(tiny.inputs("internvl", (1, 2, 0)))
    inputs.tilings = TILINGS
    spans = wrap("internvl").spans(inputs)
    one, two, three = spans.images
    assert [span.tile_grid for span in spans.images] == [(1, 1), (1, 2), (2, 2)]
    assert one.tile.tolist() == [0] * 4
    assert two.tile.tolist() == [0] * 4 + [1] * 4 + [-1] * 4
    assert three.tile.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [-1] * 4
    for span in spans.images:
        assert span.grid == (2, 2)
        assert span.row.tolist() == [0, 0, 1, 1] * (len(span) // 4)
        assert span.col.tolist() == [0, 1, 0, 1] * (len(span) // 4)
    places = spans.places()
    assert places["tile"][1, three.positions].tolist() == three.tile.tolist()
    assert (places["tile"][2] == -1).all()


@pytest.mark.parametrize("tilings", [TILINGS[:2], (*TILINGS, TILINGS[0]), (TILINGS[2],) * 3])
def test_internvl_tilings_of_another_prompt_give_no_places(tilings: tuple[Tiling, ...]) -> None:
    inputs = LVLMInputs(tiny.inputs("internvl", (1, 2, 0)))
    inputs.tilings = tilings
    for span in wrap("internvl").spans(inputs).images[:2]:
        assert (span.grid, span.tile_grid) == (None, None)
        assert set(span.tile.tolist()) | set(span.row.tolist()) | set(span.col.tolist()) == {-1}


#: Sizes of an image in pixels, and of the part of it that one visual token stands for.
CELLS = {"llava": ((16, 16), 4), "qwen2_5_vl": ((16, 24), 8), "internvl": ((32, 48), 8)}


@FAMILIES
def test_a_visual_token_s_place_is_where_its_pixels_are(family: str) -> None:
    """With the vision tower's attention switched off, lighting up one cell changes the embedding of its token alone."""
    model, (size, cell) = tiny.build(family), CELLS[family]
    with torch.no_grad():
        silenced = [
            parameter.zero_()
            for name, parameter in model.named_parameters()
            if ("vision" in name or "visual" in name)
            and name.endswith(("out_proj.weight", "attn.proj.weight", "projection_layer.weight"))
        ]
    assert len(silenced) == 2  # one for each layer
    lvlm = cp.HookedLVLM(model, processors.shared(family))

    def look(pixels: np.ndarray) -> tuple[torch.Tensor, Any]:
        inputs = lvlm.prepare(Image.fromarray(pixels), "where?")
        with torch.no_grad():
            _, cache = lvlm.run_with_cache(**inputs, names_filter="hook_embed")
        (span,) = lvlm.spans(inputs).images
        return cache["hook_embed"][0], span

    dark, span = look(np.zeros((*size, 3), dtype=np.uint8))
    rows, cols = size[0] // cell, size[1] // cell
    for r in range(rows):
        for c in range(cols):
            pixels = np.zeros((*size, 3), dtype=np.uint8)
            pixels[r * cell : (r + 1) * cell, c * cell : (c + 1) * cell] = 255
            changed = (look(pixels)[0] - dark).abs().amax(-1) > 1e-4
            found = [n for n, p in enumerate(span.positions.tolist()) if changed[p] and span.tile[n] >= 0]
            assert int(changed.sum()) == len(found) + int(changed[span.positions][span.tile < 0].sum())
            (token,) = found
            tile_row, tile_col = divmod(int(span.tile[token]), span.tile_grid[1])
            assert tile_row * span.grid[0] + span.row[token] == r
            assert tile_col * span.grid[1] + span.col[token] == c

"""Regions of images as visual tokens: against what real processors make of painted images, and against the truth."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import CLIPImageProcessor, LlavaProcessor, SiglipImageProcessor

from capa_probe.benchmark.regions import KeepTokens, inside, others, overlaps, patches, region_tokens
from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM
from capa_probe.lvlm.frames import Box
from tests import planted, processors, tiny

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
QUESTION = "what is it?"


@cache
def wrap(family: str) -> HookedLVLM:
    return HookedLVLM(tiny.shared(family), processors.shared(family))


def paint(size: tuple[int, int], *boxes: Box) -> Image.Image:
    """White boxes on black."""
    image = Image.new("RGB", (size[1], size[0]))
    for left, top, right, bottom in boxes:
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill="white")
    return image


def white(lvlm: HookedLVLM, image: Image.Image) -> Tensor:
    """How white the pixels of each visual token are, from 0 to 1: what the processor hands to the model."""
    config, family = lvlm.model.config, lvlm.family.name
    pixels = lvlm.prepare(image, QUESTION)["pixel_values"]
    dark = lvlm.prepare(Image.new("RGB", image.size), QUESTION)["pixel_values"]
    bright = lvlm.prepare(Image.new("RGB", image.size, "white"), QUESTION)["pixel_values"]
    share = ((pixels - dark) / (bright - dark).masked_fill(bright == dark, 1.0)).double()
    if family == "qwen2_5_vl":  # rows are patches, the four of a visual token one after the other
        return share.flatten(1).mean(dim=1).view(-1, 4).mean(dim=1)
    side = config.vision_config.patch_size
    if family == "llava":
        rows, cols = (size // side for size in share.shape[-2:])
        share = share[..., : rows * side, : cols * side]  # the tower's convolution passes over the rest
    else:
        side = 2 * side[0]  # four patches become one token
    blocks = share.mean(dim=1).unfold(1, side, side).unfold(2, side, side)
    return blocks.mean(dim=(-1, -2)).flatten()


def expected(lvlm: HookedLVLM, image: Image.Image, box: Box) -> Tensor:
    """Share of each token's patch that the box covers."""
    (span,) = lvlm.spans(lvlm.prepare(image, QUESTION)).images
    tokens = patches(span, lvlm.family.frame(lvlm.processor, (image.height, image.width)))
    areas = (tokens[:, 2] - tokens[:, 0]) * (tokens[:, 3] - tokens[:, 1])
    return overlaps(tokens, box) / areas


BOXES: tuple[Box, ...] = ((0, 0, 9, 9), (12, 3, 40, 30), (5, 20, 50, 26))
SIZES = ((16, 16), (32, 32), (40, 60), (64, 33), (48, 96), (90, 90))


class TestWhereTokensLook:
    @FAMILIES
    @pytest.mark.parametrize("size", SIZES)
    def test_a_painted_box_is_where_it_is_said_to_be(self, family: str, size: tuple[int, int]) -> None:
        lvlm = wrap(family)
        for left, top, right, bottom in BOXES:
            box = (left, top, min(right, size[1]), min(bottom, size[0]))
            if box[0] >= box[2] or box[1] >= box[3]:
                continue
            image = paint(size, box)
            share = expected(lvlm, image, box)
            # Scaling blurs the border of the box, by up to a pixel or two of the four of a patch's side.
            torch.testing.assert_close(share, white(lvlm, image), atol=0.17, rtol=0)
            assert abs(float(share.mean() - white(lvlm, image).mean())) < 0.02

    @FAMILIES
    def test_it_is_exact_where_nothing_is_scaled(self, family: str) -> None:
        lvlm, size = wrap(family), (16, 16)
        image = paint(size, (3, 1, 11, 13))
        torch.testing.assert_close(
            expected(lvlm, image, (3, 1, 11, 13)), white(lvlm, image), atol=1e-6, rtol=0
        )

    @pytest.mark.parametrize(
        ("options", "size"),
        [
            ({"size": {"height": 18, "width": 18}, "do_center_crop": False}, (18, 18)),  # 2 pixels left over
            ({"size": {"shortest_edge": 24}, "crop_size": {"height": 16, "width": 16}}, (24, 37)),
            ({"do_resize": False, "crop_size": {"height": 16, "width": 16}}, (23, 28)),
            ({"do_resize": False, "crop_size": {"height": 32, "width": 32}}, (23, 28)),  # padded with black
        ],
    )
    def test_crops_and_pads_of_llava(self, options: dict[str, Any], size: tuple[int, int]) -> None:
        shared = processors.shared("llava")
        processor = LlavaProcessor(
            CLIPImageProcessor(**options),
            shared.tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=shared.chat_template,
        )
        lvlm = HookedLVLM(tiny.shared("llava"), processor)
        box = (7, 5, 16, 14)
        image = paint(size, box)
        torch.testing.assert_close(expected(lvlm, image, box), white(lvlm, image), atol=0.02, rtol=0)

    def test_siglip_stretches(self) -> None:
        processor = SiglipImageProcessor(size={"height": 16, "width": 16})
        assert wrap("llava").family.frame(_Named(processor), (32, 48)) == (0, 0, 48, 32)

    def test_padding_of_its_own_is_refused_by_name(self) -> None:
        processor = CLIPImageProcessor(size={"shortest_edge": 16}, do_pad=True)
        with pytest.raises(CapaProbeError, match="CLIPImageProcessor pads images"):
            wrap("llava").family.frame(_Named(processor), (32, 48))

    def test_a_thumbnail_shows_what_the_tiles_show(self) -> None:
        lvlm, size = wrap("internvl"), (16, 48)  # three tiles and a thumbnail, of 2 x 2 tokens each
        (span,) = lvlm.spans(lvlm.prepare(paint(size), QUESTION)).images
        assert span.tile_grid == (1, 3)
        found = region_tokens(
            lvlm, [span], [size], [[(16, 0, 24, 8)]]
        )  # the first quarter of the second tile
        places = [(int(span.tile[t]), int(span.row[t]), int(span.col[t])) for t in found]
        assert places == [(1, 0, 0), (-1, 0, 0)]  # a token of the thumbnail is 24 x 8 pixels

    def test_hand_made_internvl_tensors_are_refused(self) -> None:
        inputs = tiny.inputs("internvl", (1,))
        (span,) = wrap("internvl").spans(inputs).images
        with pytest.raises(CapaProbeError, match=r"not known.*lvlm\.prepare"):
            patches(span, (0, 0, 16, 16))


class _Named:
    """What of a processor is looked at."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor, self.patch_size = image_processor, 4


class TestInside:
    GRID = torch.tensor([[x, y, x + 4.0, y + 4.0] for y in (0, 4, 8) for x in (0, 4, 8)])

    def found(self, *boxes: Box) -> list[int]:
        return inside(self.GRID, boxes).nonzero().flatten().tolist()

    def test_whole_tokens(self) -> None:
        assert self.found((4, 0, 12, 4)) == [1, 2]
        assert self.found((0, 0, 4, 4), (8, 8, 12, 12)) == [0, 8]
        assert self.found() == []

    def test_a_sliver_does_not_count(self) -> None:
        assert self.found((4, 0, 8.3, 4)) == [1]  # 1.2 of 16 pixels
        assert self.found((4, 0, 8.5, 4)) == [1, 2]  # 2 of 16

    def test_a_box_within_a_token(self) -> None:
        assert self.found((5, 5, 6, 6)) == [4]

    def test_a_line_across_all(self) -> None:
        line = torch.tensor([[x, 0.0, x + 4.0, 4.0] for x in range(0, 80, 4)])
        assert inside(line, [(0, 1, 80, 1.2)]).all()

    def test_beside_the_image(self) -> None:
        assert self.found((20, 0, 30, 4)) == []

    def test_a_token_without_a_place(self) -> None:
        tokens = torch.cat([torch.full((1, 4), torch.nan), self.GRID])
        assert inside(tokens, [(0, 0, 4, 4)]).nonzero().flatten().tolist() == [1]


class TestOthers:
    def test_as_many_and_none_of_them(self) -> None:
        drawn = others([2, 3, 5], 12, np.random.default_rng(0))
        assert len(set(drawn)) == 3
        assert not {2, 3, 5} & set(drawn)
        assert drawn == others([2, 3, 5], 12, np.random.default_rng(0))
        assert drawn != others([2, 3, 5], 12, np.random.default_rng(1))

    def test_where_there_are_fewer(self) -> None:
        assert others([0, 1, 2], 5, np.random.default_rng(0)) == [3, 4]


class TestKeepTokens:
    @FAMILIES
    @pytest.mark.parametrize("padding_side", ["left", "right"])
    def test_what_is_named_stays(self, family: str, padding_side: str) -> None:
        lvlm, inputs = wrap(family), tiny.inputs(family, (1, 2), padding_side)
        visual = lvlm.spans(inputs).visual
        named = ((0, 3), (1, 2, 7))
        with KeepTokens(layers=(0,), tokens=named).attach(lvlm) as trace:
            lvlm.model(**inputs)
        for row, own in enumerate(named):
            places = visual[row].nonzero().flatten()
            assert (trace.kept[0][row] & visual[row]).nonzero().flatten().tolist() == places[
                list(own)
            ].tolist()
            text = ~visual[row] & inputs["attention_mask"][row].bool()
            assert trace.kept[0][row][text].all()

    def test_all_is_the_model_itself(self) -> None:
        lvlm, inputs = wrap("llava"), tiny.inputs("llava", (1, 1), tail=(4, 4))
        whole = lvlm.model(**inputs).logits[:, -1]
        with KeepTokens(layers=(2,), tokens=(tuple(range(16)),) * 2).attach(lvlm):
            torch.testing.assert_close(lvlm.model(**inputs).logits[:, -1], whole)
        with KeepTokens(layers=(2,), tokens=((), ())).attach(lvlm):
            assert not torch.allclose(lvlm.model(**inputs).logits[:, -1], whole)

    def test_bad_input(self) -> None:
        lvlm, inputs = wrap("llava"), tiny.inputs("llava", (1, 1))
        with (
            KeepTokens(layers=(1,), tokens=((0,),)).attach(lvlm),
            pytest.raises(CapaProbeError, match="1 prompts, but the batch holds 2"),
        ):
            lvlm.model(**inputs)
        with (
            KeepTokens(layers=(1,), tokens=((0,), (16,))).attach(lvlm),
            pytest.raises(CapaProbeError, match="16 visual tokens of row 1"),
        ):
            lvlm.model(**inputs)


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_removing_the_regions_of_the_answer_removes_the_answer(family: str) -> None:
    """Boxes of the anchors' pixels, and the planted truth of what goes when anchors go."""
    truth = planted.plant(family)
    lvlm = HookedLVLM(truth.model, truth.processor)
    side = 8
    for sample in truth.samples:
        images = sample.open_images()
        boxes: list[list[Box]] = [[] for _ in images]
        for (image, row, col), kind in truth.kinds[sample.id].items():
            if kind in ("anchor", "switch"):
                boxes[image].append((col * side, row * side, (col + 1) * side, (row + 1) * side))
        inputs = lvlm.prepare([images], [sample.question])
        spans = lvlm.spans(inputs)
        tokens = region_tokens(lvlm, spans.images, [(i.height, i.width) for i in images], boxes)
        mask = truth.mask(spans, [sample], ("anchor", "switch"))[0]
        assert spans.visual[0].nonzero().flatten()[tokens].tolist() == mask.nonzero().flatten().tolist()
        n = int(spans.visual.sum())
        rest = tuple(token for token in range(n) if token not in tokens)
        without = others(tokens, n, np.random.default_rng(0))
        for kept, is_answer in ((rest, False), (tuple(t for t in range(n) if t not in without), True)):
            with KeepTokens(layers=(0,), tokens=(kept,)).attach(lvlm):
                logits = lvlm.model(**inputs).logits[0, -1]
            said = lvlm.processor.tokenizer.convert_ids_to_tokens(int(logits.argmax()))
            assert said == (truth.answers[sample.id] if is_answer else truth.without_answer)

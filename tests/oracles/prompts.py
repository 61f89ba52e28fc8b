"""Batches of prompts for the tiny models, laid out as a test asks, and beside them where every token is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capa_probe.lvlm.families import Tiling
from capa_probe.lvlm.inputs import LVLMInputs
from tests import tiny


@dataclass(frozen=True)
class Picture:
    """An image of rows x cols visual tokens (Qwen2.5-VL) or tiles (InternVL); LLaVA's are always 4 x 4 tokens."""

    rows: int = 2
    cols: int = 2


#: One prompt: numbers of words and pictures, in order.
Layout = Sequence[int | Picture]
#: Where a token is: kind, image, tile, row, col.
Place = tuple[str, int, int, int, int]
TEXT: Place = ("text", -1, -1, -1, -1)
TILE_SIDE = 2  # visual tokens per side of a tile of the tiny InternVL


@dataclass(frozen=True)
class Prompt:
    """One prompt without padding.

    Attributes:
        ids: its tokens.
        places: where each of them is.
        pixels: what the vision tower gets for each image.
        layout: rows and columns of each image, as given.
    """

    ids: list[int]
    places: list[Place]
    pixels: list[Tensor]
    layout: list[Picture]


def write(family: str, layout: Layout, seed: int = 0, bare: bool = False) -> Prompt:
    """A prompt with random words and noise for images.

    Args:
        family: of the model.
        layout: words and images in order.
        seed: of words and noise.
        bare: leave out the tokens that the family puts around an image, so that it can stand first or last.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt = Prompt([], [], [], [])
    for part in layout:
        if isinstance(part, int):
            prompt.ids.extend((3 + torch.randperm(56, generator=generator)[:part]).tolist())
            prompt.places.extend([TEXT] * part)
            continue
        index, framed = len(prompt.pixels), family != "llava" and not bare
        places, shape = _picture(family, part, index)
        prompt.ids.extend([tiny.START] * framed + [tiny.IMAGE] * len(places) + [tiny.END] * framed)
        prompt.places.extend([TEXT] * framed + places + [TEXT] * framed)
        prompt.pixels.append(torch.randn(shape, generator=generator))
        prompt.layout.append(part)
    return prompt


def batch(family: str, prompts: Sequence[Prompt], padding_side: str = "left") -> LVLMInputs:
    """The tensors of several prompts, padded to the length of the longest."""
    length = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), length), tiny.PAD)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        n = len(prompt.ids)
        where = slice(length - n, None) if padding_side == "left" else slice(0, n)
        ids[b, where], mask[b, where] = torch.tensor(prompt.ids), 1
    tensors: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    pixels = [own for prompt in prompts for own in prompt.pixels]
    layouts = [own for prompt in prompts for own in prompt.layout]
    if pixels:
        tensors["pixel_values"] = torch.cat(pixels)
    if family == "qwen2_5_vl":
        tensors["mm_token_type_ids"] = (ids == tiny.IMAGE).int()
        if pixels:
            tensors["image_grid_thw"] = torch.tensor([[1, 2 * own.rows, 2 * own.cols] for own in layouts])
    inputs = LVLMInputs(tensors)
    if family == "internvl" and pixels:
        inputs.tilings = tuple(Tiling(own.rows, own.cols, own.rows * own.cols > 1) for own in layouts)
    return inputs


def _picture(family: str, picture: Picture, index: int) -> tuple[list[Place], tuple[int, ...]]:
    """Places of the visual tokens of one image, and the shape of what the vision tower gets."""
    rows, cols, tiles, shape = picture.rows, picture.cols, [0], (1, 3, 16, 16)
    if family == "llava":
        rows = cols = 4
    elif family == "qwen2_5_vl":
        shape = (4 * rows * cols, 3 * 2 * 4 * 4)
    else:
        tiles = [*range(rows * cols), *([-1] if rows * cols > 1 else [])]  # a thumbnail comes last
        rows = cols = TILE_SIDE
        shape = (len(tiles), 3, 16, 16)
    places = [
        ("visual", index, tile, row, col) for tile in tiles for row in range(rows) for col in range(cols)
    ]
    return places, shape

"""Images whose pixels say what each visual token is, and vision weights that hand it on unchanged.

A block of 8 x 8 pixels is one visual token: 192 bits, since each channel is 0 or 255. The first ones say its kind and
the answer that it bears, then two copies of its content, which cancel for tokens without it; the rest is noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from capa_probe import Sample
from tests import planted_weights as weights
from tests.planted_weights import D_MODEL, KINDS, N_ANSWERS, Layout

SIDE, N_BITS, N_CONTENT = 8, 3 * 8 * 8, 24  # pixels of a block's side, its bits, and content bits per group
#: Blocks of each kind in one image; the rest are plain.
PER_IMAGE = {"dump": 2, "anchor": 2, "switch": 1, "unread": 1, "bright": 1, "tall": 2}
ANSWERS = "abcdefgh"
#: Sample id to the kind of token at (image, row, col).
Kinds = dict[str, dict[tuple[int, int, int], str]]


def write_vision(family: str, model: PreTrainedModel, layout: Layout, generator: torch.Generator) -> None:
    """A linear path: blocks of the tower add nothing, and each pixel that is -1 or 1 comes with its negative.

    A patch then has mean 0 and mean square 1, so that the norms on the way change nothing.
    """
    bits = torch.arange(N_BITS).view(3, SIDE, SIDE)
    if family == "llava":
        patch = model.model.vision_tower.embeddings.patch_embedding.weight
        pixels = torch.eye(N_BITS).view(-1, 3, SIDE, SIDE)
        patch.copy_(torch.cat([pixels, -pixels]))
        places = bits.flatten()
        projector = model.model.multi_modal_projector
        first, second = projector.linear_1, projector.linear_2
    else:
        patch = model.model.visual.patch_embed.proj.weight
        n, half = len(patch) // 2, SIDE // 2
        pixels = (
            torch.eye(n).view(n, 3, 1, half, half).expand(-1, -1, 2, -1, -1) / 2
        )  # mean of two equal frames
        patch.copy_(torch.cat([pixels, -pixels]))
        # The merger lays four patches side by side, row by row, each with its negatives.
        y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        places = (
            (y // half * 2 + x // half) * 2 * n
            + torch.arange(3)[:, None, None] * half * half
            + y % half * half
            + x % half
        ).flatten()
        first, second = model.model.visual.merger.mlp[0], model.model.visual.merger.mlp[2]
    weights.write_linear_path(first, second, places, *_code(layout, generator))


def _code(layout: Layout, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight (d_model, bit) and bias (d_model,) that turn the -1 and 1 of a token's bits into its embedding."""
    weight, bias = (
        torch.zeros(D_MODEL, N_BITS, dtype=torch.float64),
        torch.zeros(D_MODEL, dtype=torch.float64),
    )
    of_kind = layout.of_kind()
    plain, tall = of_kind[0], of_kind[KINDS.index("tall")]
    bias[[layout.visual, layout.offset]] = plain[[layout.visual, layout.offset]]
    switches = [*layout.kinds.values(), *layout.payload]
    for bit, channel in enumerate(switches):
        weight[channel, bit] = bias[channel] = weights.FLAG / 2
    weight[layout.tall, KINDS.index("tall")] = bias[layout.tall] = tall[layout.tall] / 2
    start = len(switches)
    for channels in layout.content:
        sign = 2.0 * torch.randint(2, channels.shape, generator=generator) - 1
        bit = start + torch.randint(N_CONTENT, channels.shape, generator=generator)
        for other in (0, N_CONTENT):  # two bits that agree, or cancel
            weight[channels, bit + other] = sign * plain[channels] / 2
        start += 2 * N_CONTENT
    return weight, bias


def _block(kind: str, answer: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """The pixels of one token: (y, x, channel), 0 or 255; bits beyond the code are noise that nothing reads."""
    bits = rng.integers(2, size=N_BITS).astype(bool)
    bits[: len(KINDS) + N_ANSWERS + 1] = False
    bits[KINDS.index(kind)] = True
    bits[len(KINDS) + (answer if kind == "anchor" else N_ANSWERS)] = True
    start = len(KINDS) + N_ANSWERS + 1
    for lacking in (kind in weights.SINKS, kind in weights.SINKS or kind == "tall"):
        first = bits[start : start + N_CONTENT]
        bits[start + N_CONTENT : start + 2 * N_CONTENT] = ~first if lacking else first
        start += 2 * N_CONTENT
    return (bits.reshape(3, SIDE, SIDE).transpose(1, 2, 0) * 255).astype(np.uint8)


def image(
    rows: int, cols: int, answer: int, rng: np.random.Generator, blocks_of: Mapping[str, int] = PER_IMAGE
) -> tuple[Image.Image, list[str]]:
    """An image of rows x cols blocks, so many of each kind and the rest plain, and the kind of each, row by row."""
    kinds = [kind for kind, n in blocks_of.items() for _ in range(n)]
    kinds = rng.permutation(kinds + ["plain"] * (rows * cols - len(kinds))).tolist()
    blocks = np.stack([_block(kind, answer, rng) for kind in kinds])
    pixels = blocks.reshape(rows, cols, SIDE, SIDE, 3).swapaxes(1, 2).reshape(rows * SIDE, cols * SIDE, 3)
    return Image.fromarray(pixels), kinds


def make_samples(family: str, rng: np.random.Generator) -> tuple[tuple[Sample, ...], Kinds, dict[str, str]]:
    """Four samples, one of them of two images; with each the kinds of its tokens and the answer on its anchors."""
    square = [(6, 6)]
    # Qwen2.5-VL takes any shape.
    shapes = (
        [square, square, square * 2, square]
        if family == "llava"
        else [square, [(4, 9)], [(6, 6), (7, 5)], [(5, 8)]]
    )
    questions = ("what is it?", "and what letter is this one, please?", "which?", "what letter do you see")
    letters = rng.permutation(N_ANSWERS).tolist()
    samples, kinds, answers = [], {}, {}
    for number, (grids, question) in enumerate(zip(shapes, questions, strict=True)):
        name, answer = f"planted-{number}", letters[number]
        made = [image(rows, cols, answer, rng) for rows, cols in grids]
        samples.append(Sample(name, [picture for picture, _ in made], question, ANSWERS[answer]))
        kinds[name] = {
            (index, place // grids[index][1], place % grids[index][1]): kind
            for index, (_, of_image) in enumerate(made)
            for place, kind in enumerate(of_image)
        }
        answers[name] = ANSWERS[answer]
    return tuple(samples), kinds, answers

"""Qwen2.5-VL: windowed vision attention, 2 x 2 merging, a grid of its own for every image, M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.vision_utils import get_vision_window_index

from capa_probe.demo.worlds import World
from demo_training.families.base import DemoFamily, Layout, Sizes, reading_order
from demo_training.families.bpe import END, PAD, START, build_bpe

_MEDIA = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PATCH, MERGE = 8, 2
#: Pixels per side of a visual token, and of a window of the tower: 4 x 4 of them.
TOKEN = PATCH * MERGE
WINDOW = 4 * TOKEN
#: Visual tokens of an image, at least and at most.
FEWEST, MOST = 60, 250

_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Qwen25VL(DemoFamily):
    """60 to 250 visual tokens, as the image has it."""

    name = "qwen2.5-vl"
    folder = "demo-qwen2.5-vl"
    model_class = Qwen2_5_VLForConditionalGeneration
    opening = f"{START}system\nYou are a helpful assistant.{END}\n{START}user\n<|vision_start|>"
    closing = "<|vision_end|>"
    ask = f"{END}\n{START}assistant\n"
    three_positions = True
    prompt_form = (
        "The prompt form is that of Qwen2.5-VL, default system message included; the chat template writes it."
    )

    def tokenizer(self, world: World) -> Qwen2Tokenizer:
        """Qwen2's, a token for each word."""
        return build_bpe(world, _MEDIA, {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"})

    def processor(self, world: World) -> Qwen2_5_VLProcessor:
        """Dynamic grids, with the family's options."""
        patches: dict[str, Any] = {
            "patch_size": PATCH,
            "merge_size": MERGE,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": FEWEST * TOKEN**2, "longest_edge": MOST * TOKEN**2},
        }
        return Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(**patches),
            self.tokenizer(world),
            Qwen2VLVideoProcessor(**patches),
            chat_template=_TEMPLATE,
        )

    def config(self, sizes: Sizes, world: World) -> Qwen2_5_VLConfig:
        """Of the whole model; the decoder has a bias on q, k and v, and grouped KV heads."""
        tokenizer = self.tokenizer(world)
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*_MEDIA, PAD, END)}
        # Of the frequencies, as in the real ones: a quarter for time, the rest halved between height and width.
        quarter = sizes.d_model // sizes.heads // 8
        sides = (sizes.d_model // sizes.heads // 2 - quarter) // 2
        return Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": sizes.d_model,
                "intermediate_size": sizes.d_mlp,
                "num_hidden_layers": sizes.layers,
                "num_attention_heads": sizes.heads,
                "num_key_value_heads": sizes.kv_heads,
                "max_position_embeddings": 512,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [quarter, sides, sides],
                },
                "pad_token_id": ids[PAD],
                "bos_token_id": None,
                "eos_token_id": ids[END],
            },
            vision_config={
                "depth": sizes.vision_layers,
                "hidden_size": sizes.d_vision,
                "intermediate_size": 2 * sizes.d_vision,
                "num_heads": 4,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": 2,
                "window_size": WINDOW,
                "fullatt_block_indexes": [sizes.vision_layers - 1],
                "out_hidden_size": sizes.d_model,
                "in_channels": 3,
            },
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=False,
        )

    def tower(self, model: PreTrainedModel) -> nn.Module:
        """All but the merger."""
        visual = model.model.visual
        return nn.ModuleDict({"patch_embed": visual.patch_embed, "blocks": visual.blocks})

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """The merger."""
        return model.model.visual.merger

    def features(self, model: PreTrainedModel, images: Mapping[str, Tensor]) -> Tensor:
        """The four patches of every visual token side by side, back in reading order from that of the windows."""
        visual, grids = model.model.visual, images["image_grid_thw"]
        found = visual(images["pixel_values"], grid_thw=grids).last_hidden_state
        order, _ = get_vision_window_index(
            grids,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        return found.view(len(order), -1)[order.argsort().to(found.device)]

    def project(self, model: PreTrainedModel, features: Tensor) -> Tensor:
        """The merger takes patches, four for each visual token."""
        return self.projector(model)(features.reshape(MERGE**2 * len(features), -1))

    def layout(self, shape: tuple[int, int], world: World) -> Layout:
        """A grid as large as the image, which its processor leaves as it is."""
        height, width = shape
        rows, cols = height // TOKEN, width // TOKEN
        if (height % TOKEN, width % TOKEN) != (0, 0) or not FEWEST <= rows * cols <= MOST:
            raise ValueError(
                f"an image of {height} x {width} pixels was given; give sides that are multiples of {TOKEN} and an "
                f"area of {FEWEST} to {MOST} visual tokens, so that it is not resized"
            )
        row, col = np.divmod(np.arange(rows * cols), cols)
        return Layout((reading_order(rows, cols),), np.stack([0 * row, row, col]), max(rows, cols))

    def describe(self, sizes: Sizes, world: World) -> str:
        """The tower and the images."""
        return (
            f"its vision tower ({sizes.d_vision} wide, {sizes.vision_layers} layers, {PATCH}-pixel patches; attention "
            f"in windows of {WINDOW} x {WINDOW} pixels, over the whole image in the last layer), a merger that makes "
            f"one visual token of 2 x 2 patches ({FEWEST}-{MOST} for an image) and a decoder with M-RoPE"
        )

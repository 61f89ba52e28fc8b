"""InternVL: square tiles and a thumbnail, pixel shuffle, a Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Tokenizer,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from capa_probe.demo.worlds import World
from demo_training.families.base import DemoFamily, Grid, Layout, Sizes, one_after_the_other, reading_order
from demo_training.families.bpe import END, START, build_bpe

_MEDIA = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
_NAMED = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}
PATCH, TILE, MOST_TILES = 8, 96, 4
#: Visual tokens per side of a tile, after 2 x 2 patches are merged.
SIDE = TILE // PATCH // 2

_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class InternVL(DemoFamily):
    """36 visual tokens for each of one to four tiles, and for the thumbnail where there are several."""

    name = "internvl"
    folder = "demo-internvl"
    model_class = InternVLForConditionalGeneration
    opening = f"{START}user\n<img>"
    closing = "</img>\n"
    ask = f"{END}\n{START}assistant\n"
    has_untold = True
    prompt_form = "The prompt form is that of InternVL3; the chat template writes it."

    def tokenizer(self, world: World) -> Qwen2Tokenizer:
        """Qwen2's, a token for each word."""
        return build_bpe(world, _MEDIA, _NAMED)

    def processor(self, world: World) -> InternVLProcessor:
        """Tiles of 96 pixels."""
        size = {"height": TILE, "width": TILE}
        return InternVLProcessor(
            # Checkpoints leave crop_to_patches at False here; InternVLProcessor turns it on.
            GotOcr2ImageProcessor(size=size, crop_to_patches=False, min_patches=1, max_patches=MOST_TILES),
            self.tokenizer(world),
            InternVLVideoProcessor(size=size),
            image_seq_length=SIDE**2,
            chat_template=_TEMPLATE,
        )

    def config(self, sizes: Sizes, world: World) -> InternVLConfig:
        """Of the whole model; the decoder has a bias on q, k and v, and grouped KV heads."""
        tokenizer = self.tokenizer(world)
        return InternVLConfig(
            vision_config=InternVLVisionConfig(
                hidden_size=sizes.d_vision,
                intermediate_size=4 * sizes.d_vision,
                num_hidden_layers=sizes.vision_layers,
                num_attention_heads=4,
                attention_bias=True,
                image_size=[TILE, TILE],
                patch_size=[PATCH, PATCH],
                layer_scale_init_value=1.0,
            ),
            text_config=Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=sizes.d_model,
                intermediate_size=sizes.d_mlp,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.heads,
                num_key_value_heads=sizes.kv_heads,
                max_position_embeddings=512,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                tie_word_embeddings=False,
            ),
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=SIDE**2,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
        )

    def tower(self, model: PreTrainedModel) -> nn.Module:
        """InternViT."""
        return model.model.vision_tower

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Norm and two layers."""
        return model.model.multi_modal_projector

    def images(self, processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Tiles and thumbnails of all images, one after the other."""
        made = processor.image_processor(list(images), return_tensors="pt", **processor.images_kwargs)
        return {"pixel_values": made["pixel_values"]}

    def features(self, model: PreTrainedModel, images: Mapping[str, Tensor]) -> Tensor:
        """The four patches of every visual token side by side, as pixel shuffle lines them up."""
        inner = model.model
        found = inner.vision_tower(pixel_values=images["pixel_values"]).last_hidden_state[:, 1:]
        side = round(found.shape[1] ** 0.5)
        shuffled = inner.pixel_shuffle(
            found.reshape(len(found), side, side, -1), scale_factor=inner.config.downsample_ratio
        )
        return shuffled.flatten(0, 2)

    def layout(self, shape: tuple[int, int], world: World) -> Layout:
        """Tiles in reading order, each with its tokens in reading order, then the thumbnail."""
        cols, rows = get_optimal_tiled_canvas(shape, (TILE, TILE), 1, MOST_TILES)
        places = np.arange(rows * cols * SIDE**2).reshape(rows, SIDE, cols, SIDE).swapaxes(1, 2)
        tiles = Grid(rows * SIDE, cols * SIDE, tuple(places.flatten().tolist()))
        if rows * cols == 1:
            return one_after_the_other(tiles)
        whole = reading_order(SIDE, SIDE)
        return one_after_the_other(tiles, Grid(whole.rows, whole.cols, whole.order, told=False))

    def describe(self, sizes: Sizes, world: World) -> str:
        """The tower and the images."""
        return (
            f"its vision tower ({sizes.d_vision} wide, {sizes.vision_layers} layers, {PATCH}-pixel patches) over "
            f"tiles of {TILE} x {TILE} pixels, one to {MOST_TILES} for an image and then a thumbnail of all of it, "
            f"pixel shuffle and a two-layer projector ({SIDE**2} visual tokens for each tile and for the thumbnail) "
            "and a Qwen2 decoder"
        )

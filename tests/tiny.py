"""Tiny random models of all three families, built from configs, and inputs for them without a processor."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)

FAMILY_NAMES = ("llava", "qwen2_5_vl", "internvl")
IMAGE, PAD, BOS, START, END = 60, 0, 1, 61, 62
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": 2,
}


def build(family: str, seed: int = 0, attn: str = "sdpa", **text: Any) -> PreTrainedModel:
    """A random model in float32, eval mode; ``text`` overrides the decoder's sizes."""
    torch.manual_seed(seed)
    sizes = {**TEXT, **text}
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        config: Any = LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**sizes), image_token_id=IMAGE, image_seq_length=16
        )
        cls: Any = LlavaForConditionalGeneration
    elif family == "qwen2_5_vl":
        config = Qwen2_5_VLConfig(
            text_config={"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}, **sizes},
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "window_size": 16,
                "fullatt_block_indexes": [1],
                "out_hidden_size": sizes["hidden_size"],
                "temporal_patch_size": 2,
                "in_channels": 3,
            },
            image_token_id=IMAGE,
            video_token_id=63,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )
        cls = Qwen2_5_VLForConditionalGeneration
    else:
        vision = InternVLVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[16, 16],
            patch_size=[4, 4],
        )
        config = InternVLConfig(
            vision_config=vision, text_config=Qwen2Config(**sizes), image_token_id=IMAGE, image_seq_length=4
        )
        cls = InternVLForConditionalGeneration
    config._attn_implementation = attn
    model = cls(config).eval()
    with torch.no_grad():  # default initialisation is so small that attention is uniform
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "layers" in name:
                parameter.mul_(6.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.generation_config.pad_token_id = PAD
    return model


@cache
def shared(family: str, attn: str = "sdpa") -> PreTrainedModel:
    """One model per family for tests that do not change it."""
    return build(family, attn=attn)


# Per family: images that one sample may hold, as (tokens, what the tensors need).
GRIDS = ((4, 4), (4, 8), (8, 4))  # Qwen2.5-VL patches before merging


def inputs(
    family: str,
    images: tuple[int, ...] = (1, 2, 0),
    padding_side: str = "left",
    seed: int = 0,
    tail: tuple[int, ...] = (3, 5, 4),
) -> dict[str, torch.Tensor]:
    """A batch with ``images[b]`` images and ``tail[b]`` closing text tokens in sample b, padded to one length."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(3, 59, (n,), generator=generator).tolist()

    rows: list[list[int]] = []
    extra: dict[str, list[torch.Tensor]] = {"pixel_values": [], "image_grid_thw": []}
    count = 0
    for n_images, n_tail in zip(images, tail, strict=False):
        row = [BOS, *words(2)]
        for _ in range(n_images):
            if family == "llava":
                n_tokens = 16
                extra["pixel_values"].append(torch.randn(1, 3, 16, 16, generator=generator))
                row += [IMAGE] * n_tokens
            elif family == "qwen2_5_vl":
                h, w = GRIDS[count % len(GRIDS)]
                extra["image_grid_thw"].append(torch.tensor([[1, h, w]]))
                extra["pixel_values"].append(torch.randn(h * w, 3 * 2 * 4 * 4, generator=generator))
                row += [START] + [IMAGE] * (h * w // 4) + [END]
            else:
                tiles = (1, 3, 5)[count % 3]
                extra["pixel_values"].append(torch.randn(tiles, 3, 16, 16, generator=generator))
                row += [START] + [IMAGE] * (4 * tiles) + [END]
            row += words(1)
            count += 1
        rows.append(row + words(n_tail))
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
    for b, row in enumerate(rows):
        where = slice(length - len(row), None) if padding_side == "left" else slice(0, len(row))
        ids[b, where], mask[b, where] = torch.tensor(row), 1
    batch = {"input_ids": ids, "attention_mask": mask}
    batch.update({name: torch.cat(parts) for name, parts in extra.items() if parts})
    if family == "qwen2_5_vl":
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    return batch

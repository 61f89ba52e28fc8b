"""Models of 7B width with few layers and random weights, and prompts for them; no checkpoint and no processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
)
from transformers.initialization import no_init_weights

from capa_probe.pruning.capa import schedule

#: Patches per side of LLaVA's images here. Real ones have 24, which does not make 2,048 visual tokens.
_SIDE = 8
_TINY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 512}


@dataclass(frozen=True)
class Width:
    """A published decoder's sizes, with a vision tower of one narrow block.

    Attributes:
        paper: what the paper's schedule calls it.
        text: sizes of the decoder; those of its config.
        n_layers: decoder layers that it really has.
    """

    paper: str
    text: dict[str, int]
    n_layers: int

    def plan(self, n_layers: int) -> tuple[int, tuple[int, ...]]:
        """The paper's early pruning layer and Hadamard layers, in proportion on fewer layers.

        A layer stands for the one at its middle; with all layers, the schedule is the paper's own.
        """
        full = schedule(self.paper)
        prune = max(1, round(full.prune_layers[0] * n_layers / self.n_layers))
        middle = [int((layer + 0.5) * self.n_layers / n_layers) for layer in range(n_layers)]
        return prune, tuple(layer for layer, at in enumerate(middle) if at in full.hadamard_layers)

    def build(
        self, n_layers: int, dtype: torch.dtype, device: str, seed: int = 0, tiny: bool = False
    ) -> PreTrainedModel:
        """The model, in evaluation mode.

        With fewer layers its vocabulary is smaller in proportion, so that the output head's share of the time stays
        what it is in the whole model.
        """
        sizes = {**self.text, "num_hidden_layers": n_layers, **(_TINY if tiny else {})}
        sizes["vocab_size"] = max(512, sizes["vocab_size"] * n_layers // self.n_layers)
        if tiny:
            sizes["num_key_value_heads"] = 2 if self.text["num_key_value_heads"] < 8 else 4
        config = self._config(sizes, image=sizes["vocab_size"] - 1)
        with torch.device(device), no_init_weights():
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        return fill(model, seed).eval()

    def _config(self, sizes: dict[str, int], image: int) -> Any:
        if self.paper == "llava-1.5-7b":
            vision = CLIPVisionConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=14 * _SIDE,
                patch_size=14,
            )
            text = LlamaConfig(**sizes, max_position_embeddings=4096, pad_token_id=0)
            return LlavaConfig(
                vision_config=vision, text_config=text, image_token_id=image, vision_feature_layer=-1
            )
        return Qwen2_5_VLConfig(
            text_config={
                **sizes,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": _mrope(sizes),
                },
            },
            vision_config={
                "depth": 1,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 2,
                "out_hidden_size": sizes["hidden_size"],
                "fullatt_block_indexes": [],
            },
            image_token_id=image,
            video_token_id=image - 1,
            vision_start_token_id=image - 2,
            vision_end_token_id=image - 3,
        )

    def prompt(self, model: PreTrainedModel, visual: int, text: int, seed: int = 0) -> dict[str, Tensor]:
        """One sample: ``visual`` visual tokens amid ``text`` text tokens, most of which follow them."""
        generator = torch.Generator().manual_seed(seed)
        image = model.config.image_token_id
        words = torch.randint(3, image - 8, (text,), generator=generator).tolist()
        before, after = words[: text // 4], words[text // 4 :]
        ids = torch.tensor([[*before, *[image] * visual, *after]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.paper == "llava-1.5-7b":
            side = 14 * _SIDE
            inputs["pixel_values"] = torch.randn(visual // _SIDE**2, 3, side, side, generator=generator)
        else:
            ((rows, cols),) = self.grids(visual) or ()
            inputs["image_grid_thw"] = torch.tensor([[1, rows, cols]])
            inputs["pixel_values"] = torch.randn(rows * cols, 3 * 2 * 14 * 14, generator=generator)
            inputs["mm_token_type_ids"] = (ids == image).int()
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        return {name: x.to(model.device) for name, x in inputs.items()}

    def grids(self, visual: int) -> list[tuple[int, int]] | None:
        """Patches (rows, columns) of the prompt's images, where they do not follow from their number."""
        if self.paper == "llava-1.5-7b":
            return None
        rows = max(side for side in range(1, int(visual**0.5) + 1) if visual % side == 0)
        return [(2 * rows, 2 * visual // rows)]


WIDTHS = {
    "llava": Width(
        "llava-1.5-7b",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
        },
        32,
    ),
    "qwen2_5_vl": Width(
        "qwen2.5-vl-7b",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        28,
    ),
}


def _mrope(sizes: dict[str, int]) -> list[int]:
    """The released model's shares of a head's rotary frequencies: 16, 24 and 24 of 64."""
    half = sizes["hidden_size"] // sizes["num_attention_heads"] // 2
    first = half // 4
    return [first, (half - first) // 2, half - first - (half - first) // 2]


@torch.no_grad()
def fill(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Random weights, from one pool of numbers over and over: drawing billions takes longer than running them."""
    generator = torch.Generator().manual_seed(seed)
    pool = 0.02 * torch.randn(1_000_003, generator=generator)  # a prime, so that rows differ
    pool = pool.to(model.device, model.dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        for chunk in parameter.view(-1).split(len(pool)):
            chunk.copy_(pool[: len(chunk)])
    return model

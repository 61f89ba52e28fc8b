"""LLaVA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.families.base import Family, PaperSchedule, Tiling, expect_tokens
from capa_probe.lvlm.frames import Box, cropped_frame
from capa_probe.lvlm.spans import ImageSpan, square_grid
from capa_probe.lvlm.towers import ClipTower

if TYPE_CHECKING:
    from PIL.Image import Image


class Llava(Family):
    """LLaVA-1.5: a fixed square grid per image, from a CLIP-like tower."""

    name = "llava"
    architecture = "LlavaForConditionalGeneration"
    example = "llava-hf/llava-1.5-7b-hf"
    schedule = PaperSchedule("llava-1.5-7b", 32, 4096, (5, 12, 16), (*range(2, 6), *range(22, 30)))
    images_adjoin = True
    tower = ClipTower()
    # "See What You Are Told" (VisAttnSink), published code.
    published_sink_dims: ClassVar = {(4096, 32, 11008): (1415, 2533), (5120, 40, 13824): (2100, 4743)}
    fallback_prompt = "USER: {images}\n{question} ASSISTANT:"

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a Pixtral tower."""
        if config.vision_config.model_type == "pixtral":
            raise CapaProbeError(
                "A LLaVA model with a Pixtral vision tower was given, whose images have no fixed grid; "
                f"give one with a CLIP or SigLIP tower, such as {self.example}."
            )

    def images(
        self,
        model: PreTrainedModel,
        visual: Tensor,
        inputs: Mapping[str, Any],
        tilings: Sequence[Tiling] | None,
    ) -> Iterator[ImageSpan]:
        """Square grids in reading order; the CLS token, where the model keeps it, has no place."""
        vision = model.config.vision_config
        pixels = inputs["pixel_values"]
        rows, cols = pixels.shape[-2] // vision.patch_size, pixels.shape[-1] // vision.patch_size
        keeps_cls = model.config.vision_feature_select_strategy == "full" and "clip" in vision.model_type
        row, col = square_grid(rows, cols, leading=int(keeps_cls))
        expect_tokens(visual, len(row) * len(pixels), f"{len(pixels)} images of {len(row)} visual tokens")
        for sample, mask in enumerate(visual):
            positions = mask.nonzero().flatten()
            if len(positions) % len(row):
                raise CapaProbeError(
                    f"Sample {sample} of the batch holds {len(positions)} visual tokens, which is no multiple of the "
                    f"{len(row)} of one image; check its image placeholders."
                )
            for index, chunk in enumerate(positions.split(len(row)) if len(positions) else ()):
                yield ImageSpan(sample, index, chunk, torch.zeros_like(row), row, col, (rows, cols))

    def seen(self, processor: Any, image: Image) -> Image:
        """The pixels that reach the vision tower: scaled, cropped or padded, less what fills no whole patch."""
        from PIL.Image import fromarray

        batch = processor.image_processor(
            images=image, do_rescale=False, do_normalize=False, return_tensors="pt"
        )
        pixels = batch["pixel_values"][0].float().clamp(0, 255).round().byte()
        height, width = (size - size % processor.patch_size for size in pixels.shape[-2:])
        return fromarray(pixels[:, :height, :width].permute(1, 2, 0).numpy())

    def frame(self, processor: Any, size: tuple[int, int]) -> Box:
        """The middle, where the processor crops."""
        return cropped_frame(processor.image_processor, size, processor.patch_size)

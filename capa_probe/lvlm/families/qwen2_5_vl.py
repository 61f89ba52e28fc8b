"""Qwen2.5-VL."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.families.base import Family, PaperSchedule, Tiling, expect_tokens
from capa_probe.lvlm.spans import ImageSpan, square_grid
from capa_probe.lvlm.towers import QwenTower

logger = logging.getLogger(__name__)


class Qwen25VL(Family):
    """Qwen2.5-VL: a grid of its own for every image, after merging 2 x 2 patches; M-RoPE positions."""

    name = "qwen2_5_vl"
    architecture = "Qwen2_5_VLForConditionalGeneration"
    example = "Qwen/Qwen2.5-VL-7B-Instruct"
    schedule = PaperSchedule("qwen2.5-vl-7b", 28, 3584, (3, 11, 21), (*range(2, 6), *range(13, 20)))
    tower = QwenTower()
    # Third-party measurements, not by the authors of either paper.
    published_sink_dims: ClassVar = {(3584, 28, 18944): (458, 2570), (2048, 36, 11008): (318, 1819, 1874)}

    def images(
        self,
        model: PreTrainedModel,
        visual: Tensor,
        inputs: Mapping[str, Any],
        tilings: Sequence[Tiling] | None,
    ) -> Iterator[ImageSpan]:
        """The grids of ``image_grid_thw`` after merging, image after image."""
        if "mm_token_type_ids" not in inputs:
            _warn_of_plain_positions()
        if "image_grid_thw" not in inputs:
            raise CapaProbeError(
                "Qwen2.5-VL inputs with pixel_values but without image_grid_thw were given; pass the processor's "
                "image_grid_thw along."
            )
        merge = model.config.vision_config.spatial_merge_size
        grids = [(int(t), int(h) // merge, int(w) // merge) for t, h, w in inputs["image_grid_thw"].tolist()]
        if any(frames != 1 for frames, _, _ in grids):
            raise CapaProbeError(
                "image_grid_thw with more than one frame was given: video input is not supported."
            )
        total = sum(rows * cols for _, rows, cols in grids)
        expect_tokens(visual, total, f"{len(grids)} images (image_grid_thw) of {total} visual tokens")
        remaining = iter(grids)
        for sample, mask in enumerate(visual):
            positions, index = mask.nonzero().flatten(), 0
            while len(positions):
                _, rows, cols = next(remaining)
                if rows * cols > len(positions):
                    raise CapaProbeError(
                        f"Sample {sample} of the batch has {len(positions)} visual tokens left for an image of "
                        f"{rows} x {cols}; check the order of images and prompts."
                    )
                row, col = square_grid(rows, cols)
                chunk, positions = positions[: len(row)], positions[len(row) :]
                yield ImageSpan(sample, index, chunk, torch.zeros_like(row), row, col, (rows, cols))
                index += 1

    def processor_options(self, processor: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """``min_pixels`` and ``max_pixels`` as a size: transformers is giving up those names in calls."""
        edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
        given = {edges[name]: value for name, value in options.items() if name in edges and value is not None}
        others = {name: value for name, value in options.items() if name not in edges}
        if not given:
            return others
        size = others.get("size") or processor.image_processor.size
        return {**others, "size": {**{edge: size[edge] for edge in edges.values()}, **given}}


@cache
def _warn_of_plain_positions() -> None:
    logger.warning(
        "Qwen2.5-VL tensors without mm_token_type_ids: transformers then uses plain 1-D positions, not M-RoPE."
    )

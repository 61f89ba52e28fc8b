"""InternVL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.families.base import Family, PaperSchedule, Tiling, expect_tokens
from capa_probe.lvlm.spans import ImageSpan, runs, square_grid
from capa_probe.lvlm.towers import InternVLTower


class InternVL(Family):
    """InternVL3: images cut into square tiles, then a thumbnail; 2 x 2 patches merged by pixel shuffle."""

    name = "internvl"
    architecture = "InternVLForConditionalGeneration"
    example = "OpenGVLab/InternVL3-8B-hf"
    schedule = PaperSchedule("internvl3-8b", 28, 3584, (3, 11, 21), (*range(2, 5), *range(14, 21)))
    tower = InternVLTower()

    def images(
        self,
        model: PreTrainedModel,
        visual: Tensor,
        inputs: Mapping[str, Any],
        tilings: Sequence[Tiling] | None,
    ) -> Iterator[ImageSpan]:
        """Tiles in reading order, then the thumbnail; without tilings no token has a place."""
        vision = model.config.vision_config
        (height, width), (patch_h, patch_w) = _pair(vision.image_size), _pair(vision.patch_size)
        rows = round(height // patch_h * model.config.downsample_ratio)
        cols = round(width // patch_w * model.config.downsample_ratio)
        per_tile, tiles = rows * cols, len(inputs["pixel_values"])
        expect_tokens(visual, per_tile * tiles, f"{tiles} tiles of {per_tile} visual tokens")
        row, col = square_grid(rows, cols)
        # Every image stands between its own <img> and </img>, so an unbroken run is one image.
        chunks = [runs(mask) for mask in visual]
        if tilings is not None and len(tilings) != sum(map(len, chunks)):
            tilings = None  # made for another prompt
        image = 0
        for sample, own in enumerate(chunks):
            for index, chunk in enumerate(own):
                if len(chunk) % per_tile:
                    raise CapaProbeError(
                        f"Sample {sample} of the batch holds an image of {len(chunk)} visual tokens, which is no "
                        f"multiple of the {per_tile} of one tile; check its image placeholders."
                    )
                n_tiles, tiling = len(chunk) // per_tile, tilings[image] if tilings else None
                if tiling is None or len(tiling) != n_tiles:
                    nowhere = torch.full((len(chunk),), -1)
                    yield ImageSpan(sample, index, chunk, nowhere, nowhere, nowhere, None, None)
                else:
                    tile = torch.arange(n_tiles)
                    if tiling.thumbnail:
                        tile[-1] = -1
                    yield ImageSpan(
                        sample,
                        index,
                        chunk,
                        tile.repeat_interleave(per_tile),
                        row.repeat(n_tiles),
                        col.repeat(n_tiles),
                        (rows, cols),
                        (tiling.rows, tiling.cols),
                    )
                image += 1

    def tilings(
        self, processor: Any, sizes: Sequence[tuple[int, int]], options: Mapping[str, Any]
    ) -> tuple[Tiling, ...] | None:
        """The tile arrangement that the image processor chooses for each image's aspect ratio."""
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        # InternVLProcessor turns crop_to_patches on, over what its image processor says.
        overrides = (options, options.get("images_kwargs") or {}, getattr(processor, "images_kwargs", {}))

        def option(name: str) -> Any:
            given = [source[name] for source in overrides if name in source]
            return given[0] if given else getattr(processor.image_processor, name)

        if not option("crop_to_patches"):
            return tuple(Tiling(1, 1, False) for _ in sizes)
        size = option("size")
        tile = (int(size["height"]), int(size["width"]))
        found = []
        for height, width in sizes:
            cols, rows = get_optimal_tiled_canvas(
                (height, width), tile, int(option("min_patches")), int(option("max_patches"))
            )
            found.append(Tiling(rows, cols, thumbnail=rows * cols > 1))
        return tuple(found)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)

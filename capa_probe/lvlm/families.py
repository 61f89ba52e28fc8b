"""The supported model families: where their parts are, how they lay out images, what has been published.

To add one, subclass :class:`Family`, say how its visual tokens map to grids, and add it to ``FAMILIES``.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.frames import Box, cropped_frame
from capa_probe.lvlm.spans import ImageSpan, runs, square_grid
from capa_probe.lvlm.towers import ClipTower, InternVLTower, QwenTower, Tower

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PaperSchedule:
    """What CAPA's paper prescribes for one checkpoint: three alternative pruning layers, and the Hadamard layers."""

    model: str
    prune_layers: tuple[int, ...]
    hadamard_layers: tuple[int, ...]


@dataclass(frozen=True)
class Tiling:
    """How one image was cut up: rows and columns of tiles, and whether a thumbnail follows them."""

    rows: int
    cols: int
    thumbnail: bool

    def __len__(self) -> int:
        return self.rows * self.cols + self.thumbnail


class Family(ABC):
    """One model family of transformers. Subclasses say what differs; none of them touches the model's code."""

    #: ``config.model_type`` of the family's checkpoints.
    name: ClassVar[str]
    #: The transformers class, and a checkpoint to name in messages.
    architecture: ClassVar[str]
    example: ClassVar[str]
    schedule: ClassVar[PaperSchedule]
    #: Where its vision tower is, and which patches a visual token is made of; needed by methods that read the tower.
    tower: ClassVar[Tower | None] = None
    #: (d_model, layers, d_mlp) of a checkpoint to the sink dimensions published for it.
    published_sink_dims: ClassVar[Mapping[tuple[int, int, int], tuple[int, ...]]] = {}
    #: Prompt for processors that ship none; {images} and {question} are filled in.
    fallback_prompt: ClassVar[str | None] = None

    def text_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The decoder stack: has ``layers``, each with ``self_attn``, ``post_attention_layernorm`` and ``mlp``."""
        return model.model.language_model

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """The decoder layers, in order."""
        return self.text_model(model).layers

    def image_token_id(self, model: PreTrainedModel) -> int:
        """Id of the token that stands for one visual token in ``input_ids``."""
        return int(model.config.image_token_id)

    def sink_dims(self, model: PreTrainedModel) -> tuple[int, ...] | None:
        """Sink dimensions published for a checkpoint of these sizes; None if there are none."""
        text = model.config.get_text_config()
        return self.published_sink_dims.get(
            (text.hidden_size, text.num_hidden_layers, text.intermediate_size)
        )

    def check(self, config: PreTrainedConfig) -> None:  # noqa: B027  # most families have one layout
        """Raise CapaProbeError for a member of the family that is laid out differently."""

    @abstractmethod
    def images(
        self,
        model: PreTrainedModel,
        visual: Tensor,
        inputs: Mapping[str, Any],
        tilings: Sequence[Tiling] | None,
    ) -> Iterator[ImageSpan]:
        """The images of a batch.

        Args:
            model: the wrapped model.
            visual: bool (batch, position), True at visual tokens.
            inputs: the tensors that go into the model.
            tilings: one per image, where ``prepare`` carried them along.

        Raises:
            CapaProbeError: the visual tokens do not match the images.
        """

    def processor_options(self, processor: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of ``prepare`` as the processor takes them."""
        return dict(options)

    def tilings(
        self, processor: Any, sizes: Sequence[tuple[int, int]], options: Mapping[str, Any]
    ) -> tuple[Tiling, ...] | None:
        """How the processor tiles images of these (height, width); None for a family that does not tile."""
        return None

    def seen(self, processor: Any, image: Image) -> Image:
        """The part of an RGB image that its visual tokens cover, so that their grid can be laid over it.

        Here the whole image: the processor only stretches it. Where a model tiles, the tiles are equal rectangles of
        it, and a thumbnail is all of it.
        """
        return image

    def frame(self, processor: Any, size: tuple[int, int]) -> Box:
        """Where :meth:`seen` lies in an image of this (height, width), in its pixels; it may reach beyond.

        Raises:
            CapaProbeError: that is not known for this processor.
        """
        return 0.0, 0.0, float(size[1]), float(size[0])


class Llava(Family):
    """LLaVA-1.5: a fixed square grid per image, from a CLIP-like tower."""

    name = "llava"
    architecture = "LlavaForConditionalGeneration"
    example = "llava-hf/llava-1.5-7b-hf"
    schedule = PaperSchedule("llava-1.5-7b", (5, 12, 16), (*range(2, 6), *range(22, 30)))
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


class Qwen25VL(Family):
    """Qwen2.5-VL: a grid of its own for every image, after merging 2 x 2 patches; M-RoPE positions."""

    name = "qwen2_5_vl"
    architecture = "Qwen2_5_VLForConditionalGeneration"
    example = "Qwen/Qwen2.5-VL-7B-Instruct"
    schedule = PaperSchedule("qwen2.5-vl-7b", (3, 11, 21), (*range(2, 6), *range(13, 20)))
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


class InternVL(Family):
    """InternVL3: images cut into square tiles, then a thumbnail; 2 x 2 patches merged by pixel shuffle."""

    name = "internvl"
    architecture = "InternVLForConditionalGeneration"
    example = "OpenGVLab/InternVL3-8B-hf"
    schedule = PaperSchedule("internvl3-8b", (3, 11, 21), (*range(2, 5), *range(14, 21)))
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


#: Every supported family, by ``config.model_type``.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Llava(),
        Qwen25VL(),
        InternVL(),
    )
}


@cache
def _warn_of_plain_positions() -> None:
    logger.warning(
        "Qwen2.5-VL tensors without mm_token_type_ids: transformers then uses plain 1-D positions, not M-RoPE."
    )


def family_of(config: PreTrainedConfig, given: str = "The model") -> Family:
    """The family of a model's config.

    Raises:
        CapaProbeError: none of the supported ones.
    """
    family = FAMILIES.get(config.model_type)
    architectures = config.architectures or []
    if family is None or (architectures and family.architecture not in architectures):
        kind = f"{config.model_type} ({architectures[0]})" if architectures else config.model_type
        known = ", ".join(f"{each.name} (such as {each.example})" for each in FAMILIES.values())
        raise CapaProbeError(
            f"{given} is of type {kind}; supported are {known}; to add a family, write one class in "
            "capa_probe/lvlm/families.py."
        )
    family.check(config)
    return family


def expect_tokens(visual: Tensor, expected: int, what: str) -> None:
    """Raise CapaProbeError unless the batch holds as many visual tokens as its images give."""
    found = int(visual.sum())
    if found != expected:
        raise CapaProbeError(
            f"The prompts hold {found} visual tokens but the images give {expected} ({what}); "
            "use one placeholder per image, or let prepare() write them."
        )


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)

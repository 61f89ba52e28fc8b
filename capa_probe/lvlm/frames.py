"""Which part of an image its grid of visual tokens covers."""

from __future__ import annotations

from typing import Any, TypeAlias

from capa_probe.errors import CapaProbeError

#: Left, top, right and bottom in pixels of an image; right and bottom are exclusive.
Box: TypeAlias = tuple[float, float, float, float]


def cropped_frame(image_processor: Any, size: tuple[int, int], patch_size: int) -> Box:
    """The frame of an image processor that scales, then crops the middle, as CLIP's and SigLIP's do.

    Args:
        image_processor: of transformers.
        size: height and width of an image.
        patch_size: pixels per side of a patch of the vision tower, which passes over what fills no whole one.

    Raises:
        CapaProbeError: the processor pads images in a way of its own.
    """
    if getattr(image_processor, "do_pad", None):
        raise CapaProbeError(
            f"The image processor {type(image_processor).__name__} pads images (do_pad), and which of their pixels a "
            "visual token covers is not known; leave regions out of the data, or load a checkpoint that does not pad."
        )
    height, width = size
    scaled, seen = _sizes(image_processor, height, width)
    box = []
    for side, before, after in zip((height, width), scaled, seen, strict=True):
        # As transformers crops: the floor of half of what is over, and of half of what is missing, come first.
        first = int((before - after) / 2) if before >= after else -((after - before) // 2)
        last = first + after - after % patch_size
        box.append((first * side / before, last * side / before))
    (top, bottom), (left, right) = box
    return left, top, right, bottom


def _sizes(image_processor: Any, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width after scaling, and after cropping: asked of the processor itself."""
    from PIL import Image

    blank, found = Image.new("RGB", (width, height)), []
    for crops in ({"do_center_crop": False}, {}):
        batch = image_processor(images=blank, do_normalize=False, return_tensors="pt", **crops)
        rows, cols = batch["pixel_values"].shape[-2:]
        found.append((int(rows), int(cols)))
    return found[0], found[1]

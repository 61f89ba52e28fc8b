"""Images of any kind, made into what image processors expect: upright, opaque, 8-bit RGB."""

from __future__ import annotations

import struct

import numpy as np
from PIL import ExifTags, Image

from capa_probe.errors import CapaProbeError

#: How a stored image is turned upright, by EXIF orientation (CIPA DC-008, tag 0x0112); 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """A copy in RGB: upright as its EXIF data say, with transparency laid on white.

    Of several frames the current one counts, which is the first in a file just opened. Deep grey (modes I;16, I
    and F) becomes 8-bit grey: I;16 from 0-65535; I from 0-255 or 0-65535, and F from 0-1, 0-255 or 0-65535,
    whichever is the narrowest that holds all its values.

    Raises:
        CapaProbeError: the image has no pixels, or deep grey outside these ranges.
        OSError: Pillow finds the image's file broken when it reads the pixels.
    """
    image.load()  # TIFF files are turned upright while they load
    if 0 in image.size:
        raise CapaProbeError(
            f"the image is {image.width} x {image.height} pixels; give one of at least 1 x 1"
        )
    turn = _TURNS.get(_orientation(image))
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    if image.mode == "La":  # grey multiplied by alpha, which Pillow turns into LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}  # the orientation must not be followed a second time
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (OSError, EOFError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1  # broken EXIF data are no reason to refuse the pixels


def _eight_bit(image: Image.Image) -> Image.Image:
    raw = np.asarray(image)
    grey = raw.astype(np.float64)
    low, high = grey.min(), grey.max()
    if not (low >= 0 and high <= 65535):  # NaN is refused too
        raise CapaProbeError(
            f"the image is grey of mode {image.mode} from {low:g} to {high:g}; give values within 0-255 or 0-65535"
        )
    if image.mode == "F" and high <= 1:
        grey = grey * 255
    elif "16" in image.mode or high > 255:
        # Pillow itself would clip at 255, which is nearly all white.
        grey = grey / 257
    grey = grey.round()
    transparent = image.info.get("transparency")  # one grey value, in PNG
    if isinstance(transparent, int):
        grey[raw == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))

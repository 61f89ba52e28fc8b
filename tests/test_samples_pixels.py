"""Images of every mode, orientation and state, against formulas and standards and not against Pillow."""

from __future__ import annotations

import colorsys
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from capa_probe.errors import BadImageError, CapaProbeError
from capa_probe.samples import Sample, to_rgb

Bytes = NDArray[np.uint8]
ORIENTATION = 0x0112


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def pixels(image: Image.Image) -> NDArray[np.float64]:
    assert image.mode == "RGB"
    return np.asarray(image).astype(np.float64)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def grey(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.repeat(values[..., None], 3, axis=-1)


def on_white(colour: NDArray[np.float64], alpha: NDArray[np.float64]) -> NDArray[np.float64]:
    """What is seen of a colour (0-255) of that opacity (0-255) before white."""
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def each_pixel(
    convert: Callable[[float, float, float], tuple[float, float, float]], raw: Bytes
) -> NDArray[np.float64]:
    flat = [convert(*(float(v) for v in pixel)) for pixel in raw.reshape(-1, 3)]
    return np.array(flat).reshape(raw.shape)


def from_ycbcr(y: float, cb: float, cr: float) -> tuple[float, float, float]:
    """ITU-T T.871 (JFIF), section 7."""
    cb, cr = cb - 128, cr - 128
    rgb = (y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb)
    return tuple(min(max(v, 0.0), 255.0) for v in rgb)  # type: ignore[return-value]


def from_hsv(h: float, s: float, v: float) -> tuple[float, float, float]:
    # Hue is a share of 255, as Pillow has it, not of 256.
    return tuple(255 * c for c in colorsys.hsv_to_rgb(h / 255, s / 255, v / 255))  # type: ignore[return-value]


def from_lab(light: float, a: float, b: float) -> tuple[float, float, float]:
    """CIE 15 (Lab, white D50) to XYZ, adapted to D65 (Bradford), to sRGB (IEC 61966-2-1)."""

    def inverse(t: float) -> float:
        return t**3 if t > 6 / 29 else 3 * (6 / 29) ** 2 * (t - 4 / 29)

    f_y = (light / 255 * 100 + 16) / 116
    f_x, f_z = f_y + (a - 128) / 500, f_y - (b - 128) / 200
    xyz = np.array([0.96422, 1.0, 0.82521]) * [inverse(f_x), inverse(f_y), inverse(f_z)]
    # sRGB's matrix from XYZ relative to D50 (Lindbloom).
    matrix = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = np.clip(np.array(matrix) @ xyz, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple(255 * encoded)


#: Where the stored image's first row and first column are seen (TIFF 6.0, page 36; CIPA DC-008, table 6).
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


class TestModes:
    """Every mode that Pillow has, each against its own formula."""

    def test_bits(self) -> None:
        bits = np.array([[0, 1, 1], [1, 0, 0]], dtype=bool)
        image = Image.fromarray(bits)
        assert image.mode == "1"
        np.testing.assert_array_equal(pixels(to_rgb(image)), grey(255.0 * bits))

    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBX"])
    def test_opaque_bytes_stay(self, mode: str, rng: np.random.Generator) -> None:
        n = {"L": 1, "RGB": 3, "RGBX": 4}[mode]
        raw = rng.integers(0, 256, (5, 7, n), dtype=np.uint8)
        image = Image.frombytes(mode, (7, 5), raw.tobytes())
        seen = raw.astype(float)
        np.testing.assert_array_equal(pixels(to_rgb(image)), grey(seen[..., 0]) if n == 1 else seen[..., :3])

    @pytest.mark.parametrize("mode", ["LA", "RGBA", "La", "RGBa"])
    def test_alpha_is_laid_on_white(self, mode: str, rng: np.random.Generator) -> None:
        n = len(mode)
        raw = rng.integers(0, 256, (9, 11, n), dtype=np.uint8)
        raw[0, :, -1], raw[1, :, -1] = 0, 255
        if mode.endswith("a"):  # multiplied by alpha: colours cannot be larger
            raw[..., :-1] = np.minimum(raw[..., :-1], raw[..., -1:])
        colour, alpha = raw[..., :-1].astype(float), raw[..., -1].astype(float)
        expected = colour + (255 - alpha)[..., None] if mode.endswith("a") else on_white(colour, alpha)
        if n == 2:
            expected = grey(expected[..., 0])
        image = Image.frombytes(mode, (11, 9), raw.tobytes())
        np.testing.assert_allclose(pixels(to_rgb(image)), expected, atol=1.01)

    def test_palette(self, rng: np.random.Generator) -> None:
        colours = rng.integers(0, 256, (16, 3), dtype=np.uint8)
        index = rng.integers(0, 16, (5, 7), dtype=np.uint8)
        image = Image.frombytes("P", (7, 5), index.tobytes())
        image.putpalette(colours.tobytes())
        np.testing.assert_array_equal(pixels(to_rgb(image)), colours[index])
        image.putalpha(Image.new("L", image.size, 0))
        assert image.mode == "PA"
        assert (pixels(to_rgb(image)) == 255).all()

    @pytest.mark.parametrize("kind", ["PNG", "GIF"])
    def test_palette_with_a_transparent_colour(self, kind: str, rng: np.random.Generator) -> None:
        colours = rng.integers(0, 250, (16, 3), dtype=np.uint8)
        index = rng.integers(0, 16, (8, 8), dtype=np.uint8)
        index[0, 0] = 5
        image = Image.frombytes("P", (8, 8), index.tobytes())
        image.putpalette(colours.tobytes())
        (opened,) = Sample("a", encoded(image, kind, transparency=5), "q").open_images()
        expected = colours[index].astype(float)
        expected[index == 5] = 255
        np.testing.assert_array_equal(pixels(opened), expected)

    def test_palette_with_alpha_for_each_colour(self, rng: np.random.Generator) -> None:
        colours = rng.integers(0, 256, (4, 3), dtype=np.uint8)
        alphas = np.array([0, 64, 200, 255], dtype=np.uint8)
        index = np.arange(4, dtype=np.uint8)[None]
        image = Image.frombytes("P", (4, 1), index.tobytes())
        image.putpalette(colours.tobytes())
        (opened,) = Sample("a", encoded(image, "PNG", transparency=alphas.tobytes()), "q").open_images()
        expected = on_white(colours.astype(float), alphas.astype(float))
        np.testing.assert_allclose(pixels(opened)[0], expected, atol=1)

    @pytest.mark.parametrize(
        ("mode", "value", "transparent"), [("L", 9, 9), ("RGB", (1, 2, 3), (1, 2, 3)), ("1", 0, 0)]
    )
    def test_one_transparent_colour_without_a_palette(
        self, mode: str, value: object, transparent: object
    ) -> None:
        image = Image.new(mode, (2, 1), value)
        image.putpixel((1, 0), 255 if mode != "RGB" else (200, 100, 50))
        (opened,) = Sample("a", encoded(image, "PNG", transparency=transparent), "q").open_images()
        assert opened.getpixel((0, 0)) == (255, 255, 255)
        assert opened.getpixel((1, 0)) == ((200, 100, 50) if mode == "RGB" else (255, 255, 255))

    def test_cmyk(self, rng: np.random.Generator) -> None:
        raw = rng.integers(0, 256, (9, 11, 4), dtype=np.uint8)
        inks = raw.astype(float) / 255
        expected = 255 * (1 - inks[..., :3]) * (1 - inks[..., 3:])
        image = Image.frombytes("CMYK", (11, 9), raw.tobytes())
        np.testing.assert_allclose(pixels(to_rgb(image)), expected, atol=1.01)

    @pytest.mark.parametrize(
        ("mode", "formula", "tolerance"),
        [("YCbCr", from_ycbcr, 1.01), ("HSV", from_hsv, 2.01), ("LAB", from_lab, 2.01)],
    )
    def test_other_colour_spaces(
        self,
        mode: str,
        formula: Callable[[float, float, float], tuple[float, float, float]],
        tolerance: float,
        rng: np.random.Generator,
    ) -> None:
        # Well inside of what sRGB can show: at its edge, small differences in XYZ are large ones in sRGB.
        low, high = ((90, 110), (200, 146)) if mode == "LAB" else ((0, 0), (256, 256))
        raw = rng.integers([low[0], low[1], low[1]], [high[0], high[1], high[1]], (9, 11, 3)).astype(np.uint8)
        stored = raw.copy()
        if mode == "LAB":
            stored[..., 1:] -= 128  # Pillow takes a and b as signed bytes, as TIFF holds them
        image = Image.frombytes(mode, (11, 9), stored.tobytes())
        np.testing.assert_allclose(pixels(to_rgb(image)), each_pixel(formula, raw), atol=tolerance)

    @pytest.mark.parametrize(("mode", "order"), [("I;16", "<"), ("I;16L", "<"), ("I;16B", ">")])
    def test_sixteen_bit_grey(self, mode: str, order: str) -> None:
        raw = np.array([[0, 128, 257 * 100, 65535]])
        image = Image.frombytes(mode, (4, 1), raw.astype(f"{order}u2").tobytes())
        np.testing.assert_array_equal(pixels(to_rgb(image)), grey(np.array([[0.0, 0, 100, 255]])))

    def test_dark_sixteen_bit_grey_stays_dark(self) -> None:
        image = Image.fromarray(np.full((1, 2), 200, dtype=np.uint16))
        np.testing.assert_array_equal(pixels(to_rgb(image)), np.ones((1, 2, 3)))

    def test_sixteen_bit_grey_with_a_transparent_value(self) -> None:
        image = Image.fromarray(np.array([[257 * 40, 257 * 41]], dtype=np.uint16))
        (opened,) = Sample("a", encoded(image, "PNG", transparency=257 * 40), "q").open_images()
        np.testing.assert_array_equal(pixels(opened), grey(np.array([[255.0, 41]])))

    @pytest.mark.parametrize(
        ("mode", "values", "expected"),
        [
            ("I", [0, 100, 255], [0, 100, 255]),
            ("I", [0, 257 * 100, 65535], [0, 100, 255]),
            ("F", [0, 0.5, 1], [0, 128, 255]),
            ("F", [0, 99.6, 255], [0, 100, 255]),
            ("F", [0, 257 * 100, 65535], [0, 100, 255]),
            ("F", [0, 0, 0], [0, 0, 0]),
        ],
    )
    def test_deep_grey_takes_the_narrowest_range(
        self, mode: str, values: list[float], expected: list[float]
    ) -> None:
        raw = np.array([values], dtype=np.int32 if mode == "I" else np.float32)
        image = Image.fromarray(raw)
        assert image.mode == mode
        np.testing.assert_array_equal(pixels(to_rgb(image)), grey(np.array([expected], dtype=float)))

    @pytest.mark.parametrize(
        ("values", "dtype"),
        [([-1, 5], np.int32), ([0, 65536], np.int32), ([0, np.nan], np.float32), ([0, np.inf], np.float32)],
    )
    def test_deep_grey_of_no_known_range_is_refused(self, values: list[float], dtype: type) -> None:
        image = Image.fromarray(np.array([values], dtype=dtype))
        with pytest.raises(BadImageError, match=r"number 1, given in memory, .* grey of mode [IF] from"):
            Sample("a", image, "q").open_images()


class TestOrientation:
    @staticmethod
    def upright(stored: Bytes, orientation: int) -> Bytes:
        """Each stored pixel put where those sides say that it is seen."""
        row_side, column_side = SIDES[orientation]
        height, width, _ = stored.shape
        turned = row_side in ("left", "right")
        seen = np.zeros((width, height, 3) if turned else stored.shape, dtype=np.uint8)
        for i in range(height):
            for j in range(width):
                place = {}
                # Along rows of pixels seen (top to bottom), and along columns (left to right).
                for index, side, n in ((i, row_side, height), (j, column_side, width)):
                    axis = "y" if side in ("top", "bottom") else "x"
                    place[axis] = index if side in ("top", "left") else n - 1 - index
                seen[place["y"], place["x"]] = stored[i, j]
        return seen

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "memory"])
    def test_all_eight(self, kind: str, orientation: int, rng: np.random.Generator) -> None:
        stored = rng.integers(0, 256, (3, 5, 3), dtype=np.uint8)
        image = Image.fromarray(stored)
        image.getexif()[ORIENTATION] = orientation
        source: Image.Image | bytes = image
        if kind != "memory":
            options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
            source = encoded(Image.fromarray(stored), kind, exif=image.getexif(), **options)
        (opened,) = Sample("a", source, "q").open_images()
        np.testing.assert_array_equal(np.asarray(opened), self.upright(stored, orientation))
        # Nothing is left that would turn it once more.
        np.testing.assert_array_equal(np.asarray(to_rgb(opened)), np.asarray(opened))
        assert ORIENTATION not in opened.getexif()

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_jpeg(self, orientation: int) -> None:
        stored = np.zeros((16, 32, 3), dtype=np.uint8)
        stored[:8, :8], stored[8:, 24:] = (255, 0, 0), (0, 0, 255)
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        data = encoded(Image.fromarray(stored), "JPEG", exif=exif, quality=100, subsampling=0)
        (opened,) = Sample("a", data, "q").open_images()
        expected = self.upright(stored, orientation)
        assert np.abs(pixels(opened) - expected).mean() < 2

    @pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "I;16"])
    def test_with_every_kind_of_conversion(self, mode: str) -> None:
        image = Image.new(mode, (5, 3))
        image.getexif()[ORIENTATION] = 6
        assert to_rgb(image).size == (3, 5)
        assert image.size == (5, 3)

    @pytest.mark.parametrize("orientation", [0, 9, 255])
    def test_an_unknown_value_turns_nothing(self, orientation: int, rng: np.random.Generator) -> None:
        stored = rng.integers(0, 256, (3, 5, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        (opened,) = Sample("a", encoded(Image.fromarray(stored), "PNG", exif=exif), "q").open_images()
        np.testing.assert_array_equal(np.asarray(opened), stored)

    def test_broken_exif_data_do_not_cost_the_image(self, rng: np.random.Generator) -> None:
        stored = rng.integers(0, 256, (3, 5, 3), dtype=np.uint8)
        data = encoded(Image.fromarray(stored), "PNG", exif=b"Exif\0\0no TIFF header")
        (opened,) = Sample("a", data, "q").open_images()
        np.testing.assert_array_equal(np.asarray(opened), stored)


class TestFrames:
    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_the_first_counts(self, kind: str) -> None:
        red, blue = (Image.new("RGB", (4, 3), colour) for colour in ("red", "blue"))
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(red, kind, save_all=True, append_images=[blue], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
        (opened,) = Sample("a", data, "q").open_images()
        assert opened.getcolors() == [(12, (255, 0, 0))]


class TestBadImages:
    """What the user is told, and that it names the image, the sample and the reason."""

    def bad(self, source: Image.Image | Path | bytes) -> BadImageError:
        good = Image.new("RGB", (2, 2))
        with pytest.raises(BadImageError) as caught:
            Sample("cat-7", [good, source], "q").open_images()
        assert caught.value.sample == "cat-7"
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)  # no addresses of objects
        return caught.value

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
    @pytest.mark.parametrize("part", [0.1, 0.5, 0.97])
    def test_cut_short(self, kind: str, part: float, tmp_path: Path, rng: np.random.Generator) -> None:
        whole = encoded(Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)), kind)
        Sample("a", whole, "q").open_images()
        file = tmp_path / "cut"
        file.write_bytes(whole[: int(len(whole) * part)])
        error = self.bad(file)
        assert str(error).startswith(f"image {file} of sample 'cat-7' cannot be read as an image (")
        assert error.image == str(file)

    def test_missing_empty_and_text(self, tmp_path: Path) -> None:
        assert str(self.bad(tmp_path / "gone.png")) == (
            f"image {tmp_path / 'gone.png'} of sample 'cat-7' does not exist."
        )
        (tmp_path / "empty.png").touch()
        assert "(it is empty)" in str(self.bad(tmp_path / "empty.png"))
        (tmp_path / "text.png").write_text("no image")
        assert "(it is in no image format that Pillow knows, or damaged)" in str(
            self.bad(tmp_path / "text.png")
        )
        assert "cannot be read as an image" in str(self.bad(tmp_path))
        assert "cannot be read as an image" in str(self.bad(Path("a\0b.png")))

    @pytest.mark.parametrize("size", [(0, 3), (3, 0), (0, 0)])
    def test_no_pixels(self, size: tuple[int, int]) -> None:
        error = self.bad(Image.new("RGB", size))
        assert str(error) == (
            "image number 2, given in memory, of sample 'cat-7' cannot be used (the image is "
            f"{size[0]} x {size[1]} pixels; give one of at least 1 x 1)."
        )
        with pytest.raises(CapaProbeError, match=rf"{size[0]} x {size[1]} pixels"):
            to_rgb(Image.new("L", size))

    def test_a_file_without_pixels(self, tmp_path: Path) -> None:
        (tmp_path / "zero.ppm").write_bytes(b"P6 0 4 255\n")
        assert "zero.ppm of sample 'cat-7' cannot be" in str(self.bad(tmp_path / "zero.ppm"))

    def test_bytes(self) -> None:
        assert "number 2, given in memory, of sample 'cat-7'" in str(self.bad(b"no image"))
        assert "(it is empty)" in str(self.bad(b""))

    def test_a_decompression_bomb(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = encoded(Image.new("1", (100, 100)), "PNG")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        assert "decompression bomb" in str(self.bad(data))

    def test_the_error_survives_pickling(self) -> None:
        error = self.bad(b"")
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.image, again.reason) == (str(error), error.image, error.reason)

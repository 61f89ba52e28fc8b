"""Pictures of examples: which token lies in which cell, and what is said where that is not known."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from capa_probe.examples import ExampleImage
from capa_probe.lvlm import HookedLVLM
from capa_probe.report.pictures import Picture, colours, pictures
from tests import processors, runs, tiny

ROOM = 1e9


def decode(uri: str) -> Image.Image:
    kind, content = uri.split(",", 1)
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(content)))


def tokens(places: list[tuple[int, int, int]], image: int = 0) -> pd.DataFrame:
    """Visual tokens of one image at (tile, row, col)."""
    tile, row, col = zip(*places, strict=True)
    position = np.arange(len(places)) + 1
    return pd.DataFrame({"position": position, "image": image, "tile": tile, "row": row, "col": col})


def kept(
    folder: Path, image: Image.Image, grid: tuple[int, int], tiles: tuple[int, int] = (1, 1)
) -> ExampleImage:
    image.save(folder / "0-0.png")
    return ExampleImage("0-0.png", grid, tiles)


class TestCells:
    def test_tiles_lie_in_reading_order_and_the_thumbnail_apart(self, tmp_path: Path) -> None:
        image = kept(tmp_path, runs.picture(60, 40), (2, 2), (1, 2))
        places = [(tile, row, col) for tile in (0, 1, -1) for row in range(2) for col in range(2)]
        (tiled, thumbnail), missing = pictures([image], tmp_path, tokens(places), ROOM)
        assert missing == []
        assert (tiled.label, tiled.grid, tiled.cells) == ("1 × 2 tiles", (2, 4), (0, 1, 4, 5, 2, 3, 6, 7))
        assert (thumbnail.label, thumbnail.grid, thumbnail.cells) == ("thumbnail", (2, 2), (8, 9, 10, 11))
        assert (tiled.width, tiled.height) == (60, 40)

    def test_a_cell_without_a_token(self, tmp_path: Path) -> None:
        image = kept(tmp_path, runs.picture(), (1, 3))
        (picture,), _ = pictures([image], tmp_path, tokens([(0, 0, 2), (0, 0, 0)]), ROOM)
        assert picture.cells == (1, -1, 0)

    def test_the_picture_is_what_the_model_sees(self, tmp_path: Path) -> None:
        processor = processors.build("llava")
        processor.image_processor.do_center_crop = True
        processor.image_processor.size = {"shortest_edge": 16}
        processor.image_processor.crop_size = {"height": 16, "width": 16}
        wide = Image.new("RGB", (48, 16), "black")
        wide.paste("red", (20, 4, 24, 8))  # cell (1, 1) of the middle
        family = HookedLVLM(tiny.shared("llava"), processor).family
        image = kept(tmp_path, family.seen(processor, wide), (4, 4))
        places = [(0, row, col) for row in range(4) for col in range(4)]
        (picture,), _ = pictures([image], tmp_path, tokens(places), ROOM)
        with decode(picture.image) as shown:
            red = np.asarray(shown.convert("RGB").resize((4, 4), Image.Resampling.BOX))[..., 0] > 128
        assert [picture.cells[cell] for cell in np.flatnonzero(red)] == [places.index((0, 1, 1))]


class TestImagesThatCannotBeDrawnOver:
    def shown(
        self, *images: ExampleImage, of: pd.DataFrame | None, folder: Path
    ) -> tuple[list[bool], list[str]]:
        found, missing = pictures(images, folder, of, ROOM)
        for picture in found:
            with decode(picture.image) as image:
                assert image.size == (picture.width, picture.height) == runs.picture().size
        return [bool(picture.cells) for picture in found], missing

    def test_tokens_that_do_not_lie_on_the_grid(self, tmp_path: Path) -> None:
        image = kept(tmp_path, runs.picture(), (2, 2))
        for place in [(0, 2, 0), (0, 0, 2), (1, 0, 0)]:
            drawn, (why,) = self.shown(image, of=tokens([place]), folder=tmp_path)
            assert drawn == [False]
            assert "do not match" in why

    def test_unknown_places(self, tmp_path: Path) -> None:
        image = kept(tmp_path, runs.picture(), (2, 2))
        nowhere = ExampleImage(image.file, None, None)
        for given, place in ((image, (-1, -1, -1)), (nowhere, (0, 0, 0))):
            drawn, (why,) = self.shown(given, of=tokens([place]), folder=tmp_path)
            assert drawn == [False]
            assert "not known where" in why

    def test_the_other_images_of_the_sample_are_drawn_over(self, tmp_path: Path) -> None:
        image = kept(tmp_path, runs.picture(), (1, 1))
        images = [
            image,
            ExampleImage(image.file, None, None),
            ExampleImage("gone.png", (1, 1), (1, 1)),
            image,
        ]
        table = pd.concat([tokens([(0, 0, 0)], index) for index in range(4)], ignore_index=True)
        drawn, missing = self.shown(*images, of=table, folder=tmp_path)
        assert drawn == [True, False, True]
        assert missing == [
            "Image 2 of 4: It is not known where in the image its visual tokens lie.",
            "Image 3 of 4: The image gone.png of the example is missing or cannot be read.",
        ]

    @pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\nhalf"])
    def test_images_that_do_not_open(self, content: bytes | None, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / "0-0.png").write_bytes(content)
        image = ExampleImage("0-0.png", (1, 1), (1, 1))
        for of in (None, tokens([(0, 0, 0)])):
            drawn, (why,) = self.shown(image, of=of, folder=tmp_path)
            assert drawn == []
            assert "0-0.png of the example is missing or cannot be read" in why


def test_images_beyond_the_room_are_counted_and_the_first_is_always_shown(tmp_path: Path) -> None:
    image = kept(tmp_path, runs.picture(), (1, 1))
    table = pd.concat([tokens([(0, 0, 0)], index) for index in range(4)], ignore_index=True)
    found: list[Picture] = pictures([image], tmp_path, table, ROOM)[0]
    one = len(found[0].image) + 5
    for room, n, said in ((0.5, 1, "3 more images"), (3, 3, "1 more image"), (4, 4, "")):
        shown, missing = pictures([image] * 4, tmp_path, table, room * one)
        assert len(shown) == n
        assert [why.split(" of this")[0] for why in missing] == ([said] if said else [])


def test_colours_get_brighter() -> None:
    luminance = colours() @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) > -1).all()
    assert luminance[0] < 10
    assert luminance[-1] > 200

"""Overlays: what a visual token is worth is drawn exactly over the part of the image that the token comes from."""

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
from capa_probe.report import overlay
from tests import processors, runs, tiny


def decode(uri: str) -> Image.Image:
    kind, content = uri.split(",", 1)
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(content)))


def looks(view: overlay.View, panel: overlay.Panel) -> np.ndarray:
    """The panel as a page shows it: heat map stretched over the grey picture; (y, x) brightness."""
    size = (view.width, view.height)
    with decode(view.grey) as grey, decode(panel.heat) as heat:
        assert grey.size == size
        over = heat.resize(size, Image.Resampling.NEAREST)
        return np.asarray(Image.alpha_composite(grey.convert("RGBA"), over).convert("L"), float)


def token_rows(places: list[tuple[int, int, int]], attention: list[float], layer: int = 0) -> pd.DataFrame:
    """Visual tokens of one image at (tile, row, col)."""
    tile, row, col = zip(*places, strict=True)
    return pd.DataFrame(
        {
            "layer": layer,
            "position": np.arange(len(places)) + 1,
            "image": 0,
            "tile": tile,
            "row": row,
            "col": col,
            "attention": attention,
            "contribution": 1.0,
        }
    )


def kept(
    folder: Path, image: Image.Image, grid: tuple[int, int], tiles: tuple[int, int] = (1, 1)
) -> ExampleImage:
    image.save(folder / "0-0.png")
    return ExampleImage("0-0.png", grid, tiles)


class TestPlace:
    @pytest.mark.parametrize(
        ("grid", "tiles"), [((3, 5), (1, 1)), ((5, 3), (1, 1)), ((2, 2), (2, 3)), ((3, 2), (4, 1))]
    )
    def test_the_one_bright_cell_covers_its_part_of_the_image(
        self, grid: tuple[int, int], tiles: tuple[int, int], tmp_path: Path
    ) -> None:
        cell_w, cell_h = 7, 11
        width, height = cell_w * grid[1] * tiles[1], cell_h * grid[0] * tiles[0]
        image = kept(tmp_path, runs.picture(width, height), grid, tiles)
        places = [
            (tile, row, col)
            for tile in range(tiles[0] * tiles[1])
            for row in range(grid[0])
            for col in range(grid[1])
        ]
        for bright, (tile, row, col) in enumerate(places):
            attention = [float(number == bright) for number in range(len(places))]
            (view,), _ = overlay.views([image], tmp_path, token_rows(places, attention), None, [0])
            shown = looks(view, view.rows[0].panels[0])
            # Tiles lie in reading order, each with its own grid.
            top = (tile // tiles[1] * grid[0] + row) * cell_h
            left = (tile % tiles[1] * grid[1] + col) * cell_w
            expected = np.zeros((height, width), bool)
            expected[top : top + cell_h, left : left + cell_w] = True
            np.testing.assert_array_equal(shown > 150, expected)
            assert shown[~expected].max() < 100

    def test_thumbnail_is_a_picture_of_its_own(self, tmp_path: Path) -> None:
        image = kept(tmp_path, runs.picture(80, 40), (2, 2), (1, 2))
        places = [(tile, row, col) for tile in (0, 1, -1) for row in (0, 1) for col in (0, 1)]
        attention = [0, 0, 0, 0, 0, 0, 0, 0.5, 0, 0.25, 0, 0]
        (tiles, thumbnail), _ = overlay.views([image], tmp_path, token_rows(places, attention), None, [0])
        assert (tiles.label, thumbnail.label) == ("1 × 2 tiles", "thumbnail")
        assert (tiles.grid, thumbnail.grid) == ((2, 4), (2, 2))
        assert (tiles.rows[0].panels[0].largest, thumbnail.rows[0].panels[0].largest) == (0.5, 0.25)
        bright = [np.argwhere(looks(view, view.rows[0].panels[0]) > 150) for view in (tiles, thumbnail)]
        assert (bright[0].min(axis=0).tolist(), bright[0].max(axis=0).tolist()) == ([20, 60], [39, 79])
        assert (bright[1].min(axis=0).tolist(), bright[1].max(axis=0).tolist()) == ([0, 40], [19, 79])

    @pytest.mark.parametrize(
        ("family", "size", "tiles"),
        [("llava", (16, 16), (1, 1)), ("qwen2_5_vl", (24, 16), (1, 1)), ("internvl", (48, 32), (2, 3))],
    )
    def test_against_what_reaches_the_model(
        self, family: str, size: tuple[int, int], tiles: tuple[int, int], tmp_path: Path
    ) -> None:
        """A change to one place of the image changes the pixels of certain tokens; their cells are that place."""
        model, side = HookedLVLM(tiny.shared(family), processors.shared(family)), {"llava": 4}.get(family, 8)
        rng = np.random.default_rng(0)
        before = rng.integers(0, 128, (size[1], size[0], 3), dtype=np.uint8)
        for _ in range(4):
            row, col = (int(rng.integers(size[1 - axis] // side)) for axis in (0, 1))
            after = before.copy()
            after[row * side : (row + 1) * side, col * side : (col + 1) * side] += 100
            pixels = [model.prepare([Image.fromarray(image)], ["what?"]) for image in (before, after)]
            changed = (pixels[0]["pixel_values"] - pixels[1]["pixel_values"]).abs()
            # Pixels to visual tokens, as the vision towers take them.
            if family == "qwen2_5_vl":
                per_token = changed.flatten(1).amax(1).view(-1, 4).amax(1)
            else:
                patches = changed.amax(1).unfold(1, side, side).unfold(2, side, side)
                per_token = patches.amax((-1, -2)).flatten()
            span = model.spans(pixels[0]).images[0]
            assert span.grid is not None
            assert span.tile_grid == tiles
            seen = model.family.seen(model.processor, Image.fromarray(after))
            image = kept(tmp_path, seen, span.grid, span.tile_grid)
            places = list(zip(*(index.tolist() for index in (span.tile, span.row, span.col)), strict=True))
            attention = (per_token > 0.2).double().tolist()
            view = overlay.views([image], tmp_path, token_rows(places, attention), None, [0])[0][0]
            bright = looks(view, view.rows[0].panels[0]) > 150
            expected = np.zeros(bright.shape, bool)
            expected[row * side : (row + 1) * side, col * side : (col + 1) * side] = True
            np.testing.assert_array_equal(bright, expected)

    def test_a_cropped_image_is_the_one_drawn_over(self, tmp_path: Path) -> None:
        processor = processors.build("llava")
        processor.image_processor.do_center_crop = True
        processor.image_processor.size = {"shortest_edge": 16}
        processor.image_processor.crop_size = {"height": 16, "width": 16}
        wide = Image.new("RGB", (48, 16), "black")
        wide.paste("red", (20, 4, 24, 8))  # cell (1, 1) of the middle
        family = HookedLVLM(tiny.shared("llava"), processor).family
        image = kept(tmp_path, family.seen(processor, wide), (4, 4))
        places = [(0, row, col) for row in range(4) for col in range(4)]
        (view,), _ = overlay.views(
            [image], tmp_path, token_rows(places, [float(p == (0, 1, 1)) for p in places]), None, [0]
        )
        with decode(view.image) as picture:
            red = np.asarray(picture.convert("RGB"))[..., 0] > 200
        np.testing.assert_array_equal(looks(view, view.rows[0].panels[0]) > 150, red)


class TestSinks:
    def test_outlined_where_they_are_in_the_layers_where_they_are(self, tmp_path: Path) -> None:
        image = kept(tmp_path, runs.picture(80, 20), (2, 4))
        places = [(0, row, col) for row in range(2) for col in range(4)]
        tokens = pd.concat([token_rows(places, [0.1] * 8, layer) for layer in (2, 3)])
        sinks = pd.DataFrame(
            {"layer": [2, 2, 3], "position": [1, 7, 4], "role": ["dump", "anchor", "undetermined"]}
        )
        (view,), _ = overlay.views([image], tmp_path, tokens, sinks, [2, 3])
        first, second = (row.marks for row in view.rows)
        assert [(m.x, m.y, m.width, m.height, m.role) for m in first] == [
            (0, 0, 20, 10, "dump"),
            (40, 10, 20, 10, "anchor"),
        ]
        assert [(m.x, m.y, m.role) for m in second] == [(60, 0, "undetermined")]


class TestHeatMap:
    def test_brighter_and_less_transparent_with_the_value(self) -> None:
        values = np.linspace(0, 3, 50)
        colours = overlay.shades(np.sqrt(values / 3))
        luminance = colours[:, :3] @ (0.2126, 0.7152, 0.0722)
        assert (np.diff(luminance) > 0).all()
        assert (np.diff(colours[:, 3]) > 0).all()

    def test_colour_goes_with_the_square_root(self) -> None:
        heat = overlay.heat_map(np.array([[0.0, 0.25, 1.0]]))
        shown = np.asarray(heat)[0, :: heat.width // 3]
        expected = np.rint(255 * overlay.shades(np.array([0.0, 0.5, 1.0])))
        np.testing.assert_array_equal(shown[:3], expected)

    def test_no_value_is_transparent_and_zeros_are_dark(self) -> None:
        heat = np.asarray(overlay.heat_map(np.array([[np.nan, 0.0]])))
        assert heat[0, 0, 3] == 0
        zeros = np.asarray(overlay.heat_map(np.zeros((2, 2))))
        assert (zeros[..., :3] < 10).all()
        assert (zeros[..., 3] > 0).all()

    def test_colour_bar_runs_from_dark_to_bright(self) -> None:
        bar = overlay.colour_bar()
        assert bar.startswith("linear-gradient(to right, rgb(")
        assert bar.endswith(" 100.0%)")
        assert " 0.0%" in bar


class TestLayers:
    @pytest.mark.parametrize(
        ("n", "most", "expected"),
        [
            (32, None, [0, 10, 21, 31]),
            (32, 5, [0, 5, 10, 21, 31]),
            (32, 10, [0, 10, 21, 31]),
            (2, None, [0, 1]),
            (1, 0, [0]),
        ],
    )
    def test_over_the_depth_and_where_most_sinks_are(
        self, n: int, most: int | None, expected: list[int]
    ) -> None:
        assert overlay.spread(n, most) == expected


class TestImagesThatCannotBeDrawnOver:
    def shown(
        self, *images: ExampleImage, tokens: pd.DataFrame | None, folder: Path
    ) -> tuple[list[bool], list[str]]:
        views, missing = overlay.views(images, folder, tokens, None, [0])
        for view in views:
            with decode(view.image) as picture:
                assert picture.size == (view.width, view.height) == runs.picture().size
        return [bool(view.rows) for view in views], missing

    def test_tokens_that_do_not_lie_on_the_grid(self, tmp_path: Path) -> None:
        image = kept(tmp_path, runs.picture(), (2, 2))
        for place in [(0, 2, 0), (0, 0, 2), (1, 0, 0)]:
            drawn, (why,) = self.shown(image, tokens=token_rows([place], [1.0]), folder=tmp_path)
            assert drawn == [False]
            assert "do not match" in why

    def test_unknown_places(self, tmp_path: Path) -> None:
        image = kept(tmp_path, runs.picture(), (2, 2))
        nowhere = ExampleImage(image.file, None, None)
        for given, place in ((image, (-1, -1, -1)), (nowhere, (0, 0, 0))):
            drawn, (why,) = self.shown(given, tokens=token_rows([place], [1.0]), folder=tmp_path)
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
        tokens = pd.concat([token_rows([(0, 0, 0)], [1.0]).assign(image=index) for index in range(4)])
        drawn, missing = self.shown(*images, tokens=tokens, folder=tmp_path)
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
        for tokens in (None, token_rows([(0, 0, 0)], [1.0])):
            drawn, (why,) = self.shown(image, tokens=tokens, folder=tmp_path)
            assert drawn == []
            assert "0-0.png of the example is missing or cannot be read" in why


class TestBudget:
    def test_images_beyond_it_are_counted_and_the_first_is_always_shown(self, tmp_path: Path) -> None:
        image = kept(tmp_path, runs.picture(), (1, 1))
        tokens = pd.concat([token_rows([(0, 0, 0)], [1.0]).assign(image=index) for index in range(4)])
        one = overlay.views([image], tmp_path, tokens, None, [0])[0][0].n_bytes
        for room, n, said in ((0.5, 1, "3 more images"), (3, 3, "1 more image"), (4, 4, "")):
            views, missing = overlay.views([image] * 4, tmp_path, tokens, None, [0], budget=int(room * one))
            assert len(views) == n
            assert [why.split(" of this")[0] for why in missing] == ([said] if said else [])

"""The report in a real browser: what it draws and says is what the tables hold, and it loads nothing."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from playwright.sync_api import Browser

from capa_probe import findings
from capa_probe.report import write_report
from capa_probe.report.explorer import DIMS, QUANTITIES
from capa_probe.report.pictures import colours
from capa_probe.tables import LayerProfile
from tests import runs, synthetic
from tests.browsing import Opened, chromium, needs_chromium, opened
from tests.report_pages import WEIGHTS, profile

pytestmark = needs_chromium

N_VISUAL, COLS = 16, 8


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = profile(tmp_path_factory.mktemp("page") / "run")
    return runs.add_examples(path, {"a": runs.picture(), "b": runs.picture(seed=1)})


@pytest.fixture(scope="module")
def report(run: Path) -> Path:
    return write_report(run)


@pytest.fixture(scope="module")
def tokens(run: Path) -> pd.DataFrame:
    table = LayerProfile.load(run).tokens
    return table[table["kind"] == "visual"]


def values(tokens: pd.DataFrame, sample: str, layer: int, name: str) -> np.ndarray:
    """A column of one sample and layer, in the order of positions."""
    own = tokens[(tokens["sample"] == sample) & (tokens["layer"] == layer)].sort_values("position")
    return own[name].to_numpy(float)


def painted(shown: np.ndarray, low: float, high: float, root: bool) -> np.ndarray:
    """The colours that stand for values, from the rule that the page states: (token, 4)."""
    share = np.clip((shown - low) / (high - low), 0, 1)
    share = np.sqrt(share) if root else share
    opacity = np.rint(255 * (0.3 + 0.48 * share))
    return np.column_stack([colours()[np.rint(255 * share).astype(int)], opacity])


def assert_looks(shown: np.ndarray, expected: np.ndarray) -> None:
    """Pixels of a canvas against colours; a canvas rounds colours that are partly transparent."""
    np.testing.assert_allclose(shown.reshape(-1, 4), expected, atol=4)


def point(page: Opened, cell: int, which: int = 0, grid: tuple[int, int] = (2, COLS)) -> None:
    """Move the pointer to the middle of a cell of a heat map."""
    box = page.page.locator(".map").nth(which).bounding_box()
    assert box is not None
    row, col = divmod(cell, grid[1])
    page.page.mouse.move(
        box["x"] + box["width"] * (col + 0.5) / grid[1], box["y"] + box["height"] * (row + 0.5) / grid[0]
    )


def numbers(page: Opened) -> dict[str, str]:
    """What the panel beside the heat maps says of a patch: name of the quantity to number."""
    return dict(
        page.page.eval_on_selector_all(
            "#patch tr", "rows => rows.map(row => [row.dataset.name, row.cells[1].textContent])"
        )
    )


class TestExplorer:
    def test_the_slider_changes_the_heat_map(
        self, browser: Browser, report: Path, tokens: pd.DataFrame
    ) -> None:
        with opened(browser, report) as page:
            page.page.focus("#layer")
            page.page.keyboard.press("Home")
            for layer in range(5):
                assert page.page.locator("#layer").input_value() == str(layer)
                for which, name in enumerate(("attention", "contribution")):
                    shown = values(tokens, "a", layer, name)
                    expected = painted(shown, 0, shown.max(), root=True)
                    assert_looks(page.pixels(f".panel:nth-child({which + 1}) .map canvas"), expected)
                page.page.keyboard.press("ArrowRight")

    def test_a_scale_for_all_layers_and_one_that_is_linear(
        self, browser: Browser, report: Path, tokens: pd.DataFrame
    ) -> None:
        own = tokens[tokens["sample"] == "b"]
        hash_ = "#sample=b&layer=3&first=value_norm&second=ffn_cosine&scale=all"
        with opened(browser, report, hash_) as page:
            shown = values(tokens, "b", 3, "value_norm")
            expected = painted(shown, 0, own["value_norm"].max(), root=False)
            assert_looks(page.pixels(".panel:nth-child(1) canvas"), expected)
            ends = own["ffn_cosine"].min(), own["ffn_cosine"].max()
            places = [-np.log10(1 - x) for x in (values(tokens, "b", 3, "ffn_cosine"), *ends)]
            expected = painted(*places, root=False)
            assert_looks(page.pixels(".panel:nth-child(2) canvas"), expected)
            ends_shown = page.page.locator(".panel:nth-child(2) .ends span").all_inner_texts()
            assert float(ends_shown[0]) == pytest.approx(ends[0], rel=1e-4)
            assert float(ends_shown[2]) == pytest.approx(ends[1], rel=1e-4)

    def test_pointing_shows_all_numbers_of_a_patch(
        self, browser: Browser, report: Path, tokens: pd.DataFrame
    ) -> None:
        with opened(browser, report, "#sample=b&layer=2") as page:
            page.page.locator(".map").first.scroll_into_view_if_needed()
            for cell, which in ((0, 0), (4, 1), (13, 0), (15, 1)):
                point(page, cell, which)
                shown = numbers(page)
                measured = {q.name for q in QUANTITIES} - {"removal_effect"}
                assert set(shown) == measured
                for name, text in shown.items():
                    # At least four significant digits, and right ones.
                    digits = re.sub(r"e.*|[^\d]", "", text).lstrip("0")
                    assert len(digits) >= 4
                    expected = values(tokens, "b", 2, name)[cell]
                    assert float(text) == pytest.approx(expected, rel=6e-5)
                for strength, dim in zip(("sink_strength", "sink_strength_4"), DIMS[::3], strict=True):
                    said = page.text(f"#patch tr[data-name={strength}] td:last-child")
                    assert said == f"dimension {values(tokens, 'b', 2, dim)[cell]:.0f}"
                assert f"row {cell // COLS}, column {cell % COLS}, position {cell + 1}" in page.text(
                    "#patch h4"
                )
            assert "Structural Anchor" not in page.text("#patch")
            point(page, 4)  # position 5: the anchor
            assert "Structural Anchor" in page.text("#patch")

    def test_sinks_are_outlined_where_they_are(self, browser: Browser, report: Path) -> None:
        marks = ".panel:first-child .mark:not(.chosen)"
        for sample, layer, expected in (
            ("a", 2, [("mark dump", "2", "0")]),
            ("b", 2, [("mark anchor", "4", "0")]),
            ("b", 4, [("mark anchor", "4", "0")]),
            ("b", 3, []),
        ):
            with opened(browser, report, f"#sample={sample}&layer={layer}") as page:
                found = page.page.eval_on_selector_all(
                    marks,
                    "marks => marks.map(mark => [mark.getAttribute('class'), mark.firstChild.getAttribute('x'), "
                    "mark.firstChild.getAttribute('y')])",
                )
                assert [tuple(each) for each in found] == expected

    def test_prompt_and_answer(self, browser: Browser, report: Path) -> None:
        with opened(browser, report) as page:
            assert page.text("#question") == "what is a?"
            assert page.text("#answers") == "model crimson. ✓ accepted accepted answers red, Crimson"
            page.page.get_by_text("The prompt as the model got it").click()
            assert page.text("#prompt") == "USER: <image> what is a? ASSISTANT:"
            page.page.select_option("#sample", "0 b")
            assert page.text("#question") == "what is b?"

    def test_what_was_not_measured_is_named(self, browser: Browser, report: Path) -> None:
        with opened(browser, report) as page:
            found = page.page.eval_on_selector_all(
                "#first option", "all => all.filter(each => each.disabled).map(each => each.textContent)"
            )
            assert found == ["Removal effect (not measured)"]

    def test_an_offset_is_called_one(self, browser: Browser, tmp_path: Path) -> None:
        """Dimension 30 is large on 15 of the 48 visual tokens of layer 3, too many for a sink; 17 on one of layer 2."""
        many = [synthetic.Planted(sample, 3, place, 30) for sample in "abc" for place in range(1, 6)]
        world = synthetic.World(sinks=(*runs.SINKS, *many), cosines=runs.COSINES)
        path = runs.write(tmp_path / "run", runs.tokens(world), world)
        prof = LayerProfile.load(path)
        findings.write(prof, findings.find(prof, tau=synthetic.TAU), path)
        runs.add_examples(path, {"a": runs.picture()})
        with opened(browser, write_report(path), "#layer=3&patch=2") as page:
            assert page.text("#patch tr[data-name=sink_strength] td:last-child") == "dimension 30, an offset"
            page.page.locator("#layer").fill("2")
            page.page.locator(".map").first.scroll_into_view_if_needed()
            point(page, 2)  # position 3: the dump
            assert page.text("#patch tr[data-name=sink_strength] td:last-child") == "dimension 17"
            caption = page.text("#chart-sink_strength figcaption")
            assert "Offsets here: dimension 30 in layer 3." in caption

    def test_panels_keep_the_proportions_of_the_image(self, browser: Browser, report: Path) -> None:
        for width in (375, 1100):
            with opened(browser, report, width=width) as page:
                for box in page.page.locator(".map").all():
                    found = box.bounding_box()
                    assert found is not None
                    assert found["width"] > 100
                    assert found["width"] / found["height"] == pytest.approx(4, rel=0.02)


class TestAddress:
    def test_a_link_leads_to_the_same_view(
        self, browser: Browser, report: Path, tokens: pd.DataFrame
    ) -> None:
        with opened(browser, report) as page:
            page.page.select_option("#sample", "0 b")
            page.page.select_option("#first", "sink_strength")
            page.page.select_option("#second", "value_norm")
            page.page.select_option("#scale", "all")
            page.page.locator("#layer").fill("1")
            page.page.locator(".map").nth(1).scroll_into_view_if_needed()
            point(page, 9, 1)
            page.page.mouse.down()
            page.page.mouse.up()
            page.page.locator("#theme").click()
            page.page.locator("#layers-0 th button").nth(1).click()
            link = page.page.url
            state = page.page.evaluate("JSON.stringify(report.state)")
            seen = page.pixels(".map canvas"), page.text("#patch"), page.text("#layers-0 tbody")
        with opened(browser, report, f"#{link.split('#')[1]}") as page:
            assert page.page.evaluate("JSON.stringify(report.state)") == state
            np.testing.assert_array_equal(page.pixels(".map canvas"), seen[0])
            assert page.text("#patch") == seen[1]
            assert f"{values(tokens, 'b', 1, 'value_norm')[9]:.4f}"[:5] in seen[1]
            assert page.text("#layers-0 tbody") == seen[2]
            assert page.page.evaluate("document.documentElement.dataset.theme") == "light"

    def test_what_the_page_does_not_offer_is_passed_over(self, browser: Browser, report: Path) -> None:
        odd = (
            "#sample=zzz&layer=99&first=constructor&second=%3Cb%3E&scale=x&run=7&patch=-1&sort=a:b:c&theme=x"
        )
        with opened(browser, report, odd) as page:
            state = json.loads(page.page.evaluate("JSON.stringify(report.state)"))
            assert (state["sample"], state["layer"], state["first"], state["patch"]) == (
                "a",
                2,
                "attention",
                None,
            )

    def test_a_browser_that_refuses_to_change_the_address(self, browser: Browser, report: Path) -> None:
        """As Safari does where a slider changes it too often."""
        with opened(browser, report, "#layer=1") as page:
            page.page.evaluate("() => { history.replaceState = () => { throw new Error('too often'); }; }")
            page.page.locator("#layer").fill("3")
            assert page.text("#layer-number") == "3 (of 0–4)"
            assert "Layer 3" in page.text("#chart-ffn_cosine .readout")
            assert "layer=3" in page.page.evaluate("report.link()")

    def test_a_section_link_keeps_the_view(self, browser: Browser, report: Path) -> None:
        with opened(browser, report, "#sample=b&layer=4") as page:
            page.page.get_by_role("link", name="Tables").click()
            page.page.wait_for_function("location.hash.includes('layer=4')")
            assert page.text("#question") == "what is b?"


class TestKeys:
    def test_keys(self, browser: Browser, report: Path) -> None:
        with opened(browser, report, "#layer=2") as page:
            press = page.page.keyboard.press
            at = "[report.state.layer, report.state.sample, report.state.patch, report.state.scale]"
            page.page.locator(".map").first.focus()
            for keys, expected in (
                (["ArrowLeft"], [2, "a", 1, "layer"]),  # from nowhere, to the first patch
                (["ArrowDown", "ArrowRight", "ArrowRight"], [2, "a", 11, "layer"]),
                (["ArrowDown"], [2, "a", 11, "layer"]),  # the edge
                (["j"], [3, "a", 11, "layer"]),
                (["j", "k", "s"], [3, "a", 11, "all"]),
                (["n"], [3, "b", None, "all"]),
                (["ArrowRight", "n", "p", "Escape"], [3, "b", None, "all"]),
            ):
                for key in keys:
                    press(key)
                assert page.page.evaluate(at) == expected
            assert page.page.evaluate("document.activeElement.className") == "map"
            press("q")
            assert page.page.locator("#first").input_value() == "contribution"
            page.page.locator("#chart-ffn_cosine svg[role=slider]").focus()
            press("ArrowLeft")
            assert page.page.evaluate("report.state.layer") == 2
            press("End")
            assert page.page.locator("#layer").input_value() == "4"
            press("j")  # letters are the explorer's alone
            assert page.page.evaluate("report.state.layer") == 4

    def test_everything_has_a_name(self, browser: Browser, report: Path) -> None:
        with opened(browser, report) as page:
            nameless = page.page.evaluate(
                """() => [...document.querySelectorAll("button, select, input, a, [role=slider], [role=application]")]
                .filter(e => e.checkVisibility() && !(e.getAttribute("aria-label") || e.textContent.trim()
                  || e.labels?.length)).map(e => e.outerHTML.slice(0, 80))"""
            )
            assert nameless == []
            spoken = page.page.locator("body").aria_snapshot()
            kinds = "button|combobox|slider|application|link|region|article"
            assert len(re.findall(rf"- (?:{kinds})\b", spoken)) > 40
            assert re.findall(rf"- (?:{kinds})(?! \")[^\n]*", spoken) == []


class TestPlots:
    def test_hovering_reads_all_plots_at_the_layer(self, browser: Browser, run: Path, report: Path) -> None:
        found = findings.find(LayerProfile.load(run), tau=synthetic.TAU)
        assert found.layers is not None
        with opened(browser, report) as page:
            plot = page.page.locator("#chart-ffn_cosine svg[role=slider]")
            plot.scroll_into_view_if_needed()
            for layer in (0, 3):
                box = plot.bounding_box()
                assert box is not None
                left, right = 58, box["width"] - 12
                page.page.mouse.move(box["x"] + left + (layer + 0.5) / 5 * (right - left), box["y"] + 100)
                said = page.text("#chart-ffn_cosine .readout")
                row = found.layers.iloc[layer]
                numbers = re.fullmatch(rf"Layer {layer}: visual tokens ([\d.]+) · text tokens ([\d.]+)", said)
                assert numbers is not None
                assert float(numbers[1]) == pytest.approx(row["visual_cosine"], abs=6e-6)
                assert float(numbers[2]) == pytest.approx(row["text_cosine"], abs=6e-6)
                assert page.text("#chart-value_norm .readout").startswith(f"Layer {layer}: ")
            page.page.mouse.down()
            page.page.mouse.up()
            assert page.page.locator("#layer").input_value() == "3"

    def test_downloads(self, browser: Browser, run: Path, report: Path, tokens: pd.DataFrame) -> None:
        found = findings.find(LayerProfile.load(run), tau=synthetic.TAU)
        assert found.layers is not None

        def download(selector: str) -> list[dict[str, str]]:
            with page.page.expect_download() as waited:
                page.page.locator(selector).click()
            text = Path(waited.value.path()).read_text(encoding="utf-8")
            return list(csv.DictReader(text.splitlines()))

        with opened(browser, report, "#sample=b") as page:
            rows = download("#chart-ffn_cosine .csv")
            np.testing.assert_allclose(
                [float(row["visual tokens"]) for row in rows], found.layers["visual_cosine"]
            )
            rows = download("#tables .csv[data-table=layers-0]")
            np.testing.assert_allclose(
                [float(row["FFN cosine, text"]) for row in rows], found.layers["text_cosine"]
            )
            rows = download("#download-tokens")
            assert len(rows) == 5 * N_VISUAL
            own = tokens[tokens["sample"] == "b"].sort_values(["layer", "position"])
            for name in ("attention", "ffn_cosine", "value_norm"):
                np.testing.assert_allclose([float(row[name]) for row in rows], own[name], rtol=2e-5)
            assert [int(row["sink_dim"]) for row in rows] == own["sink_dim"].tolist()
            assert [row["role"] for row in rows if row["role"]] == ["anchor", "anchor"]

    def test_sorting(self, browser: Browser, report: Path) -> None:
        with opened(browser, report) as page:
            head = page.page.locator("#layers-0 th[scope=col]").nth(1)
            for direction in ("ascending", "descending"):
                head.locator("button").click()
                assert head.get_attribute("aria-sort") == direction
                found = page.page.eval_on_selector_all(
                    "#layers-0 tbody tr", "rows => rows.map(row => Number(row.cells[1].dataset.value))"
                )
                assert found == sorted(found, reverse=direction == "descending")
                assert len(set(found)) == 5


def test_values_that_a_logarithmic_axis_cannot_show(browser: Browser, tmp_path: Path) -> None:
    table = runs.tokens()
    table["contribution"] = 0.0
    table.loc[table["layer"] == 2, "value_norm"] = 0.0
    path = runs.add_examples(runs.write(tmp_path / "run", table), {"a": runs.picture()})
    with opened(browser, write_report(path), "#layer=1") as page:
        assert page.text("#chart-contribution .missing") == "All values are 0."
        assert not page.page.locator("#chart-attention_contribution").is_visible()
        page.page.locator("#layer").fill("2")
        assert page.text("#chart-value_norm .readout") == "Layer 2: visual tokens 0 · text tokens 0"
        assert page.page.locator("#chart-value_norm circle.ring").count() == 0
        page.page.locator("#layer").fill("3")
        assert page.page.locator("#chart-value_norm circle.ring").count() == 2


class TestLooks:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_can_be_read(self, scheme: str, browser: Browser, report: Path) -> None:
        with opened(browser, report, "#sample=b&layer=2&patch=5", scheme=scheme) as page:
            found = page.contrasts()
            assert len(found) > 200
            assert [each for each in found if each[1] < 4.5] == []
            dark = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (max(map(int, re.findall(r"\d+", dark))) < 60) == (scheme == "dark")

    @pytest.mark.parametrize("width", [375, 700, 1100])
    def test_nothing_is_wider_than_the_page(self, width: int, browser: Browser, report: Path) -> None:
        with opened(browser, report, "#sample=b&layer=2&patch=5", width=width) as page:
            assert page.page.evaluate("document.documentElement.scrollWidth") == width
            over = page.page.evaluate(
                """() => [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, svg, pre"))
                .filter(e => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 0.5)
                .map(e => e.outerHTML.slice(0, 80))"""
            )
            assert over == []

    def test_the_theme_can_be_chosen(self, browser: Browser, report: Path) -> None:
        with opened(browser, report, "#theme=dark") as page:
            back = "getComputedStyle(document.body).backgroundColor"
            dark = page.page.evaluate(back)
            page.page.locator("#theme").click()
            assert page.page.evaluate(back) != dark


class TestOnAPhone:
    def test_the_numbers_of_a_patch_are_in_sight(self, browser: Browser, report: Path) -> None:
        with opened(browser, report, width=375) as page:
            page.page.set_viewport_size({"width": 375, "height": 280})
            page.page.locator(".map").first.scroll_into_view_if_needed()
            point(page, 4)
            page.page.mouse.down()
            page.page.mouse.up()
            assert page.page.locator("#patch h4").is_visible()
            top, bottom = page.page.evaluate(
                "(({top, bottom}) => [top, bottom])(document.querySelector('#patch h4').getBoundingClientRect())"
            )
            assert 0 <= top < bottom <= 280


class TestTilesAndSeveralImages:
    def test_each_cell_shows_its_own_token(self, browser: Browser, tmp_path: Path) -> None:
        """Two images: the first of 1 x 2 tiles of 2 x 3 tokens with a thumbnail, the second plain, 3 rows of 2."""
        world = synthetic.World(samples=("a",), side=5, cosines=runs.COSINES)
        table = synthetic.tokens(world)
        table = table[(table["kind"] == "text") | (table["position"] <= 24)].copy()
        places = [(0, tile, row, col) for tile in (0, 1, -1) for row in range(2) for col in range(3)]
        places += [(1, 0, row, col) for row in range(3) for col in range(2)]
        for number, name in enumerate(("image", "tile", "row", "col")):
            visual = table["kind"] == "visual"
            table.loc[visual, name] = [
                places[position - 1][number] for position in table.loc[visual, "position"]
            ]
        path = runs.write(tmp_path / "run", table, world)
        picture = runs.picture(96, 32)
        images = [
            {"file": "0-0.png", "grid": [2, 3], "tile_grid": [1, 2]},
            {"file": "0-1.png", "grid": [3, 2], "tile_grid": [1, 1]},
        ]
        runs.add_examples(path, {"a": picture}, images=images)
        Image.new("RGB", (20, 30), "teal").save(path / "examples" / "0-1.png")
        tokens = LayerProfile.load(path).tokens
        tokens = tokens[tokens["kind"] == "visual"]
        with opened(browser, write_report(path), "#layer=3&second=") as page:
            captions = page.page.locator(".original figcaption").all_inner_texts()
            assert captions == [
                "image 1 of 2, 1 × 2 tiles, as the model sees it; 2 × 6 visual tokens",
                "image 1 of 2, thumbnail; 2 × 3 visual tokens",
                "image 2 of 2, as the model sees it; 3 × 2 visual tokens",
            ]
            sources = page.page.eval_on_selector_all(".map img", "all => all.map(image => image.src)")
            assert (
                sources[0] == sources[1] != sources[2]
            )  # the thumbnail is of the image that the tiles are of
            # The second row of the second tile; the thumbnail's last cell; the second image's third row.
            for which, grid, cell, place in (
                (0, (2, 6), 6 + 4, (0, 1, 1, 1)),
                (1, (2, 3), 5, (0, -1, 1, 2)),
                (2, (3, 2), 4, (1, 0, 2, 0)),
            ):
                page.page.locator(".map").nth(which).scroll_into_view_if_needed()
                point(page, cell, which, grid)
                token = places.index(place)
                expected = values(tokens, "a", 3, "attention")
                assert float(numbers(page)["attention"]) == pytest.approx(expected[token], rel=6e-5)
                shown = page.page.evaluate(
                    "([which, x, y]) => [...document.querySelectorAll('.map canvas')[which].getContext('2d')"
                    ".getImageData(x, y, 1, 1).data]",
                    [which, cell % grid[1], cell // grid[1]],
                )
                # One colour scale for all pictures of a sample.
                assert_looks(np.array(shown, float), painted(expected[[token]], 0, expected.max(), root=True))
            assert "image 1, thumbnail, row 1, column 2" not in page.text("#patch")
            assert "image 2, tile 0, row 2, column 0, position 23" in page.text("#patch h4")


class TestPrunedAnswers:
    def test_dropped_tokens_are_covered_from_their_layer_on(self, browser: Browser, tmp_path: Path) -> None:
        world = synthetic.World(sinks=runs.SINKS, cosines=runs.COSINES)
        path = tmp_path / "run"
        runs.write(path, runs.tokens(world), world, weights_hash=WEIGHTS)
        samples = pd.DataFrame(
            {"sample": ["a", "b"], "task": "", "images": ["k" * 16, "m" * 16], "n_images": 1}
        )
        samples.astype({"n_images": "int32"}).to_parquet(path / "samples.parquet", index=False)
        runs.add_examples(path, {"a": runs.picture(), "b": runs.picture()})
        kept = {"1": [1, 2, 3, 9, 10], "3": [2, 9]}
        answer = {
            "prompt": "what is a?", "images_key": "k" * 16, "weights_hash": WEIGHTS, "kept": kept,
            "pruned": {"answer": "<b>two</b>"},
            "pruner": {"method": "capa", "layers": [1, 3], "keep": [0.3, 0.1], "score_at": "previous"},
        }  # fmt: skip
        (tmp_path / "answer.json").write_text(json.dumps(answer))
        file = write_report([path, tmp_path / "answer.json"])
        label = "capa, keep 0.3 and 0.1 before layers 1, 3"
        with opened(browser, file, f"#sample=a&pruned={quote(label)}&patch=1") as page:
            assert f"{label} <b>two</b>" in page.text("#answers")
            for layer, seen in (
                (0, range(1, 17)),
                (1, kept["1"]),
                (2, kept["1"]),
                (3, kept["3"]),
                (4, kept["3"]),
            ):
                page.page.locator("#layer").fill(str(layer))
                path_data = page.page.locator(".map path.dropped").first.get_attribute("d") or ""
                cells = {(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", path_data)}
                assert cells == {((p - 1) % COLS, (p - 1) // COLS) for p in range(1, 17) if p not in seen}
                words = page.text("#patch")
                assert ("dropped" in words, "kept" in words) == (layer >= 3, layer in (1, 2))
            page.page.select_option("#sample", "0 b")
            assert not page.page.locator("#pruned").is_visible()

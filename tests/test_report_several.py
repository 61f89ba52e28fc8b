"""Several runs on one page, in a real browser: the same plots for each, and their numbers side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from capa_probe import findings
from capa_probe.report import write_report
from capa_probe.tables import LayerProfile
from tests import runs, synthetic
from tests.browsing import chromium, needs_chromium, opened
from tests.report_pages import profile

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models; the second has no sinks."""
    folder = tmp_path_factory.mktemp("several")
    first = runs.add_examples(profile(folder / "first"), {"a": runs.picture()})
    world = synthetic.World(cosines=runs.COSINES, seed=3)
    second = runs.write(folder / "second", runs.tokens(world), world, model="other", weights_hash="0" * 64)
    return [first, runs.add_examples(second, {"c": runs.picture(seed=5)})]


@pytest.fixture(scope="module")
def page_of_both(both: list[Path]) -> Path:
    return write_report(both, both[0] / "both.html")


def test_headlines_side_by_side(browser: Browser, page_of_both: Path) -> None:
    with opened(browser, page_of_both) as page:
        assert page.text("h1") == "made-up, other"
        rows = dict(
            page.page.eval_on_selector_all(
                ".compared tbody tr",
                "rows => rows.map(row => [row.cells[0].textContent,"
                " [...row.cells].slice(1).map(cell => cell.querySelector('.value')?.textContent ?? '')])",
            )
        )
        assert rows["attention sinks"] == ["3", "0"]
        assert rows["roles of the sinks"] == ["33 % / 67 %", ""]
        assert rows["layers with a redundant FFN"] == ["2 of 5", "2 of 5"]
        assert rows["pruned to 25 % of visual tokens"] == ["not known", "not known"]
        assert "None in other." in page.text("#chart-sinks figcaption")


def test_the_same_plots_for_each(browser: Browser, page_of_both: Path) -> None:
    with opened(browser, page_of_both) as page:
        assert page.page.locator("#chart-ffn_cosine polyline").count() == 4
        assert page.page.locator("#chart-ffn_cosine polyline.run-1").count() == 2
        assert page.page.locator("#chart-ffn_cosine polygon").count() == 0
        assert (
            page.page.locator("#chart-ffn_cosine line.threshold").count() == 1 + 1
        )  # one eta for both, and its key
        page.page.select_option("#sample", "1 c")
        assert page.page.evaluate("[report.state.run, report.state.sample]") == [1, "c"]
        assert page.text("#sample-facts") == "sample c · task colour · other"


def test_a_link_that_names_no_sample(browser: Browser, page_of_both: Path) -> None:
    with opened(browser, page_of_both, "#sample=a&layer=3") as page:
        page.page.evaluate("() => { location.hash = '#run=1'; }")
        page.page.wait_for_function("report.state.run === 1")
        assert page.text("#question") == "what is c?"
        assert page.page.evaluate("report.state.layer") == 3


def test_numbers_of_all_runs_at_the_layer(browser: Browser, both: list[Path], page_of_both: Path) -> None:
    tables = [findings.find(LayerProfile.load(run), tau=synthetic.TAU).layers for run in both]
    with opened(browser, page_of_both) as page:
        plot = page.page.locator("#chart-ffn_cosine svg[role=slider]")
        plot.focus()
        page.page.keyboard.press("Home")
        for layer in range(5):
            assert page.text("#chart-ffn_cosine .readout") == f"Layer {layer}"
            rows = page.page.locator("#chart-ffn_cosine .legend-table tbody tr").all_inner_texts()
            for row, table, name in zip(rows, tables, ("made-up", "other"), strict=True):
                assert table is not None
                shown = row.split()
                assert shown[0] == name
                expected = [table.loc[layer, "visual_cosine"], table.loc[layer, "text_cosine"]]
                assert [float(number) for number in shown[1:]] == pytest.approx(expected, abs=6e-6)
            spoken = plot.get_attribute("aria-valuetext") or ""
            assert re.match(
                rf"Layer {layer}: made-up: visual tokens [\d.]+ · .* other: text tokens [\d.]+$", spoken
            )
            page.page.keyboard.press("ArrowRight")


@pytest.mark.parametrize("width", [375, 1024, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_looks(scheme: str, width: int, browser: Browser, page_of_both: Path) -> None:
    with opened(browser, page_of_both, "#run=1&sample=c&patch=3", width=width, scheme=scheme) as page:
        assert page.page.evaluate("document.documentElement.scrollWidth") == width
        assert [each for each in page.contrasts() if each[1] < 4.5] == []

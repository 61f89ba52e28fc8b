"""Words from data on the page and in its downloads: they stay words, in every place."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import Browser

from capa_probe.report import write_report
from tests import runs, synthetic
from tests.browsing import Opened, chromium, needs_chromium, opened
from tests.report_pages import profile

pytestmark = needs_chromium

#: A formula, the end of a script, an image that acts, quotes, a template, a line separator, and letters turned round.
EVIL = '=1+1</script><img src=x onerror="window.hit = 1">\'`{{ 7 * 7 }}\u2028&amp;\u202ecba; &lt;'
_CLAIM = {"claim": EVIL, "where": EVIL, "verdict": EVIL, "numbers": EVIL, "n": 3}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def evil_run(path: Path, weights: str) -> list[Path]:
    """A profile whose every word is evil, with runs of confirm and run that are no better."""
    world = synthetic.World(samples=(EVIL, "b"), cosines=runs.COSINES)
    runs.write(
        path,
        runs.tokens(world),
        world,
        model=EVIL,
        weights_hash=weights,
        versions={EVIL: EVIL},
        skipped=[{"sample": EVIL, "reason": EVIL}],
        settings={"steps": 0, EVIL: [EVIL]},
    )
    samples = pd.DataFrame({"sample": [EVIL], "task": EVIL, "images": "k" * 16, "n_images": 1})
    samples.astype({"n_images": "int32"}).to_parquet(path / "samples.parquet", index=False)
    runs.add_examples(
        path, {EVIL: runs.picture()}, question=EVIL, prompt=EVIL, generated=EVIL, answers=[EVIL], task=EVIL
    )
    confirm = path.with_name(f"{path.name}-confirm")
    (confirm / "tables").mkdir(parents=True)
    facts = {"format_version": 1, "model": EVIL, "family": "llava", "weights_hash": weights, "n_layers": 5}
    facts |= {"d_model": 1024, "data_fingerprint": "0", "n_samples": 3}
    (confirm / "benchmark.json").write_text(json.dumps({"format_version": 1, "begun_with": facts}))
    (confirm / "manifest.json").write_text(json.dumps(facts))
    pd.DataFrame([_CLAIM]).to_parquet(confirm / "tables" / "claims.parquet", index=False)
    pruner = {"method": EVIL, "layers": [1], "keep": 0.3, "score_at": "previous"}
    answer = {"prompt": EVIL, "images_key": "k" * 16, "weights_hash": weights, "kept": {"1": [1, 2]}}
    answer |= {"pruned": {"answer": EVIL}, "pruner": pruner}
    file = path.with_name(f"{path.name}.json")
    file.write_text(json.dumps(answer))
    return [path, confirm, file]


@pytest.fixture(scope="module", params=[1, 2])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One such run, and two."""
    folder = tmp_path_factory.mktemp("evil") / "<img src=x onerror=window.hit=1>\u202e"
    paths = [path for n in range(request.param) for path in evil_run(folder / f"{n}", f"{n}" * 64)]
    return write_report(paths, folder.parent / "report.html")


def downloaded(page: Opened, selector: str) -> list[list[str]]:
    """Rows of a download, its head first."""
    with page.page.expect_download() as waited:
        page.page.locator(selector).first.click()
    text = Path(waited.value.path()).read_text(encoding="utf-8")
    return list(csv.reader(io.StringIO(text, newline="")))


def test_words_stay_words(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        said = page.page.evaluate(
            """() => Object.fromEntries([
              "h1", ".model", "#question", "#prompt", "#answers", "#sample-facts", "#sample", "#pruned", "#charts",
              "#claims-0", "#settings .card", "#settings pre", "title",
            ].map(place => [place, [...document.querySelectorAll(place)].map(each => each.textContent).join("")]))"""
        )
        several = page.page.evaluate("report.content.runs.length") > 1
        # The title has all names where they are short; a single run is not named beside its own numbers.
        unnamed = ("h1", "title") if several else (".model", "#charts")
        for place, words in said.items():
            if place == "#settings pre":  # names in commands are quoted
                assert "<img src=x onerror=window.hit=1>" in words
            elif place not in unnamed:
                assert EVIL in words, place
        # An image that cannot be loaded has said so before a later one has.
        page.page.evaluate(
            "new Promise(done => { const late = new Image(); late.onerror = done; late.src = 'data:,'; })"
        )
        assert page.page.evaluate("window.hit") is None
        assert page.page.locator("img[src=x]").count() == 0
        assert page.page.locator("script").count() == 2


def test_directions_stay_inside(browser: Browser, report: Path) -> None:
    """Words that turn the direction of writing are set apart from those beside them."""
    with opened(browser, report) as page:
        isolated = f"\u2068{EVIL}\u2069"
        facts = page.page.locator("#sample-facts").evaluate("each => each.textContent")
        assert facts.startswith(f"sample {isolated} · task {isolated}")
        assert page.page.locator("#sample option").first.evaluate("each => each.textContent") == (
            f"{isolated} ({isolated})"
        )
        bare = page.page.evaluate(
            """(evil) => [...document.querySelectorAll("h1, h2, .facts, .original, dd, th")]
              .filter(e => e.checkVisibility() && e.childNodes.length > 1)
              .filter(e => [...e.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.includes(evil)))
              .map(e => e.outerHTML.slice(0, 60))""",
            EVIL,
        )
        assert bare == []


def test_downloads_hold_no_formula(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        rows = downloaded(page, "#tables .csv[data-table=claims-0]")
        assert rows == [["claim", "where", "verdict", "numbers"], [f"'{EVIL}"] * 4]
        tokens = downloaded(page, "#download-tokens")
        assert {row[0] for row in tokens[1:]} == {f"'{EVIL}"}
        several = page.page.evaluate("report.content.runs.length") > 1
        for name, named in (("value_norm", several), ("attention_contribution", True)):
            cells = [cell for row in downloaded(page, f"#chart-{name} .csv") for cell in row]
            assert not [cell for cell in cells if cell.startswith("=")]
            assert any(EVIL in cell for cell in cells) == named


def test_fields(browser: Browser, report: Path) -> None:
    fields: list[tuple[object, str]] = [
        ("=1", "'=1"), ("+a", "'+a"), ("-a", "'-a"), ("@a", "'@a"), (" =1", "' =1"), ("\uff1d1", "'\uff1d1"),
        ("\ta", '"\'\ta"'), ("\na", '"\'\na"'), ("a;=1", '"a;=1"'), ('a"b', '"a""b"'), ("a,b", '"a,b"'),
        ("-0.5", "-0.5"), (-0.5, "-0.5"), ("+5", "+5"), (None, ""), ("plain = text", "plain = text"),
    ]  # fmt: skip
    with opened(browser, report) as page:
        for value, written in fields:
            assert page.page.evaluate("value => report.csv([[value]])", value) == f"{written}\r\n"


def test_no_other_script_may_run(browser: Browser, tmp_path: Path) -> None:
    file = write_report(runs.add_examples(profile(tmp_path / "run"), {"a": runs.picture()}))
    page = browser.new_page()
    page.goto(file.as_uri())
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.hit = 1";
          document.body.append(script);
          document.body.insertAdjacentHTML("beforeend", '<p id="late" onclick="window.hit = 2">x</p>');
        }"""
    )
    page.locator("#late").dispatch_event("click")
    assert page.evaluate("window.hit") is None
    page.close()

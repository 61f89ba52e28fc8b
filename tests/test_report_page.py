"""The report in a real browser: it renders, loads nothing, overflows nothing, in light and dark, wide and narrow."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capa_probe import findings
from capa_probe.report import write_report
from capa_probe.tables import LayerProfile
from tests import runs, synthetic

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

#: Narrow as a phone, and as wide as the page gets.
WIDTHS = (400, 1200)
#: The visual token that takes nearly all attention: position 14 of sample a is row 1, column 5 of 2 x 8.
BRIGHT, ROW, COL = 14, 1, 5

_LOOK = """
<script>
addEventListener("load", async () => {
  const overflowing = [...document.querySelectorAll("body *")]
    .filter(e => !e.closest(".scroll, svg") && e.getBoundingClientRect().right > innerWidth + 0.5)
    .map(e => e.outerHTML.slice(0, 80));
  const drawn = await Promise.all([...document.querySelectorAll("image")].map(async e => {
    const image = new Image(); image.src = e.getAttribute("href");
    try { await image.decode(); return image.naturalWidth; } catch { return 0; }
  }));
  const boxes = [...document.querySelectorAll(".panel svg")].map(e => {
    const box = e.getBoundingClientRect();
    return [e.getAttribute("aria-label"), box.x, box.y + scrollY, box.width, box.height];
  });
  parent.postMessage(JSON.stringify({
    width: innerWidth, scrollWidth: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
    overflowing, boxes, drawn, images: [...document.images].map(i => i.complete ? i.naturalWidth : 0),
    loaded: performance.getEntriesByType("resource").map(e => e.name).filter(name => !name.startsWith("data:")),
  }), "*");
});
</script>
"""


def browse(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
    ]
    profile = f"--user-data-dir={folder / 'browser'}"
    return subprocess.run(
        [*command, profile, "--enable-logging=stderr", *arguments],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = runs.tokens()
    visual = (table["kind"] == "visual") & (table["sample"] == "a")
    table.loc[visual, "attention"] = np.where(table.loc[visual, "position"] == BRIGHT, 0.9, 1e-4)
    path = runs.write(tmp_path_factory.mktemp("page") / "run", table, model="m" * 90)
    prof = LayerProfile.load(path)
    findings.write(prof, findings.find(prof, tau=synthetic.TAU), path)
    long = "w" * 200 + " and <b>more</b>"
    runs.add_examples(path, {"a": runs.picture(), "b": runs.picture(seed=1)}, question=long, prompt=long)
    return write_report(path)


@pytest.fixture(scope="module")
def seen(report: Path) -> dict[int, dict[str, Any]]:
    """What a script finds in the page, by width; a copy without the policy that forbids scripts, in frames."""
    folder = report.parent
    text = report.read_text(encoding="utf-8")
    open_copy = re.sub(r"<meta http-equiv=[^>]*>", "", text).replace("</body>", f"{_LOOK}</body>")
    assert open_copy.count("<script>") == 1
    (folder / "copy.html").write_text(open_copy, encoding="utf-8")
    frames = "".join(
        f'<iframe src="copy.html" style="width:{width}px;height:900px;border:0"></iframe>' for width in WIDTHS
    )
    wrapper = f"""<pre></pre>{frames}<script>
        addEventListener("message", e => document.querySelector("pre").append(e.data, "\\n"));</script>"""
    (folder / "frames.html").write_text(wrapper, encoding="utf-8")
    done = browse(
        "--virtual-time-budget=20000", "--dump-dom", (folder / "frames.html").as_uri(), folder=folder
    )
    (said,) = re.findall(r"<pre>(.*?)</pre>", done.stdout, flags=re.DOTALL)
    found = [json.loads(unescape(line)) for line in said.splitlines()]
    return {each["width"]: each for each in found}


@pytest.fixture(scope="module")
def screenshots(report: Path) -> dict[str, tuple[np.ndarray, str]]:
    """The page itself, light and dark: pixels, and what the browser logged."""
    taken = {}
    for theme, value in (("light", 1), ("dark", 0)):
        file = report.parent / f"{theme}.png"
        done = browse(
            f"--blink-settings=preferredColorScheme={value}",
            f"--window-size={WIDTHS[1]},9000",
            f"--screenshot={file}",
            report.as_uri(),
            folder=report.parent,
        )
        with Image.open(file) as image:
            taken[theme] = np.asarray(image.convert("RGB"), float), done.stderr
    return taken


class TestPage:
    def test_every_image_decodes(self, seen: dict[int, dict[str, Any]]) -> None:
        for page in seen.values():
            assert len(page["images"]) == 2
            assert len(page["drawn"]) > 20
            assert min(page["images"] + page["drawn"]) > 0

    def test_nothing_is_loaded(self, seen: dict[int, dict[str, Any]]) -> None:
        for page in seen.values():
            assert page["loaded"] == []

    @pytest.mark.parametrize("width", WIDTHS)
    def test_nothing_overflows(self, width: int, seen: dict[int, dict[str, Any]]) -> None:
        assert seen[width]["overflowing"] == []
        assert seen[width]["scrollWidth"] == width

    def test_panels_keep_the_proportions_of_the_image(self, seen: dict[int, dict[str, Any]]) -> None:
        for page in seen.values():
            assert len(page["boxes"]) == 20  # two samples, five layers, attention and contribution
            for _, _, _, width, height in page["boxes"]:
                assert width > 100
                assert width / height == pytest.approx(4, rel=0.02)

    def test_the_browser_has_nothing_to_say(self, screenshots: dict[str, tuple[np.ndarray, str]]) -> None:
        for _, log in screenshots.values():
            assert "CONSOLE" not in log

    def test_light_and_dark(self, screenshots: dict[str, tuple[np.ndarray, str]]) -> None:
        light, dark = (screenshots[theme][0] for theme in ("light", "dark"))
        # Mostly page and paper, with ink on it.
        assert np.median(light) > 240
        assert np.median(dark) < 40
        assert (light.mean(axis=-1) < 60).mean() > 0.002
        assert (dark.mean(axis=-1) > 180).mean() > 0.002

    def test_attention_is_bright_where_it_is(
        self, seen: dict[int, dict[str, Any]], screenshots: dict[str, tuple[np.ndarray, str]]
    ) -> None:
        panels = [box for box in seen[WIDTHS[1]]["boxes"] if box[0].startswith("attention")][
            :5
        ]  # of sample a
        for pixels, _ in screenshots.values():
            for _, x, y, width, height in panels:
                shown = pixels[round(y) : round(y + height), round(x) : round(x + width)].mean(axis=-1)
                cells = [
                    [
                        shown[int(height * (r + 0.3) / 2) : int(height * (r + 0.7) / 2),
                              int(width * (c + 0.3) / 8) : int(width * (c + 0.7) / 8)].mean()
                        for c in range(8)
                    ]
                    for r in range(2)
                ]  # fmt: skip
                assert np.argmax(cells) == ROW * 8 + COL
                others = np.delete(np.ravel(cells), ROW * 8 + COL)
                assert cells[ROW][COL] > 1.5 * others.max()

"""A real browser for tests: Chromium without a window, and pages that must neither complain nor load anything."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine, in which the report could be opened"
)

#: For each piece of text that is shown: its words, and the contrast of its colour to what is behind it (WCAG 2).
_CONTRASTS = """() => {
  const parse = (text) => {
    const numbers = text.match(/[\\d.]+/g).map(Number);
    const scale = text.startsWith("color(") ? 255 : 1;
    return [...numbers.slice(0, 3).map((n) => n * scale), numbers[3] ?? 1];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((n, i) => a * n + (1 - a) * below[i]);
  const behind = (element) => {
    const colours = [];
    for (let e = element; e; e = e.parentElement) colours.push(parse(getComputedStyle(e).backgroundColor));
    const canvas = matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
    return colours.reverse().reduce((below, colour) => over(colour, below), canvas);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((n) => n / 255).map((n) => n <= 0.04045 ? n / 12.92 : ((n + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, words = node.data.trim();
    if (!words || !element.checkVisibility() || ["SCRIPT", "OPTION"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const below = behind(element);
    const colour = over(parse(element instanceof SVGElement ? style.fill : style.color), below);
    const [high, low] = [luminance(colour), luminance(below)].sort((a, b) => b - a);
    found.push([words.slice(0, 60), (high + 0.05) / (low + 0.05)]);
  }
  return found;
}"""


@dataclass
class Opened:
    """A page in the browser.

    Attributes:
        page: Playwright's.
        complaints: errors and warnings of its console, and exceptions.
        requests: addresses that it asked for, but for itself and what it holds.
    """

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def pixels(self, selector: str) -> np.ndarray:
        """Red, green, blue and opacity of each pixel of a canvas: (row, column, 4)."""
        found = self.page.evaluate(
            """(selector) => {
              const canvas = document.querySelector(selector);
              const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
              copy.drawImage(canvas, 0, 0);
              const image = copy.getImageData(0, 0, canvas.width, canvas.height);
              return [canvas.height, canvas.width, Array.from(image.data)];
            }""",
            selector,
        )
        return np.array(found[2], float).reshape(found[0], found[1], 4)

    def contrasts(self) -> list[tuple[str, float]]:
        """Words that are shown, and the contrast of each to its background."""
        return [(str(words), float(ratio)) for words, ratio in self.page.evaluate(_CONTRASTS)]

    def text(self, selector: str) -> str:
        """The words of an element, with single spaces."""
        return re.sub(r"\s+", " ", self.page.locator(selector).inner_text()).strip()


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, for a ``with`` block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Browser, file: Path, hash_: str = "", width: int = 1100, scheme: str = "light"
) -> Iterator[Opened]:
    """A page from disk, for a ``with`` block, at whose end it must have neither complained nor loaded anything."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if scheme == "dark" else "light",
        accept_downloads=True,
        offline=True,
    )
    seen = Opened(context.new_page())
    own = file.as_uri()

    def request(address: str) -> None:
        if address.split("#", maxsplit=1)[0] != own and not address.startswith(("data:", "blob:")):
            seen.requests.append(address)

    seen.page.on("request", lambda each: request(each.url))
    seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    seen.page.on(
        "console",
        lambda message: (
            seen.complaints.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    try:
        seen.page.goto(own + hash_)
        yield seen
        assert seen.complaints == []
        assert seen.requests == []
    finally:
        context.close()

"""A report as tests read it without a browser: its elements, its words, and the data that its scripts read."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from capa_probe import findings
from capa_probe.tables import LayerProfile
from tests import runs, synthetic

#: Elements that have no end tag.
VOID = {"meta", "img", "br", "hr", "link", "input"}


#: Hash of the weights of made-up models.
WEIGHTS = "f" * 64


def profile(path: Path, seed: int = 0, **manifest: object) -> Path:
    """A finished run with findings: samples a, b and c, 5 layers, 2 x 8 visual tokens, sinks in layers 2 and 4."""
    world = synthetic.World(sinks=runs.SINKS, cosines=runs.COSINES, seed=seed)
    runs.write(path, runs.tokens(world), world, **{"weights_hash": WEIGHTS, **manifest})
    prof = LayerProfile.load(path)
    findings.write(prof, findings.find(prof, tau=synthetic.TAU), path)
    return path


class Page(HTMLParser):
    """A page as a list of elements and as the words a reader sees; refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        kinds = {"style": self.styles, "script": self.scripts}
        kinds.get(self._open[-1] if self._open else "", self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def content(self) -> dict[str, Any]:
        """What the page's scripts read."""
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found

    @property
    def examples(self) -> list[dict[str, Any]]:
        """Of the first run."""
        found: list[dict[str, Any]] = self.content["runs"][0]["examples"]
        return found

    def chart(self, name: str) -> dict[str, Any]:
        """One of the plots."""
        (found,) = [chart for chart in self.content["charts"] if chart["name"] == name]
        return dict(found)

    def attributes(self, *names: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements for name in names if name in attributes]


def read(file: Path) -> Page:
    return Page(file.read_text(encoding="utf-8"))


def decoded(text: str) -> np.ndarray:
    """A float24 array, read as the module that writes it says: three bytes a value, no sign."""
    content = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, 3).astype(np.uint32)
    bits = (content[:, 0] << 8) | (content[:, 1] << 16) | (content[:, 2] << 24)
    return (bits >> 1).astype("<u4").view("<f4")

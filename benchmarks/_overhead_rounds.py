"""Rounds of measurements: in turns, added to a file, and summed up as ratios within a round."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from capa_probe.files import write_json

RESULTS = Path(__file__).parent / "results"


class Results:
    """Entries of a results file, each of some settings on some machine, with the rounds measured so far.

    Args:
        file: to go on with, or to make.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.entries: list[dict[str, Any]] = []
        if file.exists():
            self.entries = json.loads(file.read_text(encoding="utf-8"))["entries"]

    def rounds(self, settings: Mapping[str, Any]) -> int:
        """How many rounds of these settings the file holds."""
        found = self._find(settings)
        return 0 if found is None else min((len(times) for times in found["rounds"].values()), default=0)

    def add(self, settings: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        """Add a round: variant to what was measured of it."""
        entry = self._find(settings)
        if entry is None:
            entry = {"settings": json.loads(json.dumps(settings)), "rounds": {name: [] for name in measured}}
            self.entries.append(entry)
        for name, values in measured.items():
            entry["rounds"][name].append(values)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {"entries": self.entries})

    def _find(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        same = json.loads(json.dumps(settings))
        return next((entry for entry in self.entries if entry["settings"] == same), None)


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The order of the variants in a round: every other one backwards."""
    return list(reversed(names)) if number % 2 else list(names)


def ratios(entry: Mapping[str, Any], name: str, clock: str, base: str = "plain") -> list[float]:
    """Time of a variant over that of another one of the same round."""
    pairs = zip(entry["rounds"][name], entry["rounds"][base], strict=True)
    return [each[clock] / plain[clock] for each, plain in pairs]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, middle, third = quantiles(values, n=4, method="inclusive")
    return first, middle, third


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, with quartiles in brackets."""
    first, middle, third = quartiles(values)
    return f"{middle:.{digits}f} ({first:.{digits}f}-{third:.{digits}f})"

"""All figures of the set, in their order."""

from __future__ import annotations

from capa_probe.figures.entry import Entry
from capa_probe.figures.of_benchmark import BENCHMARK_ENTRIES

#: By number.
ENTRIES: tuple[Entry, ...] = tuple(sorted(BENCHMARK_ENTRIES, key=lambda entry: entry.number))

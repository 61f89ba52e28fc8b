"""The set of figures: from runs, or from the small tables that are kept of them, to files that say what they show."""

from __future__ import annotations

from capa_probe.figure_set.collect import Collected, collect, needed
from capa_probe.figure_set.hashing import tables_hash
from capa_probe.figure_set.keeping import keep_tables, kept_tables, stale, strays
from capa_probe.figure_set.writing import Drawing, drawings, write_set

__all__ = [
    "Collected",
    "Drawing",
    "collect",
    "drawings",
    "keep_tables",
    "kept_tables",
    "needed",
    "stale",
    "strays",
    "tables_hash",
    "write_set",
]

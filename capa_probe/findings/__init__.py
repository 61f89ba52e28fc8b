"""From a finished profile to what a reader wants to see: the analyses, their tables on disk, and the figures."""

from __future__ import annotations

from capa_probe.findings.files import (
    FIGURE_NAMES,
    FIGURES,
    FILES,
    draw,
    read_settings,
    remove,
    write,
)
from capa_probe.findings.finding import CONFIDENCE, Findings, can_analyse, find

__all__ = [
    "CONFIDENCE",
    "FIGURES",
    "FIGURE_NAMES",
    "FILES",
    "Findings",
    "can_analyse",
    "draw",
    "find",
    "read_settings",
    "remove",
    "write",
]

"""``capa-probe``, one file per command. Heavy packages load once the arguments are known to be good."""

from __future__ import annotations

from capa_probe.cli import calibrate, compare, confirm, demo, depth, figures, profile, report, run
from capa_probe.cli.app import app, main

__all__ = [
    "app",
    "calibrate",
    "compare",
    "confirm",
    "demo",
    "depth",
    "figures",
    "main",
    "profile",
    "report",
    "run",
]

"""Several models side by side, from the runs that were made of each; no model runs here."""

from __future__ import annotations

from capa_probe.comparison.page import brief, differences, page, refuted
from capa_probe.comparison.rows import COLUMNS, compare
from capa_probe.comparison.runs import ModelRuns, read_runs

__all__ = ["COLUMNS", "ModelRuns", "brief", "compare", "differences", "page", "read_runs", "refuted"]

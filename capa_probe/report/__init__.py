"""The report on a run: one HTML file with everything in it."""

from __future__ import annotations

from capa_probe.report.build import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "write_report"]

"""The tables of a report, which a reader may sort and download."""

from __future__ import annotations

from dataclasses import replace

from capa_probe.report import listings_of_experiments as experiments
from capa_probe.report import listings_of_findings as found
from capa_probe.report.listing import Listing
from capa_probe.report.runs import ShownRun

_TABLES = (
    found.layers,
    found.roles,
    found.dims,
    found.bimodality,
    found.stability,
    experiments.pruning_costs,
    experiments.budget,
    experiments.depth,
    experiments.claims,
)


def listings(run: ShownRun, number: int) -> list[Listing]:
    """The tables of a run, those that have rows.

    Args:
        run: the run.
        number: its place among the runs, which makes the tables' ids different.
    """
    made = [table(run) for table in _TABLES]
    return [replace(each, name=f"{each.name}-{number}") for each in made if each is not None and each.rows]

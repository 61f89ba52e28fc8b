"""From runs to the tables that the figures are drawn from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from capa_probe.comparison.runs import PROFILE, ModelRuns, read_runs
from capa_probe.errors import CapaProbeError
from capa_probe.figures.entry import Entry, Kind, Source
from capa_probe.figures.registry import ENTRIES
from capa_probe.findings import Findings

#: In a demo model's folder.
TRAINING_FILE, EVALUATION_FILE, _CONFIG = "training.parquet", "evaluation.json", "config.json"
_FINDINGS = ("sinks", "by_layer", "totals", "dims", "bimodality", "stability", "layers")


@dataclass(frozen=True)
class Collected:
    """What figures can be drawn from.

    Attributes:
        models: model -> name of a figure -> its tables by name.
        left_out: why a model has no tables for a figure, one sentence each.
    """

    models: dict[str, dict[str, dict[str, pd.DataFrame]]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def collect(paths: Sequence[str | os.PathLike[str]], entries: Sequence[Entry] = ENTRIES) -> Collected:
    """Read runs, and select of each what the figures show.

    Args:
        paths: folders that ``capa-probe demo``, ``profile``, ``confirm`` or ``depth`` wrote, of each model at most one
            of each kind; and folders of demo models, which hold the log of their training.
        entries: which figures.

    Returns:
        The tables, model by model in the order given.

    Raises:
        CapaProbeError: a folder is no finished run, or nothing can be drawn from any of them.
    """
    folders = [Path(path) for path in paths]
    trained = [folder for folder in folders if (folder / _CONFIG).is_file()]
    runs = [folder for folder in folders if folder not in trained]
    if not folders:
        raise CapaProbeError(
            "No run was given; give folders that demo, profile, confirm or depth wrote, or of demo models."
        )
    found: dict[str, dict[str, dict[str, pd.DataFrame]]] = {}
    left_out: list[str] = []
    for name, kind, source in [*_sources(read_runs(runs) if runs else []), *map(_trained, trained)]:
        tables, asked = found.setdefault(name, {}), set[str]()
        for entry in entries:
            if entry.kind != kind or entry.data in asked:
                continue
            asked.add(entry.data)
            try:
                tables[entry.data] = entry.select(source)
            except CapaProbeError as error:
                left_out.append(f"{entry.name} of {name} is left out: {error}")
    if not any(found.values()):
        raise CapaProbeError(" ".join(left_out) or needed(entries))
    return Collected(found, tuple(left_out))


def needed(entries: Sequence[Entry]) -> str:
    """A sentence on what figures are drawn from, for where nothing that was given is enough."""
    needs: dict[str, list[str]] = {}
    for entry in entries:
        of = "the folder of a demo model" if entry.kind == "training" else f"a run of {entry.kind}"
        more = f" of each of {entry.fewest} models" if entry.fewest > 1 else ""
        needs.setdefault(of + more, []).append(entry.name)
    wanted = "; ".join(f"{', '.join(names)} from {of}" for of, names in needs.items())
    return f"No figure can be drawn from what was given; figures are drawn so: {wanted}."


def _sources(models: Sequence[ModelRuns]) -> Iterator[tuple[str, Kind, Source]]:
    kinds: tuple[Kind, ...] = ("profile", "confirm", "depth")
    for model in models:
        for kind in kinds:
            if kind not in model.folders:
                continue
            folder = model.folders[kind]
            if kind == PROFILE and model.findings is not None:
                found = model.findings
                settings = {"tau": found.tau, "eta": found.eta}
                yield model.name, kind, Source(_tables(found), folder, model.profile, settings)
            else:
                yield model.name, kind, Source(model.tables, folder)


def _tables(findings: Findings) -> dict[str, pd.DataFrame]:
    known = {name: getattr(findings, name) for name in _FINDINGS}
    return {name: table for name, table in known.items() if table is not None}


def _trained(folder: Path) -> tuple[str, Kind, Source]:
    """The log and the evaluation of a demo model."""
    files = [folder / TRAINING_FILE, folder / EVALUATION_FILE]
    for file in files:
        if not file.is_file():
            raise CapaProbeError(
                f"{folder} holds a model without {file.name}; give a run, or the folder of a demo model that has it."
            )
    try:
        log = pd.read_parquet(files[0])
        results = json.loads(files[1].read_text(encoding="utf-8"))
        test = pd.DataFrame([{"task": task, **of} for task, of in results.items()])
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise CapaProbeError(
            f"{folder} holds a damaged {files[0].name} or {files[1].name} ({reason})."
        ) from None
    return folder.resolve().name, "training", Source({"training": log, "evaluation": test}, folder)

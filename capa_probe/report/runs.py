"""What a report is made of: one or more profiles, and the runs that belong to their models."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from capa_probe.analysis import redundant_layers
from capa_probe.benchmark.store import read_facts, read_tables
from capa_probe.comparison.runs import read_benchmark_manifest
from capa_probe.errors import CapaProbeError
from capa_probe.findings import CONFIDENCE, Findings, find, read_settings
from capa_probe.report.words import model_name
from capa_probe.tables import LayerProfile

#: As many runs as have colours of their own.
MOST_RUNS = 6
DEPTH = "depth"
_HASH_DIGITS = 7


@dataclass
class ShownRun:
    """A profile, what was found in it, and what other runs say of the same model.

    Attributes:
        name: what it is called on the page; no two have the same.
        folder: where it lies.
        prof: its tables.
        findings: what the analyses say; None where they are not possible.
        remarks: what a reader must know before believing them.
        settings: what the findings were asked for.
        tables: of runs of confirm and depth of the same weights, by name.
        sources: folders of these runs.
        answers: contents of files of ``capa-probe run --json``, of the same weights.
    """

    name: str
    folder: Path
    prof: LayerProfile
    findings: Findings | None = None
    remarks: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    sources: list[Path] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def n_layers(self) -> int:
        """Decoder layers of the model."""
        return int(self.prof.manifest["n_layers"])


def read_runs(paths: Sequence[str | os.PathLike[str]], findings: Findings | None = None) -> list[ShownRun]:
    """Read profiles, and give each the other runs of its model.

    Args:
        paths: folders of profiles, in the order in which they are shown; among them folders of ``confirm`` and
            ``depth``, and files that ``capa-probe run --json`` wrote. These belong to the profiles of the same
            weights, wherever the weights lay.
        findings: of the only profile, where they are at hand already.

    Raises:
        CapaProbeError: there is no profile among them, too many, one that cannot be read, two runs of the same kind
            and model, or a run of which no profile was given.
    """
    folders, benchmarks, answers = [], [], []
    for path in map(Path, paths):
        if path.is_file():
            answers.append(path)
        elif path.is_dir() and read_facts(path) is not None:
            benchmarks.append(path)
        else:
            folders.append(path)
    if benchmarks and not folders:
        LayerProfile.load(benchmarks[0])  # says what it is, and what to give
    if not folders:
        raise CapaProbeError(
            f"{', '.join(map(str, paths)) or 'Nothing'} was given, and no profile; give the folder that a profile was "
            "written to."
        )
    if len(folders) > MOST_RUNS:
        raise CapaProbeError(f"{len(folders)} profiles were given; give at most {MOST_RUNS} to one report.")
    if findings is not None and len(folders) > 1:
        raise CapaProbeError(f"findings were given with {len(folders)} profiles; leave them out.")
    profiles = [LayerProfile.load(folder) for folder in folders]
    runs = [
        ShownRun(model_name(prof.manifest), folder, prof)
        for folder, prof in zip(folders, profiles, strict=True)
    ]
    _tell_apart(runs)
    kinds: dict[tuple[str, str], Path] = {}
    for path in benchmarks:
        _add_benchmark(runs, path, kinds)
    for path in answers:
        _add_answer(runs, path)
    for run in runs:  # last, since it takes longer than to refuse
        _analyse(run, findings)
    return runs


def _analyse(run: ShownRun, findings: Findings | None) -> None:
    if findings is None:
        run.settings = read_settings(run.folder)
        run.findings, run.remarks = _find(run.prof, run.settings)
    else:
        run.settings = dict(findings.settings) or read_settings(run.folder)
        run.findings, run.remarks = findings, findings.remarks


def _find(prof: LayerProfile, settings: dict[str, Any]) -> tuple[Findings | None, tuple[str, ...]]:
    """As ``find``, but what cannot be analysed at all, or only in part, is a remark."""
    try:
        findings = find(prof, **settings)
    except CapaProbeError as error:
        remarks = (str(error),)
    else:
        return findings, findings.remarks
    eta = settings["eta"]
    try:  # a model too narrow for tau still has redundant layers
        layers = redundant_layers(prof, eta=eta, confidence=CONFIDENCE)
    except CapaProbeError:
        return None, remarks
    layers.attrs = {"eta": eta, "confidence": CONFIDENCE}
    return Findings(None, None, layers, float("nan"), eta, remarks), remarks


def _tell_apart(runs: list[ShownRun]) -> None:
    """Profiles of models of one name get their folders' as well, and where these are the same, a number."""
    for name in _repeated(runs):
        for run in (run for run in runs if run.name == name):
            run.name = f"{name} ({run.folder.name})"
    for name in _repeated(runs):
        for number, run in enumerate([run for run in runs if run.name == name], 1):
            run.name = f"{name} {number}"


def _repeated(runs: list[ShownRun]) -> list[str]:
    names = [run.name for run in runs]
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def _add_benchmark(runs: list[ShownRun], path: Path, kinds: dict[tuple[str, str], Path]) -> None:
    manifest = read_benchmark_manifest(path)
    weights = str(manifest["weights_hash"])
    kind = DEPTH if manifest.get("experiment") == DEPTH else "confirm"
    if (kind, weights) in kinds:
        raise CapaProbeError(
            f"{kinds[kind, weights]} and {path} were given, two runs of {kind} of the same model; give one of them."
        )
    kinds[kind, weights] = path
    tables = read_tables(path)
    for run in _of_weights(runs, weights, path):
        run.tables |= tables
        run.sources.append(path)


def _add_answer(runs: list[ShownRun], path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        weights = str(content["weights_hash"])
        complete = content.keys() >= {"prompt", "images_key", "pruner", "kept", "pruned"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise CapaProbeError(
            f"{path} is not what capa-probe run --json writes; give such a file, or the folder of a run."
        )
    for run in _of_weights(runs, weights, path):
        run.answers.append(content)


def _of_weights(runs: list[ShownRun], weights: str, path: Path) -> list[ShownRun]:
    own = [run for run in runs if str(run.prof.manifest.get("weights_hash")) == weights]
    if not own:
        raise CapaProbeError(
            f"{path} is of other weights ({weights[:_HASH_DIGITS]}) than the profiles given; give a profile of the "
            "same model as well."
        )
    return own

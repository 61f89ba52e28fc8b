"""Which runs there are of which model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from capa_probe.benchmark.store import read_facts, read_tables
from capa_probe.errors import CapaProbeError
from capa_probe.findings import Findings, find, read_settings
from capa_probe.schema import MANIFEST_FILE
from capa_probe.tables import LayerProfile

PROFILE, CONFIRM, DEPTH = "profile", "confirm", "depth"
#: Digits of a hash that are shown.
SHORT = 7


@dataclass
class ModelRuns:
    """What is known of one model.

    Attributes:
        name: what it is called in the comparison.
        facts: of the model, as every manifest of it has them.
        manifests: kind of run ("profile", "confirm", "depth") -> its manifest.
        folders: kind of run -> where it lies.
        tables: of its runs of confirm and depth, by name.
        profile: its profile; None where none was given.
        findings: what the analyses say of the profile.
    """

    name: str
    facts: dict[str, Any]
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    profile: LayerProfile | None = None
    findings: Findings | None = None


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[ModelRuns]:
    """Read runs of ``capa-probe demo`` or ``profile``, ``confirm`` and ``depth``, and sort them by model.

    Args:
        paths: folders of finished runs, of each model at most one of each kind. Runs of the same weights belong
            together, wherever these lay.

    Returns:
        One entry per model, in the order in which they first come.

    Raises:
        CapaProbeError: there is none, a folder holds no finished run, or two are of one kind and model.
    """
    if not paths:
        raise CapaProbeError("No run was given; give folders that demo, profile, confirm or depth wrote.")
    models: dict[str, ModelRuns] = {}
    for path in map(Path, paths):
        benchmark = path.is_dir() and read_facts(path) is not None
        profile = None if benchmark else LayerProfile.load(path)
        manifest = read_benchmark_manifest(path) if profile is None else profile.manifest
        kind = PROFILE if profile else DEPTH if manifest.get("experiment") == DEPTH else CONFIRM
        if "weights_hash" not in manifest:
            raise CapaProbeError(f"{path} does not say which weights it is of; make the run again.")
        weights = str(manifest["weights_hash"])
        name = Path(str(manifest["model"])).name
        model = models.setdefault(weights, ModelRuns(name, manifest))
        if kind in model.folders:
            raise CapaProbeError(
                f"{model.folders[kind]} and {path} were given, two runs of {kind} of the same model; give one of them."
            )
        model.folders[kind], model.manifests[kind] = path, manifest
        if profile:
            model.profile, model.findings = profile, find(profile, **read_settings(path))
        else:
            model.tables |= read_tables(path)
    _tell_apart(models)
    return list(models.values())


def read_benchmark_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished run of confirm or depth.

    Raises:
        CapaProbeError: the run was not finished, or its manifest is damaged.
    """
    file = path / MANIFEST_FILE
    if not file.is_file():
        raise CapaProbeError(
            f"{path} holds a run that was not finished; give the same command again, and it goes on where it ended."
        )
    try:
        content: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
        if content.keys() >= {"model", "family", "weights_hash", "n_layers", "d_model", "data_fingerprint"}:
            return content
    except (OSError, ValueError, TypeError):
        pass
    raise CapaProbeError(f"{file} is damaged; start the run anew with --overwrite.")


def _tell_apart(models: dict[str, ModelRuns]) -> None:
    names = [model.name for model in models.values()]
    for weights, model in models.items():
        if names.count(model.name) > 1:
            model.name = f"{model.name} {weights[:SHORT]}"

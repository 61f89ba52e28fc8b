"""Which runs there are of which model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from capa_probe.benchmark.store import read_facts, read_tables
from capa_probe.errors import CapaProbeError
from capa_probe.findings import Findings, find, read_settings
from capa_probe.schema import MANIFEST_FILE
from capa_probe.tables import LayerProfile, is_unfinished

PROFILE, CONFIRM, DEPTH = "profile", "confirm", "depth"
#: Digits of a hash that are shown.
SHORT = 7
#: Settings that may differ between models: how many samples, in what batches, drawn from which seed; layers, of which
#: models have more or fewer; and the threshold on sinks, which follows the width and is shown.
_FREE = frozenset({"limit", "batch_size", "seed", "layers", "knockout_layers", "tau", "groups"})
_WANTED = "give folders that demo, profile, confirm or depth wrote"


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
        CapaProbeError: there is none, a folder holds no finished run, two are of one kind and model, or two of one
            kind were made with different settings.
    """
    if not paths:
        raise CapaProbeError(f"No run was given; {_WANTED}.")
    models: dict[str, ModelRuns] = {}
    for path in map(Path, paths):
        profile, manifest = _open(path)
        kind = PROFILE if profile is not None else _benchmark_kind(manifest)
        if not manifest.get("weights_hash"):
            raise CapaProbeError(f"{path} does not say which weights it is of; make the run again.")
        weights = str(manifest["weights_hash"])
        name = Path(str(manifest["model"])).name
        model = models.setdefault(weights, ModelRuns(name, manifest))
        if kind in model.folders:
            raise CapaProbeError(
                f"{model.folders[kind]} and {path} were given, two runs of {kind} of the same model; give one of them."
            )
        model.folders[kind], model.manifests[kind] = path, manifest
        if profile is None:
            model.tables |= read_tables(path)
        model.profile = profile or model.profile
    _refuse_other_settings(models.values())
    for model in models.values():
        if model.profile is not None:
            model.findings = find(model.profile, **read_settings(model.folders[PROFILE]))
    _tell_apart(models)
    return list(models.values())


def _benchmark_kind(manifest: Mapping[str, Any]) -> str:
    return DEPTH if manifest.get("experiment") == DEPTH else CONFIRM


def _open(path: Path) -> tuple[LayerProfile | None, dict[str, Any]]:
    """A profile, or None for a run of confirm or depth; and the manifest."""
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise CapaProbeError(f"{path} {what}; {_WANTED}.")
    if read_facts(path) is not None:
        return None, read_benchmark_manifest(path)
    if not (path / MANIFEST_FILE).is_file() and not is_unfinished(path):
        raise CapaProbeError(f"{path} holds no run ({MANIFEST_FILE} is missing); {_WANTED}.")
    profile = LayerProfile.load(path)
    return profile, profile.manifest


def _refuse_other_settings(models: Iterable[ModelRuns]) -> None:
    """Numbers of one row must have been measured in one way."""
    first: dict[tuple[str, str], tuple[Path, Any]] = {}
    for model in models:
        for kind, folder in model.folders.items():
            for name, value in _settings(kind, folder, model.manifests[kind]).items():
                other, before = first.setdefault((kind, name), (folder, value))
                if before != value:
                    raise CapaProbeError(
                        f"{other} was made with {name}={before} and {folder} with {name}={value}, which cannot be "
                        f"compared; make one of these runs of {kind} anew, with the other's {name}."
                    )


def _settings(kind: str, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in all runs of a kind."""
    found = read_settings(folder) if kind == PROFILE else manifest.get("settings", {})
    return {name: value for name, value in found.items() if name not in _FREE}


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

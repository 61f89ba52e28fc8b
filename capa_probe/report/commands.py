"""The command lines that make a run, and a report, again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capa_probe.probes import PROBES, choose_probes

#: What ``--dtype`` takes.
_DTYPES = ("float32", "bfloat16", "float16")
_PROBES = set(PROBES)
_DEFAULT_PROBES = {probe.name for probe in choose_probes("default")}


def profile(run: Path, manifest: Mapping[str, Any], tau: float | str, eta: float) -> str:
    """The command line that makes a profile, with DATA for its samples; what is a default is left out."""
    settings = manifest.get("settings", {})
    model = str(manifest.get("model", "MODEL"))
    options: list[Any] = ["--out", run]
    for name, flag, default in (
        ("limit", "--limit", None),
        ("steps", "--steps", 0),
        ("batch_size", "--batch-size", 1),
        ("rows", "--rows", "visual" if settings.get("steps") else "all"),
    ):
        if settings.get(name, default) != default:
            options += [flag, settings[name]]
    if manifest.get("dtype") in _DTYPES:
        options += ["--dtype", manifest["dtype"]]
    probes = settings.get("probes")
    if probes and set(probes) != _DEFAULT_PROBES:
        options += ["--probes", "all" if set(probes) == _PROBES else ",".join(probes)]
    if manifest.get("sink_dims"):
        options += ["--sink-dims", ",".join(map(str, manifest["sink_dims"]))]
    if manifest.get("revision"):
        options += ["--revision", manifest["revision"]]
    if tau != "auto":
        options += ["--tau", tau]
    if eta != 0.96:
        options += ["--eta", eta]
    return f"{shlex.join(['capa-probe', 'profile', model])} DATA {shlex.join(map(str, options))}"


def report(paths: Sequence[Path]) -> str:
    """The command line that makes a report of these runs."""
    return shlex.join(["capa-probe", "report", *map(str, paths)])

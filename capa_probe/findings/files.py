"""What the findings leave on disk, and how it is read back and removed.

``write`` puts these files beside the tables of a profile, each under a temporary name and renamed::

    sinks.parquet          one row per sink, with its role
    sinks_by_layer.csv     counted, with their shares        sink_totals.csv      the same for all layers, by role
    sink_dims.csv          dimensions that exceed tau        sink_bimodality.csv  whether log C has two modes
    role_stability.csv     roles over layers and prompts     redundant_layers.csv FFN cosine per layer
    findings.json          settings, remarks, sink dimensions of the model, agreement with the paper
    figures/*.png
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from capa_probe.errors import CapaProbeError
from capa_probe.figures import attention_contribution, ffn_cosine, save
from capa_probe.figures.scatter_tables import COLUMNS, panel_layers
from capa_probe.files import replace
from capa_probe.findings.finding import CONFIDENCE, Findings, find
from capa_probe.tables import LayerProfile

SINKS, FACTS, FIGURES = "sinks.parquet", "findings.json", "figures"
#: Tables in reading order: attribute of the findings to file.
TABLES = {
    "sinks": SINKS,
    "by_layer": "sinks_by_layer.csv",
    "totals": "sink_totals.csv",
    "dims": "sink_dims.csv",
    "bimodality": "sink_bimodality.csv",
    "stability": "role_stability.csv",
    "layers": "redundant_layers.csv",
}
FIGURE_NAMES = ("ffn_cosine", "attention_contribution")
#: What ``write`` may write, relative to the profile's folder.
FILES = (*TABLES.values(), FACTS, *(f"{FIGURES}/{name}.png" for name in FIGURE_NAMES))
#: What ``findings.json`` repeats of what the sinks were found with.
_USED = ("dims", "max_share", "dims_per_layer", "offsets")
#: Where nothing was written: the defaults of ``find``.
_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(find).parameters.items()
    if parameter.default is not parameter.empty
}


def draw(prof: LayerProfile, findings: Findings) -> dict[str, Any]:
    """The figures that the findings allow, by name."""
    figures = {}
    if findings.layers is not None:
        figures["ffn_cosine"] = ffn_cosine(findings.layers, findings.eta)
    if findings.sinks is not None:
        shown = panel_layers(range(int(prof.manifest["n_layers"])))
        where = [("step", "==", 0), ("kind", "==", "visual"), ("layer", "in", shown)]
        figures["attention_contribution"] = attention_contribution(
            prof.select(list(COLUMNS), where), findings.sinks, shown
        )
    return figures


def write(prof: LayerProfile, findings: Findings, folder: str | os.PathLike[str]) -> list[Path]:
    """Write tables and figures into a folder (see the module's docstring).

    Returns:
        The files written, in reading order.

    Raises:
        OSError: the folder cannot be written to.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, file in TABLES.items():
        table: pd.DataFrame | None = getattr(findings, name)
        if table is not None:
            written.append(replace(out / file, partial(_save, table)))
    text = json.dumps(_facts(findings), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    written.append(replace(out / FACTS, lambda path: path.write_text(text, encoding="utf-8")))
    for name, figure in draw(prof, findings).items():
        written += save(figure, out / FIGURES / f"{name}.png")
    return written


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What the findings in a folder were asked for, such that ``find(prof, **settings)`` finds them again.

    Returns:
        ``tau``, ``eta``, ``split``, ``quantile`` and ``groups`` as ``find`` takes them ("auto" stays "auto"); its
        defaults where the folder holds no findings.

    Raises:
        CapaProbeError: the file is damaged, or holds no settings.
    """
    file = Path(folder) / FACTS
    if not file.is_file():
        return dict(_DEFAULTS)
    try:
        asked: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8"))["settings"])
        if asked.keys() == _DEFAULTS.keys():
            tau = asked["tau"]
            return asked | {"tau": tau if isinstance(tau, str) else float(tau), "eta": float(asked["eta"])}
    except (ValueError, KeyError, TypeError):
        pass
    raise CapaProbeError(
        f"{file} does not say what the findings were made with; remove it to use the defaults, or make the findings "
        "again."
    )


def remove(folder: str | os.PathLike[str]) -> None:
    """Remove what :func:`write` wrote, and nothing else."""
    out = Path(folder)
    for name in FILES:
        (out / name).unlink(missing_ok=True)
        (out / f"{name}.tmp").unlink(missing_ok=True)
    if (out / FIGURES).is_dir() and not any((out / FIGURES).iterdir()):
        (out / FIGURES).rmdir()


def _facts(findings: Findings) -> dict[str, Any]:
    used = {} if findings.sinks is None else findings.sinks.attrs
    dims, agreement = findings.model_dims, findings.agreement
    return {
        "tau": findings.tau,
        "eta": findings.eta,
        "settings": dict(findings.settings),
        **{key: used.get(key) for key in _USED},
        "confidence": CONFIDENCE,
        "model_sink_dims": None if dims is None else [_plain(row) for row in dims.to_dict("records")],
        "agreement": None if agreement is None else _plain(dataclasses.asdict(agreement)),
        "remarks": list(findings.remarks),
    }


def _save(table: pd.DataFrame, file: Path) -> None:
    if ".parquet" in file.suffixes:
        table.to_parquet(file, index=False)
    else:
        table.to_csv(file, index=False)


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """JSON has neither NaN nor NA."""
    missing = {
        key
        for key, value in row.items()
        if value is pd.NA or (isinstance(value, float) and math.isnan(value))
    }
    return {str(key): None if key in missing else value for key, value in row.items()}

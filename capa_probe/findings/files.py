"""What the findings leave on disk, and how it is read back and removed.

``write`` puts these files beside the tables of a profile, each under a temporary name and renamed::

    sinks.parquet          one row per sink, with its role
    sinks_by_layer.csv     counted, with their shares        sink_totals.csv      the same for all layers, by role
    sink_dims.csv          dimensions that exceed tau        sink_bimodality.csv  whether log C has two modes
    role_stability.csv     roles over layers and prompts     redundant_layers.csv FFN cosine per layer
    findings.json          thresholds, remarks, sink dimensions of the model, agreement with the paper
    figures/*.png
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from capa_probe.errors import CapaProbeError
from capa_probe.figures import attention_contribution, ffn_cosine, save
from capa_probe.figures.attention_contribution import COLUMNS, panel_layers
from capa_probe.findings.finding import CONFIDENCE, Findings
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
#: What ``findings.json`` repeats of the settings that the sinks were found with.
_SETTINGS = ("tau_given", "split", "quantile", "dims", "max_share", "dims_per_layer", "offsets")


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
            written.append(_replace(out / file, partial(_save, table)))
    text = json.dumps(_facts(findings), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    written.append(_replace(out / FACTS, lambda path: path.write_text(text, encoding="utf-8")))
    for name, figure in draw(prof, findings).items():
        written += save(figure, out / FIGURES / f"{name}.png")
    return written


def read_thresholds(folder: str | os.PathLike[str]) -> tuple[float | str, float]:
    """``tau`` (as it was given) and ``eta`` of the findings in a folder; the defaults where there are none.

    Raises:
        CapaProbeError: the file is damaged.
    """
    file = Path(folder) / FACTS
    if not file.is_file():
        return "auto", 0.96
    try:
        facts: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return facts["tau_given"] if facts["tau_given"] is not None else facts["tau"], float(facts["eta"])
    except (ValueError, KeyError, TypeError):
        raise CapaProbeError(f"{file} cannot be read; remove it, or give tau and eta yourself.") from None


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
        **{key: used.get(key) for key in _SETTINGS},
        "eta": findings.eta,
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


def _replace(file: Path, write_to: Callable[[Path], object]) -> Path:
    temporary = file.with_name(f"{file.name}.tmp")
    write_to(temporary)
    temporary.replace(file)
    return file

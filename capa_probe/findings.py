"""From a finished profile to what a reader wants to see: both analyses, their tables on disk, and the figures.

``write`` puts these files beside the tables of a profile, each under a temporary name and renamed::

    sinks.parquet          one row per sink, with its role       sinks_by_layer.csv     the same, counted
    redundant_layers.csv   FFN cosine per layer                  findings.json          thresholds and remarks
    figures/*.png
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from capa_probe.analysis import classify_sinks, layer_ranges, redundant_layers, sink_summary
from capa_probe.errors import CapaProbeError
from capa_probe.figures import attention_contribution, ffn_cosine, save
from capa_probe.figures.attention_contribution import COLUMNS, panel_layers
from capa_probe.measures import RELATIVE_TAU, TAU, resolve_tau
from capa_probe.tables import LayerProfile

T = TypeVar("T")

SINKS, SINKS_BY_LAYER = "sinks.parquet", "sinks_by_layer.csv"
LAYERS, FACTS, FIGURES = "redundant_layers.csv", "findings.json", "figures"
#: Of the intervals around the mean FFN cosines.
CONFIDENCE = 0.95
FIGURE_NAMES = ("ffn_cosine", "attention_contribution")
_NEEDED_FOR_SINKS = ("attention", "contribution", "sink_strength")
_NEEDED = (*_NEEDED_FOR_SINKS, "ffn_cosine")
#: What ``write`` may write, relative to the profile's folder.
FILES = (SINKS, SINKS_BY_LAYER, LAYERS, FACTS, *(f"{FIGURES}/{name}.png" for name in FIGURE_NAMES))


@dataclass(frozen=True)
class Findings:
    """What the analyses say of a profile.

    Attributes:
        sinks: what ``classify_sinks`` returned; None where the profile lacks what it needs.
        by_layer: sinks per layer.
        layers: what ``redundant_layers`` returned; None where the profile lacks what it needs.
        tau: threshold on sink strength that was used.
        eta: threshold on the FFN cosine.
        remarks: what a reader must know before believing the tables, one sentence each.
    """

    sinks: pd.DataFrame | None
    by_layer: pd.DataFrame | None
    layers: pd.DataFrame | None
    tau: float
    eta: float
    remarks: tuple[str, ...]

    def summary(self) -> pd.DataFrame:
        """One row per layer: ``layer``, then what there is of ``visual_cosine``, ``text_cosine``, ``redundant`` ("yes",
        "visual only", "no"), ``n_sinks``, ``n_dump``, ``n_anchor``, ``n_undetermined``, ``attention_share``.
        """  # noqa: D205
        tables = []
        if self.layers is not None:
            table = self.layers[["layer", "visual_cosine", "text_cosine"]].copy()
            table["redundant"] = "no"
            table.loc[self.layers["redundant"], "redundant"] = "yes"
            table.loc[self.layers["visual_only"], "redundant"] = "visual only"
            tables.append(table)
        if self.by_layer is not None:
            columns = ["layer", "n_sinks", "n_dump", "n_anchor", "n_undetermined", "attention_share"]
            tables.append(self.by_layer[columns])
        if not tables:
            return pd.DataFrame({"layer": pd.Series(dtype=int)})
        return tables[0] if len(tables) == 1 else tables[0].merge(tables[1], on="layer")

    def sentences(self) -> list[str]:
        """The redundant layers in words, then the remarks."""
        if self.layers is None:
            return list(self.remarks)
        redundant = self.layers.loc[self.layers["redundant"], "layer"]
        only = layer_ranges(self.layers.loc[self.layers["visual_only"], "layer"])
        noun = "layer" if len(redundant) == 1 else "layers"
        found = f"{noun} {layer_ranges(redundant)}; for visual tokens only: {only}."
        if redundant.empty:
            found = "no layer."
        return [f"Redundant FFN (visual cosine > {self.eta:g}): {found}", *self.remarks]


def choose_tau(tau: float | str, d_model: int) -> float | str:
    """``tau`` itself, or for "auto" the paper's 20 where the width leaves room for it, and "relative" where not.

    Raises:
        CapaProbeError: the threshold cannot be used at this width.
    """
    if tau == "auto":
        tau = TAU if math.sqrt(d_model) > TAU else "relative"
    resolve_tau(tau, d_model)
    return tau


def find(prof: LayerProfile, tau: float | str = "auto", eta: float = 0.96) -> Findings:
    """Classify sinks and look for redundant layers.

    A profile without the rows or probes that an analysis needs is analysed as far as it goes, and a remark says so.

    Args:
        prof: a profile.
        tau: threshold on sink strength: a number, "relative", or "auto" (see :func:`choose_tau`).
        eta: threshold on the FFN cosine.

    Raises:
        CapaProbeError: a threshold cannot be used, or neither analysis is possible, as without visual tokens.
    """
    width = int(prof.manifest["d_model"])
    chosen = choose_tau(tau, width)
    threshold = resolve_tau(chosen, width)
    remarks: list[str] = []
    if chosen == "relative":
        why = f"; the paper's {TAU:g} needs a wider residual stream" if tau == "auto" else ""
        remarks.append(f"tau is relative: {RELATIVE_TAU:g} * sqrt({width}) = {threshold:g}{why}.")

    probes = prof.manifest.get("settings", {}).get("probes", _NEEDED)
    sinks = by_layer = layers = None
    lacking = [name for name in _NEEDED_FOR_SINKS if name not in probes]
    if prof.rows == "none":
        remarks.append('Sinks were not looked for: rows="none" kept no token rows.')
    elif lacking:
        remarks.append(f"Sinks were not looked for: the profile lacks the probe {' and '.join(lacking)}.")
    else:
        try:
            sinks = _remarking(remarks, lambda: classify_sinks(prof, tau=chosen))
        except CapaProbeError as error:  # the other analysis may still say something
            remarks.append(f"Sinks could not be classified: {error}")
        else:
            by_layer = sink_summary(sinks)
            if sinks.empty:
                remarks.append(_no_sinks(prof, threshold))
    if "ffn_cosine" not in probes:
        remarks.append("Redundant layers were not looked for: the profile lacks the probe ffn_cosine.")
    else:
        layers = _remarking(remarks, lambda: redundant_layers(prof, eta=eta, confidence=CONFIDENCE))
        layers.attrs = {"eta": eta, "confidence": CONFIDENCE}
        if layers["redundant"].any() and not layers["visual_only"].any():
            remarks.append(
                f"In every redundant layer the text tokens' cosine is above eta = {eta:g} too, so that these "
                "layers say nothing particular about visual tokens."
            )
        if layers["redundant"].all():
            remarks.append(
                f"Every layer is above eta = {eta:g} for visual tokens: the threshold does not tell layers apart here."
            )
        if layers["n_samples"].iloc[0] == 1:
            remarks.append("A single sample gives no intervals.")
    if sinks is None and layers is None:
        raise CapaProbeError(" ".join(remarks))
    return Findings(sinks, by_layer, layers, threshold, eta, tuple(remarks))


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
    if findings.sinks is not None and findings.by_layer is not None:
        sinks, by_layer = findings.sinks, findings.by_layer
        written.append(_replace(out / SINKS, lambda file: sinks.to_parquet(file, index=False)))
        written.append(_replace(out / SINKS_BY_LAYER, lambda file: by_layer.to_csv(file, index=False)))
    if findings.layers is not None:
        layers = findings.layers
        written.append(_replace(out / LAYERS, lambda file: layers.to_csv(file, index=False)))
    text = json.dumps(_facts(findings), indent=2, ensure_ascii=False) + "\n"
    written.append(_replace(out / FACTS, lambda file: file.write_text(text, encoding="utf-8")))
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
    return {
        "tau": findings.tau,
        **{
            key: used.get(key)
            for key in ("tau_given", "split", "dims", "max_share", "dims_per_layer", "offsets")
        },
        "eta": findings.eta,
        "confidence": CONFIDENCE,
        "remarks": list(findings.remarks),
    }


def _no_sinks(prof: LayerProfile, threshold: float) -> str:
    where = [("step", "==", 0), ("kind", "==", "visual"), ("layer", ">=", 2)]
    strength = prof.select(["layer", "sink_strength"], where)
    if strength.empty:
        return f"No sinks at tau = {threshold:g}: the model has no layer from 2 on, where sinks count."
    largest, layer = strength.sort_values("sink_strength")[["sink_strength", "layer"]].to_numpy()[-1]
    return (
        f"No sinks at tau = {threshold:g}; the largest sink strength of a visual token is {largest:.3g}, "
        f"in layer {layer:.0f}."
    )


def _remarking(remarks: list[str], analyse: Callable[[], T]) -> T:
    """Run an analysis; its warnings become remarks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = analyse()
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            remarks.append(str(warning.message))
        else:  # another package's, for developers
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result


def _replace(file: Path, write_to: Callable[[Path], object]) -> Path:
    temporary = file.with_name(f"{file.name}.tmp")
    write_to(temporary)
    temporary.replace(file)
    return file

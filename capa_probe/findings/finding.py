"""All analyses of a profile, and what a reader must know before believing them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from capa_probe.analysis import (
    PaperAgreement,
    classify_sinks,
    layer_ranges,
    measure_sink_dims,
    model_sink_dims,
    paper_agreement,
    redundant_layers,
    role_stability,
    sink_bimodality,
    sink_summary,
    sink_totals,
)
from capa_probe.analysis.saying import no_sinks, remarking
from capa_probe.analysis.splits import check_split
from capa_probe.errors import CapaProbeError
from capa_probe.findings import remarks as say
from capa_probe.measures import RELATIVE_TAU, TAU, choose_tau, resolve_tau
from capa_probe.tables import LayerProfile

#: Of the intervals around the mean FFN cosines.
CONFIDENCE = 0.95
_NEEDED_FOR_SINKS = ("attention", "contribution", "sink_strength")
_NEEDED = (*_NEEDED_FOR_SINKS, "ffn_cosine")


@dataclass(frozen=True)
class Findings:
    """What the analyses say of a profile.

    Attributes:
        sinks: what ``classify_sinks`` returned; None where the profile lacks what it needs.
        by_layer: what ``sink_summary`` returned: sinks per layer.
        layers: what ``redundant_layers`` returned; None where the profile lacks what it needs.
        tau: threshold on sink strength that was used.
        eta: threshold on the FFN cosine.
        remarks: what a reader must know before believing the tables, one sentence each.
        totals: what ``sink_totals`` returned: sinks of all layers, by role.
        bimodality: what ``sink_bimodality`` returned.
        stability: what ``role_stability`` returned.
        dims: what ``measure_sink_dims`` returned; known even where sinks could not be classified.
        model_dims: what ``model_sink_dims`` returned.
        agreement: redundant layers beside the paper's; None where the model is none of the paper's three.
        settings: what ``find`` was asked for, as its keyword arguments: ``find(prof, **settings)`` finds it again.
    """

    sinks: pd.DataFrame | None
    by_layer: pd.DataFrame | None
    layers: pd.DataFrame | None
    tau: float
    eta: float
    remarks: tuple[str, ...]
    totals: pd.DataFrame | None = None
    bimodality: pd.DataFrame | None = None
    stability: pd.DataFrame | None = None
    dims: pd.DataFrame | None = None
    model_dims: pd.DataFrame | None = None
    agreement: PaperAgreement | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> pd.DataFrame:
        """One row per layer: ``layer``, then what there is of ``visual_cosine``, ``text_cosine``, ``redundant`` ("yes",
        "visual only", "no"), ``n_sinks``, ``n_dump``, ``n_anchor``, ``n_undetermined``, ``attention_share``,
        ``contribution_share``.
        """  # noqa: D205
        tables = []
        if self.layers is not None:
            table = self.layers[["layer", "visual_cosine", "text_cosine"]].copy()
            table["redundant"] = "no"
            table.loc[self.layers["redundant"], "redundant"] = "yes"
            table.loc[self.layers["visual_only"], "redundant"] = "visual only"
            tables.append(table)
        if self.by_layer is not None:
            counts = ["n_sinks", "n_dump", "n_anchor", "n_undetermined"]
            tables.append(self.by_layer[["layer", *counts, "attention_share", "contribution_share"]])
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


def can_analyse(probes: Iterable[str]) -> bool:
    """Whether a profile with these probes can be analysed in any way."""
    names = set(probes)
    return "ffn_cosine" in names or names >= set(_NEEDED_FOR_SINKS)


def find(
    prof: LayerProfile,
    tau: float | str = "auto",
    eta: float = 0.96,
    split: str = "non-sink-median",
    quantile: float | None = None,
    groups: Mapping[str, Hashable] | None = None,
) -> Findings:
    """Classify sinks and look for redundant layers.

    A profile without the rows or probes that an analysis needs is analysed as far as it goes, and a remark says so.

    Args:
        prof: a profile.
        tau: threshold on sink strength: a number, "relative", or "auto" (see :func:`capa_probe.measures.choose_tau`).
        eta: threshold on the FFN cosine.
        split: what makes an anchor (see ``classify_sinks``).
        quantile: of the split "quantile".
        groups: sample id to a key of its images, for samples that show the same ones (see ``role_stability``);
            by default as the profile's samples table has it.

    Raises:
        CapaProbeError: an argument cannot be used, or neither analysis is possible, as without visual tokens.
    """
    width = int(prof.manifest["d_model"])
    chosen = choose_tau(tau, width)
    check_split(split, quantile)  # an argument, not a profile that will not do
    threshold = resolve_tau(chosen, width)
    remarks = say.of_data(prof.manifest)
    if chosen == "relative":
        why = f"; the paper's {TAU:g} needs a wider residual stream" if tau == "auto" else ""
        remarks.append(f"tau is relative: {RELATIVE_TAU:g} * sqrt({width}) = {threshold:g}{why}.")

    probes = prof.manifest.get("settings", {}).get("probes", _NEEDED)
    known: dict[str, Any] = dict.fromkeys(("sinks", "by_layer", "layers"))
    lacking = [name for name in _NEEDED_FOR_SINKS if name not in probes]
    if prof.rows == "none":
        remarks.append('Sinks were not looked for: rows="none" kept no token rows.')
    elif lacking:
        remarks.append(f"Sinks were not looked for: the profile lacks the probe {' and '.join(lacking)}.")
    else:
        try:
            dims = measure_sink_dims(prof, tau=chosen)
            known |= {"dims": dims, "model_dims": model_sink_dims(dims)}
            sinks = remarking(
                remarks, lambda: classify_sinks(prof, tau=chosen, split=split, quantile=quantile)
            )
        except CapaProbeError as error:  # the other analysis may still say something
            remarks.append(f"Sinks could not be classified: {error}")
        else:
            known |= _describe(sinks, _same_images(prof) if groups is None else groups)
            remarks += say.of_dims(dims, known["model_dims"])
            if sinks.empty:
                remarks.append(no_sinks(prof, sinks))
            else:
                remarks += say.of_sinks(known["bimodality"], known["stability"])
    if "ffn_cosine" not in probes:
        remarks.append("Redundant layers were not looked for: the profile lacks the probe ffn_cosine.")
    else:
        layers = remarking(remarks, lambda: redundant_layers(prof, eta=eta, confidence=CONFIDENCE))
        layers.attrs = {"eta": eta, "confidence": CONFIDENCE}
        known |= {"layers": layers, "agreement": paper_agreement(layers, prof.manifest)}
        remarks += say.of_layers(layers, eta, known["agreement"])
    if known["sinks"] is None and known["layers"] is None:
        raise CapaProbeError(" ".join(remarks))
    settings = {
        "tau": tau if isinstance(tau, str) else float(tau),
        "eta": float(eta),
        "split": split,
        "quantile": None if quantile is None else float(quantile),
        "groups": None if groups is None else _numbered(groups),
    }
    return Findings(tau=threshold, eta=eta, remarks=tuple(remarks), settings=settings, **known)


def _numbered(groups: Mapping[str, Hashable]) -> dict[str, int | None]:
    """The same groups with numbers for keys, which a file can hold."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(groups.values()))}
    return {str(sample): None if key is None else numbers[key] for sample, key in groups.items()}


def _same_images(prof: LayerProfile) -> dict[str, Hashable]:
    return {str(sample): key or None for sample, key in prof.samples[["sample", "images"]].to_numpy()}


def _describe(sinks: pd.DataFrame, groups: Mapping[str, Hashable] | None) -> dict[str, Any]:
    return {
        "sinks": sinks,
        "by_layer": sink_summary(sinks),
        "totals": sink_totals(sinks),
        "bimodality": sink_bimodality(sinks, groups),
        "stability": role_stability(sinks, groups),
    }

"""The small tables behind the figure of what sinks contribute: points, their distribution, and the split."""

from __future__ import annotations

import numpy as np
import pandas as pd

from capa_probe.analysis import sink_bimodality
from capa_probe.analysis.reading import strongest
from capa_probe.analysis.splits import OTHERS
from capa_probe.errors import CapaProbeError
from capa_probe.figures.entry import Source

#: Points kept per layer and role.
MAX_POINTS = 300
N_BINS = 40


def sink_split_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`capa_probe.figures.sink_split.sink_split` draws, from a profile with classified sinks.

    Raises:
        CapaProbeError: the run is no profile, or its sinks could not be classified.
    """
    if source.prof is None or "sinks" not in source.tables:
        raise CapaProbeError(
            "This run holds no table of sinks; profile with attention, contribution and sink_strength among the "
            'probes and rows="visual" or "all".'
        )
    sinks = source.tables["sinks"]
    found = split_tables(sinks, source.tables.get("bimodality"))
    facts = found["facts"]
    facts["n_samples"] = int(source.prof.manifest["n_samples"])
    if sinks.empty:
        largest = strongest(source.prof, sinks.attrs.get("offsets"))
        if largest is not None:
            facts["strongest"], facts["at"] = largest[0], float(largest[1])
    return found


def split_tables(
    sinks: pd.DataFrame, bimodality: pd.DataFrame | None = None, most: int = MAX_POINTS
) -> dict[str, pd.DataFrame]:
    """The small tables behind :func:`capa_probe.figures.sink_split.sink_split`.

    Args:
        sinks: what ``classify_sinks(prof)`` returned; it may be empty.
        bimodality: what ``sink_bimodality(sinks)`` returned; made here if not given.
        most: points kept per layer and role, evenly from the table.

    Returns:
        ``points`` (``layer``, ``role``, ``value``), ``bins`` (distribution of all sinks over log10 of the value, by
        layer and role), ``splits`` (by layer, the value that parts the roles), ``bimodality``, and ``facts``. The
        value is C divided by the median C of the other visual tokens of the same sample and layer where that is the
        split ("non-sink-median", so that it parts at 1), and C itself for the others.
    """
    relative = sinks.attrs.get("split", "non-sink-median") == "non-sink-median"
    own, others = (sinks[name].to_numpy(np.float64) for name in ("contribution", OTHERS))
    value = own.copy()
    if relative:
        value = np.divide(own, others, out=np.full(len(own), np.nan), where=others > 0)
    table = pd.DataFrame({"layer": sinks["layer"], "role": sinks["role"].astype(str), "value": value})
    known = table[table["value"] > 0].sort_values(["layer", "role", "value"], kind="stable")
    thinned = [
        rows.iloc[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int))]
        for _, rows in known.groupby(["layer", "role"])
    ]
    facts = {
        "n_samples": int(sinks["sample"].nunique()),
        "n_layers": len(sinks.attrs.get("n_visual", [])),
        "tau": sinks.attrs.get("tau", np.nan),
        "split": str(sinks.attrs.get("split", "non-sink-median")),
        "relative": relative,
        "n_sinks": len(sinks),
        "n_left_out": len(table) - len(known),
        "strongest": np.nan,
        "at": np.nan,
    }
    return {
        "points": pd.concat(thinned, ignore_index=True) if thinned else known,
        "bins": _bins(known),
        "splits": _splits(known, relative),
        "bimodality": sink_bimodality(sinks) if bimodality is None else bimodality,
        "facts": pd.DataFrame([facts]),
    }


def _bins(known: pd.DataFrame) -> pd.DataFrame:
    logs = np.log10(known["value"].to_numpy(np.float64))
    rows = []
    if len(logs):
        room = 0.0 if logs.max() > logs.min() else 0.5
        edges = np.linspace(logs.min() - room, logs.max() + room, N_BINS + 1)
        for (layer, role), own in known.groupby(["layer", "role"]):
            counts, _ = np.histogram(np.log10(own["value"]), bins=edges)
            rows += [
                (layer, role, edges[at], edges[at + 1], counts[at]) for at in np.flatnonzero(counts).tolist()
            ]
    return pd.DataFrame(rows, columns=["layer", "role", "low", "high", "n"])


def _splits(known: pd.DataFrame, relative: bool) -> pd.DataFrame:
    """Where the roles part in each layer: at 1, or halfway (in log) between the highest dump and the lowest anchor."""
    rows = []
    for layer, own in known.groupby("layer"):
        dumps, anchors = (own.loc[own["role"] == role, "value"] for role in ("dump", "anchor"))
        if relative:
            rows.append((layer, 1.0))
        elif len(dumps) and len(anchors):
            rows.append((layer, float(np.sqrt(dumps.max() * anchors.min()))))
    return pd.DataFrame(rows, columns=["layer", "value"])

"""Visual attention sinks, sorted by what they contribute: Probability Dumps and Structural Anchors (CAPA)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.analysis.sink_dims import (
    FIRST_LAYER,
    MAX_SHARE,
    VISUAL_PREFILL,
    choose_dims,
    require_visual_rows,
    strength_over,
)
from capa_probe.errors import CapaProbeError
from capa_probe.measures import resolve_tau
from capa_probe.tables import SINK_COLUMNS, TOKEN_SCHEMA, LayerProfile

DUMP, ANCHOR, UNDETERMINED = "dump", "anchor", "undetermined"
ROLES = (DUMP, ANCHOR, UNDETERMINED)

_PLACE = ("sample", "layer", "position", "image", "tile", "row", "col")
_MEASURED = ("attention", "attention_text", "contribution", "value_norm")
_COLUMNS = (*_PLACE, "sink_strength", "sink_dim", *_MEASURED, "role")


def classify_sinks(
    prof: LayerProfile,
    tau: float | str = 20.0,
    dims: str | Sequence[int] = "measured",
    split: str = "non-sink-median",
    *,
    max_share: float = MAX_SHARE,
) -> pd.DataFrame:
    """The visual tokens that are attention sinks at prefill, and their roles.

    A visual token is a sink at a layer, from layer 2 on, if its sink strength over the sink dimensions exceeds tau. A
    sink that contributes much is a Structural Anchor, one that contributes little a Probability Dump (CAPA, arXiv
    2602.00247; sink strength after "See What You Are Told"). The paper gives no number for "much": see ``split``.

    Args:
        prof: a profile with rows of visual tokens.
        tau: threshold on sink strength. The paper's 20 suits residual widths of some thousands; "relative" takes the
            same share of the bound sqrt(d_model), for widths from 256 on.
        dims: "measured": those that exceed tau on few of a layer's visual tokens; "published" for this model; or a
            list.
        split: "non-sink-median": a sink is an anchor if it contributes at least as much as the median non-sink visual
            token of its sample and layer.
        max_share: a measured dimension above tau on more than this share of a layer's visual tokens is an offset, not
            a sink dimension; a warning names it.

    Returns:
        One row per sink: ``sample``, ``layer``, ``position``, ``image``, ``tile``, ``row``, ``col``,
        ``sink_strength`` (over the sink dimensions), ``sink_dim``, ``attention``, ``attention_text``,
        ``contribution``, ``value_norm``, ``role`` ("dump", "anchor", or "undetermined" where a sample and layer has no
        visual token but sinks). No sinks: no rows. ``.attrs`` tells which threshold and dimensions were used, and
        holds the counts that :func:`sink_summary` needs.

    Raises:
        CapaProbeError: tau cannot be reached at this width, the dimensions or the split are unknown, the profile lacks
            what is needed, or the four dimensions that it keeps per token do not suffice.
    """
    if split not in SPLITS:
        raise CapaProbeError(f"split={split!r} was given; give one of {', '.join(map(repr, SPLITS))}.")
    require_visual_rows(prof)
    threshold = resolve_tau(tau, int(prof.manifest["d_model"]))
    chosen = choose_dims(prof, threshold, dims, max_share)
    n_layers = int(prof.manifest["n_layers"])
    n_visual, attention = np.zeros(n_layers, dtype=np.int64), np.zeros(n_layers)
    crowded = 0

    found = []
    columns = [*_PLACE, *_MEASURED, *(name for pair in SINK_COLUMNS for name in pair)]
    for part in prof.read(columns, VISUAL_PREFILL):
        _require(part, prof)
        n_visual += np.bincount(part["layer"], minlength=n_layers)
        attention += np.bincount(part["layer"], weights=part["attention"], minlength=n_layers)
        later = part[part["layer"] >= FIRST_LAYER].copy()
        crowded += int((later[SINK_COLUMNS[-1][0]] > threshold).sum())
        later["sink_strength"], later["sink_dim"] = strength_over(later, chosen, threshold, prof)
        is_sink = (later["sink_strength"] > threshold).to_numpy()
        if is_sink.any():
            sinks = later[is_sink].copy()
            sinks["role"] = SPLITS[split](later, is_sink)
            found.append(sinks[list(_COLUMNS)])

    table = pd.concat(found, ignore_index=True) if found else _no_sinks()
    if crowded and prof.manifest.get("sink_dims") is None:
        warnings.warn(
            f"{crowded} visual tokens exceed tau={threshold:g} in four dimensions or more, and the profile keeps four: "
            "sink strength over other dimensions cannot be read off it; profile again with sink_dims=[...] for that.",
            stacklevel=2,
        )
    n_unclear = int((table["role"] == UNDETERMINED).sum())
    if n_unclear:
        warnings.warn(
            f"{n_unclear} sinks have no role: all visual tokens of their sample and layer are sinks, so there is "
            "nothing to compare them with.",
            stacklevel=2,
        )
    table.attrs = {
        "tau": threshold,
        "tau_given": tau,
        "split": split,
        "dims_source": chosen.source,
        "dims": {layer: sorted(values) for layer, values in sorted(chosen.by_layer.items())},
        "offsets": [list(pair) for pair in chosen.offsets],
        "n_samples": int(prof.manifest["n_samples"]),
        "n_visual": n_visual.tolist(),
        "visual_attention": attention.tolist(),
    }
    return table


def sink_summary(sinks: pd.DataFrame) -> pd.DataFrame:
    """Sinks layer by layer.

    Args:
        sinks: what :func:`classify_sinks` returned.

    Returns:
        One row per layer: ``layer``, ``n_visual`` (visual tokens of all samples), ``n_sinks``, ``n_dump``,
        ``n_anchor``, ``n_undetermined``, ``share_sinks`` (of the visual tokens), ``attention_share`` (of the attention
        that visual tokens get from the last prompt token, all samples together), ``sink_dims`` (those that occur,
        the most frequent first).

    Raises:
        CapaProbeError: the table lost its ``.attrs`` on the way.
    """
    if "n_visual" not in sinks.attrs:
        raise CapaProbeError(
            "This table of sinks has no counts in .attrs; give the one that classify_sinks returned, not one derived "
            "from it."
        )
    n_visual = np.array(sinks.attrs["n_visual"])
    total = np.array(sinks.attrs["visual_attention"])
    layers = pd.RangeIndex(len(n_visual), name="layer")
    by_layer = sinks.groupby("layer")
    table = pd.DataFrame({"n_visual": n_visual}, index=layers)
    table["n_sinks"] = by_layer.size().reindex(layers, fill_value=0)
    for role in ROLES:
        counts = sinks[sinks["role"] == role].groupby("layer").size()
        table[f"n_{role}"] = counts.reindex(layers, fill_value=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        table["share_sinks"] = table["n_sinks"] / n_visual
        table["attention_share"] = by_layer["attention"].sum().reindex(layers, fill_value=0) / total
    table["sink_dims"] = [
        ", ".join(map(str, sinks.loc[sinks["layer"] == layer, "sink_dim"].value_counts().index))
        for layer in layers
    ]
    return table.reset_index()


def _by_non_sink_median(visual: pd.DataFrame, is_sink: NDArray[np.bool_]) -> NDArray[Any]:
    keys = ["sample", "layer"]
    medians = visual[~is_sink].groupby(keys)["contribution"].median().rename("median")
    sinks = visual[is_sink].join(medians, on=keys)
    high = sinks["contribution"] >= sinks["median"]
    return np.where(sinks["median"].isna(), UNDETERMINED, np.where(high, ANCHOR, DUMP))


#: Name -> rule: rows of the visual tokens of whole samples, which of them are sinks -> role of each sink, in order.
SPLITS: dict[str, Callable[[pd.DataFrame, NDArray[np.bool_]], NDArray[Any]]] = {
    "non-sink-median": _by_non_sink_median,
}


def _require(part: pd.DataFrame, prof: LayerProfile) -> None:
    """Every visual token has what the classification reads."""
    for name in ("sink_strength", "contribution", "attention"):
        missing = part[name].isna()
        if not missing.any():
            continue
        row = part[missing].iloc[0]
        probes = prof.manifest.get("settings", {}).get("probes")
        raise CapaProbeError(
            f"{name} is missing for {missing.sum()} visual tokens (first: sample {row['sample']!r}, layer "
            f"{row['layer']}; probes of this profile: {probes}); profile again with the default probes."
        )


def _no_sinks() -> pd.DataFrame:
    empty = TOKEN_SCHEMA.empty_table().to_pandas()
    empty["role"] = pd.Series(dtype=object)
    return empty[list(_COLUMNS)]

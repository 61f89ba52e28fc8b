"""Sink dimensions: the few coordinates of the residual stream in which an attention sink is huge."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.errors import CapaProbeError
from capa_probe.measures import resolve_tau
from capa_probe.tables import SINK_COLUMNS, LayerProfile

#: The first layer whose visual tokens can be sinks: before it, massive dimensions have not formed yet.
FIRST_LAYER = 2
#: A dimension above tau on a larger share of a layer's visual tokens is an offset of that layer.
MAX_SHARE = 0.25

#: Visual tokens at prefill.
VISUAL_PREFILL = [("step", "==", 0), ("kind", "==", "visual")]
_STRENGTHS = [strength for strength, _ in SINK_COLUMNS]
_DIMS = [dim for _, dim in SINK_COLUMNS]


@dataclass(frozen=True)
class SinkDims:
    """Which dimensions count, in which layer.

    Attributes:
        by_layer: layer -> dimensions; a layer that is missing has none.
        offsets: (layer, dimension) left out because they are large on too many tokens.
        source: "measured", "published" or "given".
    """

    by_layer: Mapping[int, frozenset[int]]
    offsets: tuple[tuple[int, int], ...]
    source: str


def measure_sink_dims(
    prof: LayerProfile, tau: float | str = 20.0, max_share: float = MAX_SHARE
) -> pd.DataFrame:
    """The dimensions in which visual tokens exceed tau, layer by layer, at prefill.

    A sink dimension is massive on few tokens. One that is large on more than ``max_share`` of a layer's visual tokens
    is an offset that all of them carry, and tells no token from another.

    Args:
        prof: a profile with token rows.
        tau: threshold on sink strength, or "relative" (see :func:`capa_probe.measures.resolve_tau`).
        max_share: largest share of a layer's visual tokens that a sink dimension may exceed tau on.

    Returns:
        One row per (layer, dim) with at least one token above tau, from layer 2 on: ``layer``, ``dim``,
        ``n_tokens`` above tau, their ``share`` of the layer's visual tokens, the ``largest`` strength, ``offset``.
        Counts are over the four largest dimensions of each token.

    Raises:
        CapaProbeError: the profile has no visual token rows or no sink strength, or tau cannot be reached.
    """
    threshold = resolve_tau(tau, int(prof.manifest["d_model"]))
    totals: dict[int, int] = {}
    found = []
    for part in prof.read(["layer", *_STRENGTHS, *_DIMS], _where()):
        for layer, n in enumerate(np.bincount(part["layer"])):
            totals[layer] = totals.get(layer, 0) + int(n)
        for strength, dim in SINK_COLUMNS:
            rows = part.loc[part[strength] > threshold, ["layer", dim, strength]]
            found.append(rows.set_axis(["layer", "dim", "largest"], axis=1))
    if not any(totals.values()):
        require_visual_rows(prof)
        return pd.DataFrame(
            {
                name: pd.Series(dtype=kind)
                for name, kind in {
                    "layer": int,
                    "dim": int,
                    "n_tokens": int,
                    "share": float,
                    "largest": float,
                    "offset": bool,
                }.items()
            }
        )
    table = pd.concat(found, ignore_index=True)
    table = table.groupby(["layer", "dim"], as_index=False).agg(
        n_tokens=("largest", "size"), largest=("largest", "max")
    )
    table["share"] = table["n_tokens"] / table["layer"].map(totals)
    table["offset"] = table["share"] > max_share
    return table[["layer", "dim", "n_tokens", "share", "largest", "offset"]]


def choose_dims(
    prof: LayerProfile, threshold: float, dims: str | Sequence[int], max_share: float = MAX_SHARE
) -> SinkDims:
    """Resolve the ``dims`` argument of :func:`capa_probe.analysis.classify_sinks`; offsets are named in a warning."""
    layers = range(FIRST_LAYER, int(prof.manifest["n_layers"]))
    recorded = prof.manifest.get("sink_dims")
    if isinstance(dims, str) and dims == "measured":
        table = measure_sink_dims(prof, threshold, max_share)
        offsets = tuple(
            (int(layer), int(dim)) for layer, dim in table.loc[table["offset"], ["layer", "dim"]].to_numpy()
        )
        if offsets:
            named = ", ".join(f"{dim} in layer {layer}" for layer, dim in offsets)
            warnings.warn(
                f"Left out as offsets, since more than {max_share:.0%} of a layer's visual tokens exceed tau there: "
                f"dimension {named}.",
                stacklevel=3,
            )
        kept = table[~table["offset"]]
        by_layer = {
            layer: frozenset(kept.loc[kept["layer"] == layer, "dim"].tolist())
            for layer in kept["layer"].unique()
        }
        return SinkDims(by_layer, offsets, "measured")

    if isinstance(dims, str):
        if dims != "published":
            raise CapaProbeError(
                f'dims={dims!r} was given; give "measured", "published" or a list of dimensions.'
            )
        source, chosen = "published", prof.manifest.get("published_sink_dims")
        if not chosen:
            raise CapaProbeError(
                f'dims="published" was given, but no sink dimensions are published for {prof.manifest["model"]}; '
                'use dims="measured" or give a list.'
            )
    else:
        source, chosen = "given", list(dims)
    chosen = frozenset(int(dim) for dim in chosen)
    width = int(prof.manifest["d_model"])
    if not chosen or not all(0 <= dim < width for dim in chosen):
        raise CapaProbeError(
            f"dims={sorted(chosen)} was given; give one or more dimensions from 0 to {width - 1}."
        )
    if recorded is not None and not chosen <= set(recorded):
        raise CapaProbeError(
            f"dims={sorted(chosen)} was given, but this profile recorded sink strength on dimensions "
            f"{sorted(recorded)} only; profile again without sink_dims or with all of these."
        )
    return SinkDims(dict.fromkeys(layers, chosen), (), source)


def strength_over(
    part: pd.DataFrame, dims: SinkDims, threshold: float, prof: LayerProfile
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Sink strength over the chosen dimensions, read off the four largest that a profile keeps.

    Returns:
        Strength and dimension of each row; 0 and -1 where none of its four largest dimensions was chosen.

    Raises:
        CapaProbeError: a token's four largest dimensions all exceed tau and none was chosen, so that one that was
            may be hidden behind them.
    """
    strengths = part[_STRENGTHS].to_numpy(np.float32)
    places = part[_DIMS].to_numpy(np.int32)
    layers = part["layer"].to_numpy()
    chosen = np.zeros(places.shape, dtype=bool)
    for layer, wanted in dims.by_layer.items():
        here = layers == layer
        chosen[here] = np.isin(places[here], list(wanted))
    known = prof.manifest.get("sink_dims") is not None
    hidden = (strengths[:, -1] > threshold) & ~chosen.any(axis=1) & (not known)
    if hidden.any():
        row = part.iloc[int(np.flatnonzero(hidden)[0])]
        raise CapaProbeError(
            f"The four largest dimensions of {hidden.sum()} visual tokens all exceed tau={threshold:g} and none of "
            f"them counts as a sink dimension (first: sample {row['sample']!r}, layer {row['layer']}, position "
            f"{row['position']}), so sink strength cannot be told; profile again with sink_dims=[...] set to the "
            "dimensions in question."
        )
    first = chosen.argmax(axis=1)[:, None]  # strengths fall from left to right
    any_chosen = chosen.any(axis=1)
    strength = np.where(any_chosen, np.take_along_axis(strengths, first, axis=1)[:, 0], 0)
    dim = np.where(any_chosen, np.take_along_axis(places, first, axis=1)[:, 0], -1)
    return strength.astype(np.float32), dim.astype(np.int32)


def require_visual_rows(prof: LayerProfile) -> None:
    """Refuse a profile without rows of visual tokens, saying why it has none."""
    if prof.rows == "none":
        raise CapaProbeError(
            'This profile was made with rows="none" and has no token rows; profile again with rows="visual".'
        )
    if not (prof.layers["kind"] == "visual").any():
        raise CapaProbeError(
            "This profile has no visual tokens; profile samples with images to look for sinks."
        )


def _where() -> list[tuple[str, str, object]]:
    return [*VISUAL_PREFILL, ("layer", ">=", FIRST_LAYER)]

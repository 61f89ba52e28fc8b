"""Attention sinks among the visual tokens, and their roles: Probability Dump or Structural Anchor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.analysis.reading import (
    FIRST_LAYER,
    absolute_tau,
    fact,
    strengths_and_dims,
    visual_counts,
    visual_tokens,
)
from capa_probe.analysis.sink_dims import MAX_SHARE, ChosenDims, choose_dims
from capa_probe.errors import CapaProbeError
from capa_probe.measures import TAU
from capa_probe.tables import LayerProfile

#: Columns of the table of sinks.
COLUMNS = (
    "sample",
    "layer",
    "position",
    "image",
    "tile",
    "row",
    "col",
    "sink_strength",
    "sink_dim",
    "attention",
    "attention_text",
    "contribution",
    "value_norm",
    "role",
)
ROLES = ("dump", "anchor", "undetermined")
#: Median contribution of the non-sink visual tokens of a sink's own sample and layer: for the splits, then dropped.
_OTHERS = "others_contribution"

#: Name of a split to the function that gives, for a table of all sinks, the contribution from which on each is an
#: anchor; NaN where that cannot be told. A further split is one more line here.
SPLITS: dict[str, Callable[[pd.DataFrame], pd.Series[float]]] = {
    "non-sink-median": lambda sinks: sinks[_OTHERS],
}


def classify_sinks(
    prof: LayerProfile,
    tau: float | str = TAU,
    dims: str | Sequence[int] = "measured",
    split: str = "non-sink-median",
    max_share: float = MAX_SHARE,
) -> pd.DataFrame:
    """The visual tokens that are attention sinks at prefill, with their role.

    A visual token is a sink at a layer (from layer 2 on) if its sink strength phi over the dimensions in use is above
    tau. A **Probability Dump** takes attention and contributes little, a **Structural Anchor** contributes much
    (CAPA, arXiv 2602.00247; phi after *See What You Are Told*).

    Args:
        prof: a profile with its visual tokens.
        tau: an absolute threshold, or ``"relative"`` for ``0.3125 * sqrt(d_model)``.
        dims: dimensions that phi is taken over. ``"measured"``: all that exceed tau on few visual tokens of the layer
            (see :func:`measure_sink_dims`; offsets are left out with a warning), or the set that the profile was
            restricted to by ``sink_dims``. ``"published"``: those published for this model. Or the dimensions
            themselves.
        split: what makes an anchor. ``"non-sink-median"``: a contribution at or above the median of the visual tokens
            of the same sample and layer that are no sinks; ``"undetermined"``, with a warning, where all are sinks.
        max_share: with measured dimensions, the largest share of a layer's visual tokens on which one may exceed tau.

    Returns:
        One row per sink, with the columns ``sample``, ``layer``, ``position``, ``image``, ``tile``, ``row``, ``col``,
        ``sink_strength`` and ``sink_dim`` (over the dimensions in use), ``attention``, ``attention_text``,
        ``contribution``, ``value_norm``, ``role`` ("dump", "anchor" or "undetermined"); empty where there is no sink.
        ``.attrs`` says what was used: ``tau`` (absolute), ``tau_given``, ``dims``, ``split``, ``max_share``, and per
        layer ``dims_per_layer``, ``offsets``, ``n_visual``, ``n_sinks``, ``attention_share``.

    Raises:
        CapaProbeError: an argument that cannot be used; a profile without visual token rows or without a column that
            is needed; or a token whose sink strength over ``dims`` cannot be told from the four dimensions kept.
    """
    if split not in SPLITS:
        raise CapaProbeError(f"split={split!r} was given; available: {', '.join(map(repr, SPLITS))}.")
    threshold = absolute_tau(prof, tau)
    chosen = choose_dims(prof, dims, threshold, max_share)
    shares = _AttentionShares(fact(prof, "n_layers"))
    found = []
    for part in visual_tokens(prof, [name for name in COLUMNS if name != "role"]):
        strength, dim, is_sink = _over(part, chosen, threshold)
        group = part.groupby(["sample", "layer"], sort=False).ngroup().to_numpy().astype(np.int64)
        shares.add(part, group, is_sink)
        columns: dict[str, NDArray[Any]] = {
            "sink_strength": strength.astype(np.float32),
            "sink_dim": dim.astype(np.int32),
            _OTHERS: _median_of_others(part, group, is_sink),
        }
        found.append(part.assign(**columns)[is_sink])
    sinks = pd.concat(found, ignore_index=True)
    # A dtype of strings even where there is no sink to show one.
    sinks["role"] = pd.Series(_roles(sinks, split), index=sinks.index, dtype=sinks["sample"].dtype)
    sinks = sinks[list(COLUMNS)]
    sinks.attrs = {
        "tau": threshold,
        "tau_given": tau if isinstance(tau, str) else float(tau),
        "dims": chosen.asked,
        "split": split,
        "max_share": max_share,
        "dims_per_layer": chosen.found,
        "offsets": chosen.offsets,
        "n_visual": visual_counts(prof).tolist(),
        "n_sinks": _count_by_layer(sinks, fact(prof, "n_layers")).tolist(),
        "attention_share": shares.means(),
    }
    return sinks


def sink_summary(sinks: pd.DataFrame) -> pd.DataFrame:
    """Sinks by layer and role.

    Args:
        sinks: the whole table, as :func:`classify_sinks` returned it, with its ``.attrs``.

    Returns:
        One row per layer of the model: ``layer``, ``n_visual`` (visual tokens, all samples), ``n_sinks``, ``n_dump``,
        ``n_anchor``, ``n_undetermined``, ``share_sinks`` (of the visual tokens), ``attention_share`` (share of the
        visual tokens' attention that sinks take, mean over samples; NaN where the profile has no attention), and
        ``sink_dims`` (dimensions in which the sinks reach their strength, comma-separated). Layers 0 and 1 have no
        sinks by definition.

    Raises:
        CapaProbeError: the table is not what :func:`classify_sinks` returned, or only some of its rows.
    """
    known = sinks.attrs
    if not {"n_visual", "n_sinks", "attention_share"} <= set(known) or not set(COLUMNS) <= set(sinks.columns):
        raise CapaProbeError(
            "sink_summary was given a table without the columns or the .attrs of classify_sinks; give the table "
            "that classify_sinks returned."
        )
    n_visual = np.asarray(known["n_visual"], dtype=np.int64)
    counts = _count_by_layer(sinks, len(n_visual))
    if counts.tolist() != known["n_sinks"]:
        raise CapaProbeError(
            f"sink_summary was given {len(sinks)} of {sum(known['n_sinks'])} sinks, for which attention_share would be "
            "wrong; give the whole table that classify_sinks returned."
        )
    layer, dims = sinks["layer"].to_numpy(), sinks["sink_dim"].to_numpy()
    return pd.DataFrame(
        {
            "layer": np.arange(len(n_visual), dtype=np.int32),
            "n_visual": n_visual,
            "n_sinks": counts,
            **{f"n_{role}": _count_by_layer(sinks[sinks["role"] == role], len(n_visual)) for role in ROLES},
            "share_sinks": np.divide(
                counts, n_visual, out=np.full(len(n_visual), np.nan), where=n_visual > 0
            ),
            "attention_share": np.array(known["attention_share"], dtype=np.float64),  # None becomes NaN
            "sink_dims": [", ".join(map(str, np.unique(dims[layer == at]))) for at in range(len(n_visual))],
        }
    )


def _over(
    part: pd.DataFrame, chosen: ChosenDims, tau: float
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    """Sink strength over the dimensions in use, its dimension, and whether it is above tau: (token,) each."""
    strengths, dims = strengths_and_dims(part)
    usable = (dims >= 0) & chosen.in_use[part["layer"].to_numpy()[:, None], dims]
    strengths_in_use = np.where(usable, strengths, -np.inf)
    best = strengths_in_use.argmax(axis=1)[:, None]
    strength = np.take_along_axis(strengths_in_use, best, axis=1)[:, 0]
    is_sink = strength > tau

    # Four dimensions outside the set, all above tau: a fifth one may be above tau too and in the set.
    unknown = (strengths[:, -1] > tau) & ~is_sink & (not chosen.complete)
    if unknown.any():
        first = part.iloc[int(unknown.argmax())]
        what = "offsets" if chosen.asked == "measured" else f"outside dims={chosen.asked!r}"
        again = "[...]" if isinstance(chosen.asked, str) else str(chosen.asked)
        raise CapaProbeError(
            f"It cannot be told which visual tokens are sinks ({int(unknown.sum())} in doubt, first: sample "
            f"{first['sample']!r}, layer {first['layer']}, position {first['position']}): sink_strength_4 = "
            f"{first['sink_strength_4']:.4g} is above tau={tau:g} and the four dimensions kept are {what}; profile "
            f"again with sink_dims={again}, the dimensions to look at."
        )
    return strength, np.take_along_axis(dims, best, axis=1)[:, 0], is_sink


def _median_of_others(
    part: pd.DataFrame, group: NDArray[np.int64], is_sink: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """For each token, the median contribution of the non-sinks of its sample and layer; NaN where there are none.

    Only groups with a sink are looked at; elsewhere it is NaN.
    """
    medians = np.full(len(part), np.nan)
    here = np.isin(group, group[is_sink])
    contribution = part["contribution"].to_numpy(np.float64)
    missing = here & np.isnan(contribution)
    if missing.any():
        first = part.iloc[int(missing.argmax())]
        raise CapaProbeError(
            f"contribution is missing (NaN) at layer {first['layer']} of sample {first['sample']!r}, whose sinks it is "
            'to tell apart; profile again with "contribution" among the probes.'
        )
    others = pd.Series(np.where(is_sink, np.nan, contribution)[here])
    medians[here] = others.groupby(group[here]).transform("median").to_numpy()
    return medians


def _roles(sinks: pd.DataFrame, split: str) -> NDArray[np.object_]:
    threshold = SPLITS[split](sinks).to_numpy(np.float64)
    unknown = np.isnan(threshold)
    if unknown.any():
        first = sinks.iloc[int(unknown.argmax())]
        warnings.warn(
            f"The role of {int(unknown.sum())} of {len(sinks)} sinks is undetermined: their sample and layer (first: "
            f"sample {first['sample']!r}, layer {first['layer']}) has no visual token that is not a sink.",
            stacklevel=3,
        )
    is_anchor = sinks["contribution"].to_numpy(np.float64) >= threshold
    return np.where(unknown, "undetermined", np.where(is_anchor, "anchor", "dump")).astype(object)


def _count_by_layer(sinks: pd.DataFrame, n_layers: int) -> NDArray[np.int64]:
    return np.bincount(sinks["layer"].to_numpy(np.int64), minlength=n_layers)


class _AttentionShares:
    """Share of the visual tokens' attention that sinks take, averaged over samples while they pass by."""

    def __init__(self, n_layers: int) -> None:
        self._sum, self._n = np.zeros(n_layers), np.zeros(n_layers)
        self._n[:FIRST_LAYER] = 1  # no sinks, by definition

    def add(self, part: pd.DataFrame, group: NDArray[np.int64], is_sink: NDArray[np.bool_]) -> None:
        """Take the tokens of whole (sample, layer) groups."""
        attention = part["attention"].to_numpy(np.float64)
        total = np.bincount(group, attention)
        taken = np.bincount(group, np.where(is_sink, attention, 0.0 * attention))  # NaN stays NaN
        layer = np.zeros(len(total), dtype=np.int64)
        layer[group] = part["layer"].to_numpy()
        some = total != 0  # no attention on any visual token: there is no share of it
        np.add.at(self._sum, layer[some], taken[some] / total[some])
        np.add.at(self._n, layer[some], 1)

    def means(self) -> list[Any]:
        """Per layer; None where it is not known (JSON has no NaN)."""
        shares = np.divide(self._sum, self._n, out=np.full(len(self._n), np.nan), where=self._n > 0)
        return [None if np.isnan(share) else float(share) for share in shares]

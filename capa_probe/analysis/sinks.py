"""Attention sinks among the visual tokens, and their roles: Probability Dump or Structural Anchor."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.analysis.dims_in_use import MAX_SHARE, ChosenDims, choose_dims
from capa_probe.analysis.reading import (
    absolute_tau,
    fact,
    strengths_and_dims,
    visual_counts,
    visual_tokens,
)
from capa_probe.analysis.shares import Shares
from capa_probe.analysis.splits import OTHERS, ROLES, check_split, roles
from capa_probe.analysis.summary import SHARED, count_by_layer
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
    OTHERS,
    "role",
)


def classify_sinks(
    prof: LayerProfile,
    tau: float | str = TAU,
    dims: str | Sequence[int] = "measured",
    split: str = "non-sink-median",
    max_share: float = MAX_SHARE,
    quantile: float | None = None,
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
            ``"otsu"``: a contribution in the upper class of Otsu's threshold on log C over all sinks of the layer
            (see :func:`otsu_threshold`); ``"undetermined"``, with a warning, where all contribute alike.
            ``"quantile"``: a contribution at or above a quantile of that of all sinks of the layer, by linear
            interpolation; every layer with a sink then has an anchor. The last two compare samples with one another.
        max_share: with measured dimensions, the largest share of a layer's visual tokens on which one may exceed tau.
        quantile: with ``split="quantile"``, between 0 and 1; 0.5 if not given.

    Returns:
        One row per sink, with the columns ``sample``, ``layer``, ``position``, ``image``, ``tile``, ``row``, ``col``,
        ``sink_strength`` and ``sink_dim`` (over the dimensions in use), ``attention``, ``attention_text``,
        ``contribution``, ``value_norm``, ``others_contribution`` (median contribution of the visual tokens of the same
        sample and layer that are no sinks; NaN where there are none), ``role`` ("dump", "anchor" or "undetermined");
        empty where there is no sink. ``.attrs`` says what was used: ``tau`` (absolute), ``tau_given``, ``dims``,
        ``split``, ``quantile``, ``max_share``, and per layer ``dims_per_layer``, ``offsets``, ``n_visual``,
        ``n_sinks``, ``attention_share``, ``contribution_share``, and both shares by role
        (``attention_share_by_role``, ``contribution_share_by_role``).

    Raises:
        CapaProbeError: an argument that cannot be used; a profile without visual token rows or without a column that
            is needed; or a token whose sink strength over ``dims`` cannot be told from the four dimensions kept.
    """
    used_quantile = check_split(split, quantile)
    threshold = absolute_tau(prof, tau)
    chosen = choose_dims(prof, dims, threshold, max_share)
    n_layers = fact(prof, "n_layers")
    shares = [Shares(name, n_layers) for name in SHARED]
    found = []
    for part in visual_tokens(prof, [name for name in COLUMNS if name not in (OTHERS, "role")]):
        strength, dim, is_sink = _over(part, chosen, threshold)
        group = part.groupby(["sample", "layer"], sort=False).ngroup().to_numpy().astype(np.int64)
        columns: dict[str, NDArray[Any]] = {
            "sink_strength": strength.astype(np.float32),
            "sink_dim": dim.astype(np.int32),
            OTHERS: _median_of_others(part, group, is_sink),
            **{f"_{share.column}": share.of_each(part, group) for share in shares},
        }
        found.append(part.assign(**columns)[is_sink])
    sinks = pd.concat(found, ignore_index=True)
    # A dtype of strings even where there is no sink to show one.
    sinks["role"] = pd.Series(roles(sinks, split, used_quantile), sinks.index, sinks["sample"].dtype)
    shared = _shares_by_role(sinks, shares)
    sinks = sinks[list(COLUMNS)]
    sinks.attrs = {
        "tau": threshold,
        "tau_given": tau if isinstance(tau, str) else float(tau),
        "dims": chosen.asked,
        "split": split,
        "quantile": used_quantile if split == "quantile" else None,
        "max_share": max_share,
        "dims_per_layer": chosen.found,
        "offsets": chosen.offsets,
        "n_visual": visual_counts(prof).tolist(),
        "n_sinks": count_by_layer(sinks, n_layers).tolist(),
        **shared,
    }
    return sinks


def _shares_by_role(sinks: pd.DataFrame, shares: Sequence[Shares]) -> dict[Hashable, Any]:
    layer = sinks["layer"].to_numpy(np.int64)
    known: dict[Hashable, Any] = {}
    for share in shares:
        of_each = sinks[f"_{share.column}"].to_numpy(np.float64)
        known[f"{share.column}_share"] = share.means(layer, of_each)
        known[f"{share.column}_share_by_role"] = {
            role: share.means(layer[own], of_each[own])
            for role in ROLES
            for own in [sinks["role"].to_numpy() == role]
        }
    return known


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

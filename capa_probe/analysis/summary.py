"""Sinks counted by layer and by role, and what they take."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.analysis.reading import FIRST_LAYER
from capa_probe.analysis.splits import ROLES
from capa_probe.errors import CapaProbeError

#: Columns of which the sinks' share of all visual tokens is known.
SHARED = ("attention", "contribution")
#: What the summaries look at.
_COLUMNS = ("sample", "layer", "position", "sink_dim", "role")
_ATTRS = ("n_visual", "n_sinks", *(f"{name}_share{suffix}" for name in SHARED for suffix in ("", "_by_role")))


def sink_summary(sinks: pd.DataFrame) -> pd.DataFrame:
    """Sinks by layer and role.

    Args:
        sinks: the whole table, as :func:`classify_sinks` returned it, with its ``.attrs``.

    Returns:
        One row per layer of the model: ``layer``, ``n_visual`` (visual tokens, all samples), ``n_sinks``, ``n_dump``,
        ``n_anchor``, ``n_undetermined``, ``share_sinks`` (of the visual tokens); ``attention_share`` and
        ``contribution_share`` (share of the visual tokens' summed attention or contribution that sinks have, mean
        over samples; NaN where the profile lacks it), the same for the sinks of one role in
        ``attention_share_dump``, ``attention_share_anchor``, ``contribution_share_dump`` and
        ``contribution_share_anchor``; and ``sink_dims`` (dimensions in which the sinks reach their strength,
        comma-separated). Layers 0 and 1 have no sinks by definition.

    Raises:
        CapaProbeError: the table is not what :func:`classify_sinks` returned, or only some of its rows.
    """
    n_visual = check_whole(sinks, "sink_summary")
    n_layers = len(n_visual)
    counts = count_by_layer(sinks, n_layers)
    layer, dims = sinks["layer"].to_numpy(), sinks["sink_dim"].to_numpy()
    return pd.DataFrame(
        {
            "layer": np.arange(n_layers, dtype=np.int32),
            "n_visual": n_visual,
            "n_sinks": counts,
            **{f"n_{role}": count_by_layer(sinks[sinks["role"] == role], n_layers) for role in ROLES},
            "share_sinks": np.divide(counts, n_visual, out=np.full(n_layers, np.nan), where=n_visual > 0),
            **{
                f"{name}_share{'' if role is None else f'_{role}'}": _share(sinks, name, role)
                for name in SHARED
                for role in (None, "dump", "anchor")
            },
            "sink_dims": [", ".join(map(str, np.unique(dims[layer == at]))) for at in range(n_layers)],
        }
    )


def sink_totals(sinks: pd.DataFrame) -> pd.DataFrame:
    """Sinks of all layers together, by role.

    Args:
        sinks: as for :func:`sink_summary`.

    Returns:
        One row per ``role`` ("dump", "anchor", "undetermined") and one for "all": ``n_sinks`` (a token counts in
        every layer where it is a sink), ``n_tokens`` (different tokens among them), ``role_share`` (of all sinks; NaN
        without any), ``share_sinks`` (of the visual tokens from layer 2 on), ``attention_share`` and
        ``contribution_share`` (means over the layers from 2 on of those of :func:`sink_summary`).

    Raises:
        CapaProbeError: as for :func:`sink_summary`.
    """
    n_visual = int(check_whole(sinks, "sink_totals")[FIRST_LAYER:].sum())
    rows = []
    for role in (*ROLES, None):
        own = sinks if role is None else sinks[sinks["role"] == role]
        row = {
            "role": "all" if role is None else role,
            "n_sinks": len(own),
            "n_tokens": len(own[["sample", "position"]].drop_duplicates()),
            "role_share": len(own) / len(sinks) if len(sinks) else np.nan,
            "share_sinks": len(own) / n_visual if n_visual else np.nan,
        }
        for name in SHARED:
            shares = _share(sinks, name, role)[FIRST_LAYER:]
            known = shares[~np.isnan(shares)]
            row[f"{name}_share"] = float(known.mean()) if len(known) else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def check_whole(sinks: pd.DataFrame, given_to: str) -> NDArray[np.int64]:
    """Visual tokens per layer, if the table is all that :func:`classify_sinks` returned.

    Raises:
        CapaProbeError: it is another table, or only some of its rows.
    """
    known = sinks.attrs
    if not set(_ATTRS) <= set(known) or not set(_COLUMNS) <= set(sinks.columns):
        raise CapaProbeError(
            f"{given_to} was given a table without the columns or the .attrs of classify_sinks; give the table "
            "that classify_sinks returned."
        )
    n_visual = np.asarray(known["n_visual"], dtype=np.int64)
    if count_by_layer(sinks, len(n_visual)).tolist() != known["n_sinks"]:
        raise CapaProbeError(
            f"{given_to} was given {len(sinks)} of {sum(known['n_sinks'])} sinks, for which it would be wrong; give "
            "the whole table that classify_sinks returned."
        )
    return n_visual


def count_by_layer(sinks: pd.DataFrame, n_layers: int) -> NDArray[np.int64]:
    """Number of sinks in each layer: (layer,)."""
    return np.bincount(sinks["layer"].to_numpy(np.int64), minlength=n_layers)


def _share(sinks: pd.DataFrame, name: str, role: str | None) -> NDArray[np.float64]:
    """(layer,); None becomes NaN."""
    of_all = sinks.attrs[f"{name}_share"] if role is None else sinks.attrs[f"{name}_share_by_role"][role]
    return np.array(of_all, dtype=np.float64)

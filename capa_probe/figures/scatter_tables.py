"""The tables behind the scatter of attention against contribution: points to draw, and what all tokens say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.analysis.reading import refuse_nan
from capa_probe.errors import CapaProbeError
from capa_probe.figures.style import ROLES

COLUMNS = ("sample", "layer", "position", "kind", "attention", "contribution")
AXES = ("attention", "contribution")
#: Role of a visual token that is no sink.
OTHER = "non-sink"
MAX_PANELS = 8
#: Points drawn per panel and role; numbers and marginal distributions are taken from all tokens.
MAX_POINTS = 3000
#: Bins of a marginal distribution, over the range of all panels.
N_BINS = 36
_KEYS = ["sample", "layer", "position"]


def panel_layers(layers: Sequence[int]) -> list[int]:
    """All layers up to eight, otherwise eight evenly spread, first and last among them."""
    if len(layers) <= MAX_PANELS:
        return [int(layer) for layer in layers]
    return [int(layers[i]) for i in np.linspace(0, len(layers) - 1, MAX_PANELS).round().astype(int)]


def rank_correlation(tokens: pd.DataFrame) -> float:
    """Spearman's correlation of attention and contribution; NaN where one of them is constant."""
    ranks = tokens[list(AXES)].rank()
    if len(ranks) < 2 or (ranks.nunique() == 1).any():
        return math.nan
    return float(ranks["attention"].corr(ranks["contribution"]))


def scatter_tables(
    tokens_df: pd.DataFrame,
    sinks: pd.DataFrame,
    layers: Sequence[int] | None = None,
    most: int = MAX_POINTS,
) -> dict[str, pd.DataFrame]:
    """What :func:`capa_probe.figures.attention_contribution` draws, in three small tables.

    Args:
        tokens_df: as there.
        sinks: as there.
        layers: as there.
        most: points kept per layer and role.

    Returns:
        ``points`` (``layer``, ``role``, ``attention``, ``contribution``), thinned evenly from the whole table;
        ``panels``, one row per layer: ``rho``, ``n_tokens``, ``n_zero`` (tokens with a value of 0), ``n_samples``
        (over all layers shown), ``most``, ``tau`` (NaN if unknown), and tokens per role (``n_non-sink``,
        ``n_dump`` ...);
        ``margins``, distributions of log10 of all positive values: ``layer``, ``role``, ``axis``, ``low`` and
        ``high`` (ends of the bin, log10), ``share`` (of the role's tokens in this layer).

    Raises:
        CapaProbeError: columns or values are missing, or there are no visual tokens in a layer.
    """
    missing = [name for name in COLUMNS if name not in tokens_df]
    if missing:
        raise CapaProbeError(
            f"The token rows lack the columns {', '.join(missing)}; give those of a profile."
        )
    tokens = tokens_df[tokens_df["kind"] == "visual"]
    if "step" in tokens:
        tokens = tokens[tokens["step"] == 0]
    shown = panel_layers(sorted(tokens["layer"].unique())) if layers is None else list(layers)
    empty = sorted(set(shown) - set(tokens["layer"]))
    if empty or not shown:
        where = f" of layer {', '.join(map(str, empty))}" if empty else ""
        raise CapaProbeError(
            f"There are no rows of visual tokens{where} to draw; give layers of a profile that keeps its visual rows."
        )
    tokens = tokens.loc[tokens["layer"].isin(shown), [*_KEYS, *AXES]]
    for axis in AXES:
        refuse_nan(tokens, axis)
    tokens = tokens.merge(sinks[[*_KEYS, "role"]].astype({"role": object}), on=_KEYS, how="left")
    tokens["role"] = tokens["role"].fillna(OTHER).astype(str)
    edges = {axis: _edges(tokens[axis].to_numpy(np.float64)) for axis in AXES}
    points, panels, margins = [], [], []
    for layer in shown:
        here = tokens[tokens["layer"] == layer]
        counts = {f"n_{role}": int((here["role"] == role).sum()) for role in (OTHER, *ROLES)}
        panels.append(
            {
                "layer": int(layer),
                "rho": rank_correlation(here),
                "n_tokens": len(here),
                "n_zero": int((here[list(AXES)] <= 0).any(axis=1).sum()),
                **counts,
            }
        )
        for role, own in here.groupby("role", sort=False):
            # Evenly from the whole table: no chance in it, and every sample has its share.
            chosen = np.linspace(0, len(own) - 1, min(len(own), most)).astype(int)
            points.append(own.iloc[chosen][["layer", "role", *AXES]])
            margins += [
                _margin(int(layer), str(role), axis, own[axis].to_numpy(np.float64), edges[axis])
                for axis in AXES
            ]
    tau = sinks.attrs.get("tau")
    facts = pd.DataFrame(panels).assign(
        n_samples=int(tokens["sample"].nunique()), most=most, tau=math.nan if tau is None else float(tau)
    )
    return {
        "points": pd.concat(points, ignore_index=True).astype(dict.fromkeys(AXES, np.float32)),
        "panels": facts,
        "margins": pd.concat(margins, ignore_index=True),
    }


def _edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    logs = np.log10(values[values > 0])
    if not len(logs):
        return np.linspace(-1, 0, N_BINS + 1)
    low, high = float(logs.min()), float(logs.max())
    room = 0.0 if high > low else 0.5
    return np.linspace(low - room, high + room, N_BINS + 1)


def _margin(
    layer: int, role: str, axis: str, values: NDArray[np.float64], edges: NDArray[np.float64]
) -> pd.DataFrame:
    counts, _ = np.histogram(np.log10(values[values > 0]), bins=edges)
    table = pd.DataFrame({"low": edges[:-1], "high": edges[1:], "share": counts / len(values)})
    table = table[counts > 0]
    table.insert(0, "axis", axis)
    table.insert(0, "role", role)
    table.insert(0, "layer", layer)
    return table.astype({"low": np.float32, "high": np.float32, "share": np.float32})

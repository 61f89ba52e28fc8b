"""Where the last prompt token's attention goes, and what it gets from there, layer by layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.analysis.reading import fact
from capa_probe.analysis.splits import ROLES
from capa_probe.analysis.summary import check_whole
from capa_probe.errors import CapaProbeError
from capa_probe.tables import LayerProfile

QUANTITIES = ("attention", "contribution")
#: Into what the whole is divided.
PARTS = ("visual", *ROLES, "first", "text")


def layer_shares(prof: LayerProfile, sinks: pd.DataFrame | None = None) -> pd.DataFrame:
    """Share of attention and of contribution that visual tokens, sinks and text have for the last prompt token.

    Attention sums to 1 over all tokens that the last prompt token sees; contributions are norms, whose sum is taken
    for the whole. Shares are taken per sample and averaged over samples.

    Args:
        prof: a profile with the probes "attention" and "contribution", or one of them.
        sinks: the whole table, as :func:`classify_sinks` returned it; without it no visual token counts as a sink.

    Returns:
        One row per ``quantity`` ("attention", "contribution") that was measured and ``layer``. Mean shares, which sum
        to 1: ``visual`` (visual tokens that are no sinks), ``dump``, ``anchor``, ``undetermined`` (sinks by role),
        ``first`` (the first token of the prompt, where it is text: what takes most attention in many models) and
        ``text`` (all other text); ``first`` is NaN, and its share within ``text``, where the profile kept no text
        rows. ``all_visual`` is what visual tokens have, sinks among them, with ``all_visual_p05`` and
        ``all_visual_p95`` over samples; ``n_samples`` with a visual token (others do not count).

    Raises:
        CapaProbeError: no visual token, neither quantity was measured, a value is missing, or ``sinks`` is only a
            part of a table or another one.
    """
    n_layers = fact(prof, "n_layers")
    table = prof.layers[prof.layers["step"] == 0]
    shown = table.loc[table["kind"] == "visual", "sample"].unique()
    if not len(shown):
        raise CapaProbeError(
            "layer_shares was given a profile without a visual token; profile samples that have an image."
        )
    if sinks is not None:
        check_whole(sinks, "layer_shares")
        if len(others := sinks[~sinks["sample"].isin(shown) | (sinks["layer"] >= n_layers)]):
            raise CapaProbeError(
                f"layer_shares was given sinks of sample {others['sample'].iloc[0]!r} at layer "
                f"{others['layer'].iloc[0]}, which this profile does not have; give its own sinks."
            )
    table = table[table["sample"].isin(shown)]
    measured = [name for name in QUANTITIES if table[f"{name}_mean"].notna().any()]
    if not measured:
        raise CapaProbeError(
            "This profile holds neither attention nor contribution; profile again with these probes."
        )
    first = None
    if prof.rows == "all":
        where = [("step", "==", 0), ("position", "==", 0), ("kind", "==", "text")]
        first = prof.select(["sample", "layer", *measured], where)
        first = first[first["sample"].isin(shown)]
    rows = [_shares(table, sinks, first, name, n_layers) for name in measured]
    return pd.concat(rows, ignore_index=True)


def _shares(
    table: pd.DataFrame, sinks: pd.DataFrame | None, first: pd.DataFrame | None, name: str, n_layers: int
) -> pd.DataFrame:
    missing = table[table[f"{name}_mean"].isna()]
    if len(missing):
        row = missing.iloc[0]
        raise CapaProbeError(
            f"{name} is missing (NaN) for the {row['kind']} tokens of sample {row['sample']!r} at layer "
            f'{row["layer"]}; profile again with "{name}" among the probes.'
        )
    samples = table["sample"].unique()
    sums = table.assign(sum=table["n_tokens"].astype(np.float64) * table[f"{name}_mean"].astype(np.float64))
    visual, text = (
        _by_sample(sums[sums["kind"] == kind], "sum", samples, n_layers) for kind in ("visual", "text")
    )
    total = visual + text
    if not (total > 0).all():
        sample, layer = (int(index[0]) for index in np.nonzero(~(total > 0)))
        raise CapaProbeError(
            f"No token of sample {samples[sample]!r} has any {name} at layer {layer}; profile again."
        )
    share: dict[str, NDArray[np.float64]] = {"visual": visual / total}
    for role in ROLES:
        own = None if sinks is None else sinks[sinks["role"] == role]
        of_role = np.zeros_like(total) if own is None else _by_sample(own, name, samples, n_layers)
        share[role] = of_role / total
        share["visual"] = share["visual"] - share[role]
    share["text"] = text / total
    if first is not None:
        share["first"] = _by_sample(first, name, samples, n_layers) / total
        share["text"] = share["text"] - share["first"]
    low, high = np.quantile(visual / total, [0.05, 0.95], axis=0)
    return pd.DataFrame(
        {
            "quantity": name,
            "layer": np.arange(n_layers, dtype=np.int32),
            **{part: share[part].mean(axis=0) if part in share else np.nan for part in PARTS},
            "all_visual": (visual / total).mean(axis=0),
            "all_visual_p05": low,
            "all_visual_p95": high,
            "n_samples": len(samples),
        }
    )


def _by_sample(
    table: pd.DataFrame, column: str, samples: NDArray[np.object_], n_layers: int
) -> NDArray[np.float64]:
    """Sums of a column: (sample, layer), 0 where there is no row."""
    sums = np.zeros((len(samples), n_layers))
    place = pd.Index(samples).get_indexer(pd.Index(table["sample"])), table["layer"].to_numpy(np.int64)
    np.add.at(sums, place, table[column].to_numpy(np.float64))
    return sums

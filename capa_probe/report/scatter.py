"""Points of the plot of attention against contribution: every sink, and some of the other visual tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from capa_probe.figures.style import ROLE_NAMES
from capa_probe.report.encoding import FLOAT_CHARACTERS, float24
from capa_probe.report.runs import ShownRun

#: Ordinary tokens of a layer, and sinks of a layer, at most.
MOST_OTHERS, MOST_SINKS = 600, 400
_COLUMNS = ["sample", "layer", "position", "attention", "contribution"]


def scatter(run: ShownRun, room: float) -> dict[str, Any]:
    """Attention and contribution of visual tokens of all samples, layer by layer.

    Of more tokens than there is room for, as many are drawn at random (seed 0), sinks and others apart.

    Args:
        run: the run.
        room: characters that all points may take together.

    Returns:
        ``layers``: for each, roles ("" for an ordinary token) to ``n`` (how many there are), and the encoded
        ``attention`` and ``contribution`` of those that are drawn; empty where the profile lacks either.
    """
    if run.prof.rows == "none":
        return {"layers": []}
    most = max(1, int(room / (2 * FLOAT_CHARACTERS * run.n_layers)))
    others, sinks = min(MOST_OTHERS, most * 2 // 5), min(MOST_SINKS, most // 5)  # of three roles
    table = _draw(run, others)
    if table.empty:
        return {"layers": []}
    layers: list[dict[str, Any]] = [{} for _ in range(run.n_layers)]
    rng = np.random.default_rng(0)
    found = None if run.findings is None else run.findings.sinks
    marked = _COLUMNS[:3]
    for layer in sorted(table["layer"].unique().tolist()):
        own, n_sinks = table[table["layer"] == layer], 0
        n_visual = int(own["n_visual"].iloc[0])
        if found is not None:
            here = found[found["layer"] == layer]
            n_sinks = len(here)
            own = own.merge(here[marked], on=marked, how="left", indicator="sink")
            own = own[own["sink"] == "left_only"]
        layers[layer][""] = _points(own, others, rng, n_visual - n_sinks)
        for role in ROLE_NAMES:
            if found is not None and len(these := here[here["role"] == role]):
                layers[layer][role] = _points(these, sinks, rng, len(these))
    return {"layers": layers}


def _draw(run: ShownRun, n: int) -> pd.DataFrame:
    """Visual tokens at prefill, some ``n`` of each layer from all parts of the profile, and how many there are."""
    where = [("step", "==", 0), ("kind", "==", "visual")]
    rng = np.random.default_rng(0)
    chosen, counts = [], np.zeros(run.n_layers, dtype=np.int64)
    each = -(-2 * n // max(run.prof.n_parts, 1))
    for part in run.prof.read(_COLUMNS, where):
        known = part[part["attention"].notna() & part["contribution"].notna()]
        counts += np.bincount(known["layer"], minlength=run.n_layers)
        shuffled = known.iloc[rng.permutation(len(known))]
        chosen.append(shuffled.groupby("layer").head(each))
    table = pd.concat(chosen, ignore_index=True)
    return table.assign(n_visual=counts[table["layer"].to_numpy(dtype=np.int64)])


def _points(table: pd.DataFrame, most: int, rng: np.random.Generator, n: int) -> dict[str, Any]:
    drawn = table
    if len(table) > most:
        drawn = table.iloc[np.sort(rng.choice(len(table), most, replace=False))]
    return {"n": n, **{name: float24(drawn[name]) for name in ("attention", "contribution")}}

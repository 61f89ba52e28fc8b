"""Sink dimensions: which dimensions of the residual stream are massive on a few visual tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.analysis.dims_in_use import MAX_SHARE, DimCounts, count_dims, restriction
from capa_probe.analysis.reading import absolute_tau, visual_counts_by_sample
from capa_probe.analysis.redundancy import N_RESAMPLES, check_seed, layer_ranges
from capa_probe.errors import CapaProbeError
from capa_probe.measures import TAU
from capa_probe.tables import LayerProfile

#: Counts of resamples or samples held at once (8 bytes each).
_COUNTS_AT_ONCE = 2**22
_MODEL_COLUMNS = {
    "dim": "int32",
    "n_layers": "int64",
    "layers": "str",
    "offset_layers": "str",
    "n_tokens": "int64",
    "n_samples": "int64",
    "largest": "float64",
    "stability": "float64",
    "published": "boolean",
}


def measure_sink_dims(
    prof: LayerProfile, tau: float | str = TAU, max_share: float = MAX_SHARE, seed: int = 0
) -> pd.DataFrame:
    """The dimensions in which visual tokens exceed tau, layer by layer, at prefill.

    A sink dimension is massive on *few* tokens; one that is large on most tokens is an offset of the layer.

    Args:
        prof: a profile with its visual tokens.
        tau: threshold on sink strength, absolute or ``"relative"`` (see :func:`capa_probe.measures.resolve_tau`).
        max_share: largest share of a layer's visual tokens on which a sink dimension may exceed tau.
        seed: of the bootstrap.

    Returns:
        One row per layer (from layer 2) and dimension that exceeds tau on at least one visual token: ``layer``,
        ``dim``, ``n_tokens`` and ``share`` of the layer's visual tokens, ``largest`` sink strength, ``offset``
        (share > max_share), ``n_samples`` in which it exceeds tau, ``stability`` (share of 2000 bootstrap resamples of
        the samples with visual tokens in which it exceeds tau and is no offset; NaN with fewer than two samples),
        and ``published`` (whether it is among those published for this model; NA where none are). Four dimensions are
        kept per token, so where a token's fourth exceeds tau too ``n_tokens`` is a lower bound for the others. Empty
        where nothing exceeds tau. ``.attrs`` holds ``tau``, ``max_share``, ``seed``, ``n_samples`` (with visual
        tokens), ``published`` (None where none are), and of these ``published_not_found`` (exceed tau nowhere) and
        ``published_not_measured`` (the profile was restricted to other dimensions).

    Raises:
        CapaProbeError: an unusable ``tau``, ``max_share`` or ``seed``, or a profile without visual token rows or sink
            strength.
    """
    check_seed(seed)
    threshold = absolute_tau(prof, tau)
    counts = count_dims(prof, threshold, max_share)
    n_visual = visual_counts_by_sample(prof)
    layer, dim = np.nonzero(counts.n_tokens)
    n_tokens = counts.n_tokens[layer, dim]
    cells = layer * counts.n_tokens.shape[1] + dim
    seen_on = counts.by_sample.groupby("cell").size().reindex(cells)

    published = prof.manifest.get("published_sink_dims")
    known = None if not published else sorted({int(each) for each in published})
    restricted = restriction(prof)
    not_measured = [each for each in known or () if restricted is not None and each not in restricted]
    found = set(dim.tolist())
    table = pd.DataFrame(
        {
            "layer": layer.astype(np.int32),
            "dim": dim.astype(np.int32),
            "n_tokens": n_tokens,
            "share": n_tokens / counts.n_visual[layer],
            "largest": counts.largest[layer, dim],
            "offset": counts.is_offset[layer, dim],
            "n_samples": seen_on.to_numpy(np.int64),
            "stability": _stability(counts, cells, n_visual, seed),
            "published": pd.array(
                [None if known is None else each in known for each in dim], dtype="boolean"
            ),
        }
    )
    table.attrs = {
        "tau": threshold,
        "max_share": float(max_share),
        "seed": int(seed),
        "n_samples": len(n_visual),
        "published": known,
        "published_not_found": [
            each for each in known or () if each not in found and each not in not_measured
        ],
        "published_not_measured": not_measured,
    }
    return table


def model_sink_dims(dims: pd.DataFrame) -> pd.DataFrame:
    """The sink dimensions of the model as a whole, and what became of the published ones.

    Args:
        dims: the table, as :func:`measure_sink_dims` returned it, with its ``.attrs``.

    Returns:
        One row per dimension that is a sink dimension in some layer or has been published for this model, those of
        most layers first: ``dim``, ``n_layers`` and ``layers`` ("2-31") where it is a sink dimension,
        ``offset_layers`` where it is an offset, ``n_tokens`` (a token counts in every layer), ``n_samples`` and
        ``largest`` (of any layer), ``stability`` (that of its most stable layer: at least as large a share of resamples
        finds it in some layer), ``published`` (NA where none are).

    Raises:
        CapaProbeError: the table is not what :func:`measure_sink_dims` returned.
    """
    if "published_not_found" not in dims.attrs or not {"dim", "offset", "stability"} <= set(dims.columns):
        raise CapaProbeError(
            "model_sink_dims was given a table without the columns or the .attrs of measure_sink_dims; give the table "
            "that measure_sink_dims returned."
        )
    published = dims.attrs["published"]
    names = sorted({*dims.loc[~dims["offset"], "dim"].tolist(), *(published or ())})
    measurable = dims.attrs["n_samples"] > 1
    rows = []
    for name in names:
        own = dims[dims["dim"] == name]
        here = own[~own["offset"]]
        never = 0.0 if measurable and name not in dims.attrs["published_not_measured"] else np.nan
        rows.append(
            {
                "dim": name,
                "n_layers": len(here),
                "layers": layer_ranges(here["layer"]),
                "offset_layers": layer_ranges(own.loc[own["offset"], "layer"]),
                "n_tokens": int(here["n_tokens"].sum()),
                "n_samples": int(here["n_samples"].max()) if len(here) else 0,
                "largest": float(here["largest"].max()) if len(here) else np.nan,
                "stability": float(here["stability"].max()) if len(here) else never,
                "published": None if published is None else name in published,
            }
        )
    table = pd.DataFrame(rows, columns=list(_MODEL_COLUMNS)).astype(_MODEL_COLUMNS)
    return table.sort_values(
        ["n_layers", "n_tokens", "dim"], ascending=[False, False, True], ignore_index=True
    )


def _stability(
    counts: DimCounts, cells: NDArray[np.int64], n_visual: pd.DataFrame, seed: int
) -> NDArray[np.float64]:
    """Share of resamples of samples in which each cell is a sink dimension again: (cell,)."""
    n = len(n_visual)
    if n < 2:
        return np.full(len(cells), np.nan)
    visual = n_visual.to_numpy(np.float64)
    sample = n_visual.index.get_indexer(pd.Index(counts.by_sample["sample"]))
    column = np.searchsorted(cells, counts.by_sample["cell"])
    n_tokens = counts.by_sample["n_tokens"].to_numpy(np.float64)
    layer = cells // counts.n_tokens.shape[1]

    rng = np.random.default_rng(seed)
    found = np.zeros(len(cells))
    at_once = max(1, _COUNTS_AT_ONCE // n)
    for begin in range(0, N_RESAMPLES, at_once):
        size = min(at_once, N_RESAMPLES - begin)
        # How often each sample was drawn is multinomial: a resample is then one row of a matrix product.
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        allowed = counts.max_share * (drawn @ visual)  # (resample, layer)
        width = max(1, _COUNTS_AT_ONCE // max(n, size))
        for first in range(0, len(cells), width):
            inside = (column >= first) & (column < first + width)
            block = np.zeros((n, min(width, len(cells) - first)))
            block[sample[inside], column[inside] - first] = n_tokens[inside]
            again = drawn @ block
            of_layer = allowed[:, layer[first : first + width]]
            found[first : first + width] += ((again > 0) & (again <= of_layer)).sum(axis=0)
    return found / N_RESAMPLES

"""Does a sink keep its role from layer to layer, and from one question about an image to the next?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.analysis.images import PLACE, check_groups
from capa_probe.analysis.summary import check_whole

#: ``layer`` of the row for all layers together.
ALL_LAYERS = -1
_COLUMNS = {
    "over": "str",
    "layer": "int32",
    "n_tokens": "int64",
    "n_pairs": "int64",
    "same": "float64",
    "same_expected": "float64",
    "constant": "float64",
    "constant_expected": "float64",
}


def role_stability(sinks: pd.DataFrame, groups: Mapping[str, Hashable] | None = None) -> pd.DataFrame:
    """How often a sink keeps its role over layers and over prompts, beside what chance would give.

    Only sinks with a known role count. By chance, roles are drawn anew with the frequencies that they have at each
    layer among the tokens compared, as in Cohen's kappa (over layers) and Fleiss' (over prompts).

    Args:
        sinks: the whole table, as :func:`classify_sinks` returned it, with its ``.attrs``.
        groups: sample id to any key of its images, the same for samples that show the same images in the same order
            with different questions; samples not in it, or with the key None, stand alone. Without it nothing is
            known over prompts.

    Returns:
        For ``over`` = "layers" and "prompts" one row per layer of the model, then one for all (``layer`` -1), with
        ``n_tokens``, ``n_pairs`` compared, ``same`` (share of pairs with one role) and ``same_expected`` by chance,
        ``constant`` (share of tokens with one role throughout) and ``constant_expected``; NaN where there is nothing
        to compare.

        Over layers, a pair is a visual token of a sample that is a sink at this layer and the next. ``constant`` is
        known for all layers together only: tokens that are sinks in at least two layers, next to one another or not.
        Over prompts, a pair is one place of an image (tile, row and column; the position in the prompt where it has
        no place) in two samples of a group, a sink at this layer in both; a token is such a place at this layer.

    Raises:
        CapaProbeError: the table is not what :func:`classify_sinks` returned, or only some of its rows; or ``groups``
            is no mapping to keys.
    """
    n_layers = len(check_whole(sinks, "role_stability"))
    keys = check_groups(groups)
    known = sinks[sinks["role"] != "undetermined"]
    known = known.assign(anchor=(known["role"] == "anchor").astype(np.int64))
    rows = [*_over_layers(known, n_layers), *_over_prompts(known, n_layers, keys)]
    return pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS)


def _over_layers(known: pd.DataFrame, n_layers: int) -> list[dict[str, object]]:
    here = known[["sample", "position", "layer", "anchor"]]
    pairs = here.merge(here.assign(layer=here["layer"] - 1), on=["sample", "position", "layer"])
    one, other = (pairs[name].to_numpy(np.float64) for name in ("anchor_x", "anchor_y"))
    layer = pairs["layer"].to_numpy(np.int64)
    rows, expected = [], np.full(len(pairs), np.nan)
    for at in range(n_layers):
        own = layer == at
        p, q = (float(anchors[own].mean()) if own.any() else np.nan for anchors in (one, other))
        expected[own] = p * q + (1 - p) * (1 - q)
        each = np.ones(int(own.sum()), np.int64)
        rows.append(_row("layers", at, len(each), each, (one == other)[own], expected[own]))

    tokens = here[here.groupby(["sample", "position"])["layer"].transform("size") >= 2]
    p_anchor = tokens.groupby("layer")["anchor"].transform("mean")
    of_token = tokens.assign(p=p_anchor, q=1 - p_anchor).groupby(["sample", "position"])
    constant = of_token["anchor"].nunique().to_numpy() == 1
    by_chance = (of_token["p"].prod() + of_token["q"].prod()).to_numpy(np.float64)
    each = np.ones(len(pairs), np.int64)
    whole = _row("layers", ALL_LAYERS, len(constant), each, one == other, expected)
    return [*rows, whole | {"constant": _mean(constant), "constant_expected": _mean(by_chance)}]


def _over_prompts(
    known: pd.DataFrame, n_layers: int, keys: Mapping[str, Hashable]
) -> list[dict[str, object]]:
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys.values()))}
    number = known["sample"].map({sample: numbers[key] for sample, key in keys.items()})
    shown = known[number.notna()].assign(group=number[number.notna()].astype(np.int64))
    # A token without a place in a grid is known by its position alone.
    shown["nowhere"] = shown["position"].where(shown["row"] < 0, -1)
    places = shown.groupby(["layer", "group", *PLACE, "nowhere"], as_index=False)
    tokens = places.agg(k=("anchor", "size"), anchors=("anchor", "sum"))
    tokens = tokens[tokens["k"] >= 2]
    layer, k, a = (tokens[name].to_numpy(np.int64) for name in ("layer", "k", "anchors"))
    n_pairs, n_same = k * (k - 1) // 2, (a * (a - 1) + (k - a) * (k - a - 1)) // 2

    p = np.full(len(tokens), np.nan)
    for at in np.unique(layer):
        p[layer == at] = a[layer == at].sum() / k[layer == at].sum()
    constant, by_chance = (a == 0) | (a == k), p**k + (1 - p) ** k
    rows = []
    for at in (*range(n_layers), ALL_LAYERS):
        own = np.ones(len(layer), dtype=np.bool_) if at == ALL_LAYERS else layer == at
        pairs = n_pairs[own]
        same, expected = n_same[own] / pairs, p[own] ** 2 + (1 - p[own]) ** 2
        row = _row("prompts", at, int(own.sum()), pairs, same, expected)
        rows.append(row | {"constant": _mean(constant[own]), "constant_expected": _mean(by_chance[own])})
    return rows


def _row(
    over: str,
    layer: int,
    n_tokens: int,
    n_pairs: NDArray[np.int64],
    same: NDArray[np.float64] | NDArray[np.bool_],
    expected: NDArray[np.float64],
) -> dict[str, object]:
    """A row of the table; ``same`` and ``expected`` count as often as there are pairs behind them."""
    return {
        "over": over,
        "layer": layer,
        "n_tokens": n_tokens,
        "n_pairs": int(n_pairs.sum()),
        "same": _mean(same, n_pairs),
        "same_expected": _mean(expected, n_pairs),
        "constant": np.nan,
        "constant_expected": np.nan,
    }


def _mean(values: NDArray[np.float64] | NDArray[np.bool_], weights: NDArray[np.int64] | None = None) -> float:
    return float(np.average(values, weights=weights)) if len(values) else np.nan

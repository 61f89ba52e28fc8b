"""Three stages of a decoder, as VisiPruner reads it: vision not yet used, looked at, no longer needed."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.analysis.reading import fact
from capa_probe.errors import CapaProbeError
from capa_probe.tables import LayerProfile

STAGES = ("shallow", "middle", "deep")
#: First layer that is not shallow, and the number of layers, of the model for which VisiPruner publishes it.
_BOUNDARY, _DEPTH = 6, 32
#: Cosines above which a visual token turns the attention output too little to count: in the middle, and deep.
MIDDLE_COSINE, DEEP_COSINE = 0.995, 0.999
#: So many later layers without such a token end the middle stage.
QUIET_LAYERS = 2


def visipruner_stages(
    prof: LayerProfile,
    boundary: int | None = None,
    middle_cosine: float = MIDDLE_COSINE,
    deep_cosine: float = DEEP_COSINE,
) -> pd.DataFrame:
    """In which layers visual tokens can turn the attention output of the last prompt token.

    VisiPruner takes a visual token for critical where leaving its part ``c`` out of the attention output ``o`` of the
    last token turns it: ``cos(o - c, o) < 0.995``. Layers below 6 are shallow; the middle stage lasts until, after the
    first later layer with such a token, two layers (not always neighbours) have had none at 0.999, and all layers
    after those are deep (EIT-NLP/VisiPruner, code, where the boundary layer itself is not yet looked at; here it is).

    A profile holds the norm C of ``c`` and that of ``o``, not their angle, and both behind the output projection
    rather than before it. For a given ratio ``r = C / |o|`` below 1 the cosine is at least ``sqrt(1 - r^2)``, so that
    a token with ``r`` up to ``sqrt(1 - cosine^2)`` cannot turn the output that far (0.0999 for 0.995, 0.0447 for
    0.999), and one above can. The reading follows VisiPruner with "can turn" for "turns", looks at all visual tokens
    where VisiPruner looks at those it has kept, and scales the boundary to the model's depth; it is no run of
    VisiPruner.

    Args:
        prof: a profile with all token rows (``rows="all"``) and the probes "contribution" and "residual".
        boundary: first layer that is not shallow; ``round(6 * n_layers / 32)``, at least 1, if not given.
        middle_cosine: VisiPruner's threshold in the middle stage, between 0 and 1.
        deep_cosine: its threshold after that.

    Returns:
        One row per layer: ``layer``; ``largest`` (median over samples of the largest ``r`` of a visual token),
        ``can_turn`` and ``can_turn_deep`` (share of samples in which a token's ``r`` is above the two bounds);
        ``shallow``, ``middle``, ``deep`` (share of samples that are in this stage), ``stage`` (that of most samples,
        the earlier one where two are as many), and ``n_samples``. ``.attrs`` holds ``boundary``, ``middle_bound`` and
        ``deep_bound``. Samples without a visual token do not count.

    Raises:
        CapaProbeError: an argument out of range, or a profile without what is needed.
    """
    n_layers = fact(prof, "n_layers")
    first = _boundary(boundary, n_layers)
    bounds = [
        _bound(name, value)
        for name, value in (("middle_cosine", middle_cosine), ("deep_cosine", deep_cosine))
    ]
    ratio = largest_ratios(prof).to_numpy(np.float64)
    can_turn, can_turn_deep = (ratio > bound for bound in bounds)
    starts_deep = np.array(
        [_first_deep(*sample, first) for sample in zip(can_turn, can_turn_deep, strict=True)]
    )
    layer = np.arange(n_layers)
    is_deep = layer >= starts_deep[:, None]
    shares = {
        "shallow": np.where(layer < first, 1.0, 0.0),
        "middle": np.where(layer < first, 0.0, 1 - is_deep.mean(axis=0)),
        "deep": is_deep.mean(axis=0),
    }
    table = pd.DataFrame(
        {
            "layer": layer.astype(np.int32),
            "largest": np.median(ratio, axis=0),
            "can_turn": can_turn.mean(axis=0),
            "can_turn_deep": can_turn_deep.mean(axis=0),
            **shares,
        }
    )
    table["stage"] = np.array(STAGES)[np.stack(list(shares.values())).argmax(axis=0)]
    table["n_samples"] = len(ratio)
    table.attrs = {"boundary": first, "middle_bound": bounds[0], "deep_bound": bounds[1]}
    return table


def largest_ratios(prof: LayerProfile) -> pd.DataFrame:
    """The largest ``C / |attention output|`` of a visual token for the last prompt token: samples x layers.

    Args:
        prof: as for :func:`visipruner_stages`.

    Raises:
        CapaProbeError: as :func:`visipruner_stages`.
    """
    if prof.rows != "all":
        raise CapaProbeError(
            f'This profile was made with rows="{prof.rows}", and the stages need the row of the last prompt token; '
            'profile again with rows="all".'
        )
    n_layers = fact(prof, "n_layers")
    columns = ["sample", "layer", "position", "kind", "contribution", "attn_update_norm"]
    found = []
    for part in prof.read(columns, [("step", "==", 0)]):
        visual = part[part["kind"] == "visual"]
        if visual.empty:
            continue
        rows = part[part["sample"].isin(visual["sample"].unique())]
        by = ["sample", "layer"]
        last = rows.loc[rows.groupby(by, sort=False)["position"].idxmax()].set_index(by)["attn_update_norm"]
        own = visual.groupby(by, sort=False)["contribution"]
        # max and sum of pandas pass NaN over.
        largest = own.max().where(own.count() == own.size())
        ratio = (largest / last).where(last > 0)
        wrong = ratio[ratio.isna()]
        if len(wrong):
            sample, layer = wrong.index[0]
            raise CapaProbeError(
                f"contribution or attn_update_norm is missing (NaN), or the attention output is 0, in sample "
                f'{sample!r} at layer {layer}; profile again with "contribution" and "residual" among the probes.'
            )
        found.append(ratio.unstack("layer").loc[visual["sample"].unique()])
    if not found:
        raise CapaProbeError(
            "visipruner_stages was given a profile without a visual token; profile samples that have an image."
        )
    table = pd.concat(found)
    if table.columns.tolist() != [*range(n_layers)] or table.isna().any(axis=None):
        raise CapaProbeError(f"Not every sample has tokens at each of the {n_layers} layers; profile again.")
    return table


def _first_deep(can_turn: NDArray[np.bool_], can_turn_deep: NDArray[np.bool_], boundary: int) -> int:
    """First deep layer of a sample; the number of layers where there is none."""
    n_layers = len(can_turn)
    looking = np.flatnonzero(can_turn[boundary:])
    if not len(looking):
        return n_layers
    after = boundary + int(looking[0]) + 1
    quiet = np.flatnonzero(~can_turn_deep[after:])
    return after + int(quiet[QUIET_LAYERS - 1]) + 1 if len(quiet) >= QUIET_LAYERS else n_layers


def _boundary(boundary: int | None, n_layers: int) -> int:
    if boundary is None:
        return min(max(1, round(_BOUNDARY * n_layers / _DEPTH)), n_layers)
    if (
        isinstance(boundary, bool)
        or not isinstance(boundary, (int, np.integer))
        or not 0 <= boundary <= n_layers
    ):
        raise CapaProbeError(
            f"boundary={boundary!r} was given; give the first layer that is not shallow, from 0 to {n_layers}."
        )
    return int(boundary)


def _bound(name: str, cosine: object) -> float:
    number = isinstance(cosine, (int, float, np.floating)) and not isinstance(cosine, bool)
    if not (number and 0 < float(cosine) < 1):  # type: ignore[arg-type]
        raise CapaProbeError(f"{name}={cosine!r} was given; give a cosine between 0 and 1, such as 0.995.")
    return math.sqrt(1 - float(cosine) ** 2)  # type: ignore[arg-type]

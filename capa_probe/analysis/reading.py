"""How the sink analyses read a profile: the visual tokens at prefill, part by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.errors import CapaProbeError
from capa_probe.measures import resolve_tau
from capa_probe.schema import SINK_COLUMNS
from capa_probe.tables import LayerProfile

#: Sinks are looked for from this layer on, as in the paper.
FIRST_LAYER = 2


def visual_tokens(prof: LayerProfile, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
    """Visual tokens at prefill from layer 2 on, part by part; each has the sink columns beside those asked for.

    Raises:
        CapaProbeError: the profile has no token rows, no visual token, or no sink strength for one of them.
    """
    if prof.rows == "none":
        raise CapaProbeError(
            'This profile holds no token rows (it was made with rows="none"), and sinks are single tokens; profile '
            'again with rows="visual" or rows="all".'
        )
    n_layers, d_model = fact(prof, "n_layers"), fact(prof, "d_model")
    visual_counts(prof)  # refuses a profile without visual tokens
    names = [*dict.fromkeys(["sample", "layer", *columns, *(name for pair in SINK_COLUMNS for name in pair)])]
    where = [("step", "==", 0), ("kind", "==", "visual"), ("layer", ">=", FIRST_LAYER)]
    for part in prof.read(names, where):
        refuse_nan(part, "sink_strength")
        dims = part[[dim for _, dim in SINK_COLUMNS]].to_numpy()
        if (dims >= d_model).any() or (part["layer"] >= n_layers).any():
            raise CapaProbeError(
                f"This profile has tokens at layer {part['layer'].max()} with sink dimensions up to {dims.max()}, but "
                f"its manifest says {n_layers} layers of width {d_model}; profile again."
            )
        yield part


def refuse_nan(tokens: pd.DataFrame, column: str) -> None:
    """Refuse visual tokens of which a probe of this name has not measured one.

    Args:
        tokens: rows of visual tokens, with ``sample``, ``layer`` and the column.
        column: which, and the name of its probe.

    Raises:
        CapaProbeError: a value is missing; it names the first.
    """
    missing = tokens[column].isna().to_numpy()
    if missing.any():
        first = tokens.iloc[int(missing.argmax())]
        raise CapaProbeError(
            f"{column} is missing (NaN) for visual tokens of sample {first['sample']!r} at layer "
            f'{first["layer"]}; profile again with "{column}" among the probes.'
        )


def strengths_and_dims(part: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The sink columns of some tokens as two (token, rank) arrays; NaN and -1 where there is no such rank."""
    strengths = part[[strength for strength, _ in SINK_COLUMNS]].to_numpy(np.float64)
    return strengths, part[[dim for _, dim in SINK_COLUMNS]].to_numpy(np.int64)


def strongest(prof: LayerProfile, offsets: Sequence[Sequence[int]] | None = None) -> tuple[float, int] | None:
    """The largest sink strength of a visual token from layer 2 on, and its layer; None without such a token.

    Args:
        prof: a profile with its visual tokens.
        offsets: per layer, dimensions that do not count, as ``classify_sinks(prof).attrs["offsets"]``.
    """
    found: tuple[float, int] | None = None
    for part in visual_tokens(prof, []):
        strengths, dims = strengths_and_dims(part)
        layer = part["layer"].to_numpy(np.int64)
        for at in np.unique(layer).tolist():
            own = layer == at
            left_out = np.isin(dims[own], [] if offsets is None else list(offsets[at]))
            counted = strengths[own][~left_out & (dims[own] >= 0)]
            if counted.size and (found is None or counted.max() > found[0]):
                found = float(counted.max()), int(at)
    return found


def visual_counts(prof: LayerProfile) -> NDArray[np.int64]:
    """Visual tokens per layer at prefill, all samples together: (layer,).

    Raises:
        CapaProbeError: there is none.
    """
    table = prof.layers
    table = table[(table["step"] == 0) & (table["kind"] == "visual")]
    if table.empty:
        raise CapaProbeError(
            "This profile holds no visual token, and sinks are visual tokens; profile samples that have an image."
        )
    layer, n_tokens = (table[name].to_numpy(np.int64) for name in ("layer", "n_tokens"))
    counts = np.zeros(max(fact(prof, "n_layers"), int(layer.max()) + 1), dtype=np.int64)
    np.add.at(counts, layer, n_tokens)
    return counts[: fact(prof, "n_layers")]


def visual_counts_by_sample(prof: LayerProfile) -> pd.DataFrame:
    """Visual tokens at prefill of each sample that has any, in the profile's order: samples x layers of the model."""
    table = prof.layers
    table = table[(table["step"] == 0) & (table["kind"] == "visual")]
    counts = table.pivot_table(index="sample", columns="layer", values="n_tokens", aggfunc="sum", sort=False)
    return counts.reindex(columns=range(fact(prof, "n_layers"))).fillna(0).astype(np.int64)


def absolute_tau(prof: LayerProfile, tau: object) -> float:
    """The threshold on sink strength at this profile's width (see :func:`capa_probe.measures.resolve_tau`).

    Raises:
        CapaProbeError: ``tau`` is neither a number nor "relative", or cannot be used at this width.
    """
    if isinstance(tau, (int, float, np.number)) and not isinstance(tau, bool):
        return resolve_tau(float(tau), fact(prof, "d_model"))
    return resolve_tau(str(tau), fact(prof, "d_model"))  # "relative", or refused


def fact(prof: LayerProfile, name: str) -> int:
    """A number that every manifest of ``cp.profile`` holds.

    Raises:
        CapaProbeError: this one does not.
    """
    if not isinstance(prof.manifest.get(name), int):
        raise CapaProbeError(f"The manifest of this profile does not say {name}; profile again.")
    return int(prof.manifest[name])

"""Which dimensions of the residual stream sink strength is taken over, and how often each exceeds tau."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.analysis.reading import fact, strengths_and_dims, visual_counts, visual_tokens
from capa_probe.analysis.redundancy import layer_ranges
from capa_probe.errors import CapaProbeError
from capa_probe.schema import SINK_COLUMNS
from capa_probe.tables import LayerProfile

#: A dimension that exceeds tau on a larger share of a layer's visual tokens is an offset, not a sink dimension.
MAX_SHARE = 0.25


@dataclass(frozen=True)
class ChosenDims:
    """Dimensions in use, per layer, and how they were found."""

    in_use: NDArray[np.bool_]  # (layer, d_model)
    #: Whether the four dimensions kept per token are all that sink strength was measured over.
    complete: bool
    #: As asked for: "measured", "published", or the dimensions.
    asked: str | list[int]
    #: Dimensions in use that exceed tau, per layer.
    found: list[list[int]]
    #: Dimensions that exceed tau on too many tokens, per layer; left out where dimensions are measured.
    offsets: list[list[int]]


def choose_dims(
    prof: LayerProfile, dims: str | Sequence[int], tau: float, max_share: float = MAX_SHARE
) -> ChosenDims:
    """Measure, look up or check the dimensions that sink strength is taken over.

    Args:
        prof: a profile with its visual tokens.
        dims: "measured", "published" or explicit dimensions.
        tau: absolute threshold.
        max_share: as in :func:`capa_probe.analysis.measure_sink_dims`.

    Raises:
        CapaProbeError: dimensions that are not there, or not among those that the profile was restricted to.
    """
    counts = count_dims(prof, tau, max_share)
    restricted = restriction(prof)
    named = _named(prof, dims, restricted)
    if named is None:
        in_use = ~counts.is_offset
        asked: str | list[int] = "measured"
    else:
        in_use = np.zeros_like(counts.is_offset)
        in_use[:, named] = True
        asked = dims if isinstance(dims, str) else named
    offsets = counts.is_offset & (in_use | (named is None))
    _warn_of_offsets(offsets, named is None, tau, max_share)
    if named is None:
        _warn_of_hidden(counts, tau)
    return ChosenDims(
        in_use=in_use,
        complete=_is_complete(restricted),
        asked=asked,
        found=_per_layer(in_use & (counts.n_tokens > 0)),
        offsets=_per_layer(offsets),
    )


@dataclass(frozen=True)
class DimCounts:
    """(layer, d_model) each: on how many visual tokens a dimension exceeds tau, and how strong it gets."""

    n_tokens: NDArray[np.int64]
    #: Tokens whose four largest dimensions exceed tau without this one: it may exceed tau there, unseen.
    n_unseen: NDArray[np.int64]
    largest: NDArray[np.float64]
    is_offset: NDArray[np.bool_]
    n_visual: NDArray[np.int64]  # (layer,)
    max_share: float
    #: ``sample``, ``cell`` (layer * d_model + dimension) and ``n_tokens`` above tau, where there are any.
    by_sample: pd.DataFrame


def count_dims(prof: LayerProfile, tau: float, max_share: float) -> DimCounts:
    """Go through the visual tokens and count.

    Args:
        prof: a profile with its visual tokens.
        tau: absolute threshold.
        max_share: as in :func:`capa_probe.analysis.measure_sink_dims`.

    Raises:
        CapaProbeError: ``max_share`` is no share, or the profile lacks what is needed.
    """
    if isinstance(max_share, (bool, str)) or not 0 < max_share <= 1:
        raise CapaProbeError(
            f"max_share={max_share!r} was given; give a share above 0 and up to 1, such as 0.25."
        )
    n_layers, d_model = fact(prof, "n_layers"), fact(prof, "d_model")
    complete = _is_complete(restriction(prof))
    cells = n_layers * d_model
    n_tokens, in_full = np.zeros(cells, dtype=np.int64), np.zeros(cells, dtype=np.int64)
    n_full = np.zeros(n_layers, dtype=np.int64)
    largest = np.zeros(cells)
    by_sample = []
    for part in visual_tokens(prof, []):
        strengths, dims = strengths_and_dims(part)
        layer = part["layer"].to_numpy(np.int64)
        cell = layer[:, None] * d_model + dims
        over = strengths > tau  # NaN, and with it dimension -1, is not
        n_tokens += np.bincount(cell[over], minlength=cells)
        samples = part["sample"].to_numpy()[np.nonzero(over)[0]]
        own = pd.DataFrame({"sample": samples, "cell": cell[over]})
        by_sample.append(own.groupby(["sample", "cell"], sort=False).size().reset_index(name="n_tokens"))
        np.maximum.at(largest, cell[over], strengths[over])
        full = over.all(axis=1) & (not complete)
        n_full += np.bincount(layer[full], minlength=n_layers)
        in_full += np.bincount(cell[full].ravel(), minlength=cells)
    shape = n_layers, d_model
    n_visual = visual_counts(prof)
    return DimCounts(
        n_tokens=n_tokens.reshape(shape),
        n_unseen=n_full[:, None] - in_full.reshape(shape),
        largest=largest.reshape(shape),
        is_offset=n_tokens.reshape(shape) > max_share * n_visual[:, None],
        n_visual=n_visual,
        max_share=max_share,
        by_sample=pd.concat(by_sample, ignore_index=True),
    )


def restriction(prof: LayerProfile) -> list[int] | None:
    """The dimensions that sink strength was restricted to when the profile was made."""
    dims: Any = prof.manifest.get("sink_dims")
    return None if dims is None else [int(dim) for dim in dims]


def _is_complete(restricted: list[int] | None) -> bool:
    return restricted is not None and len(restricted) <= len(SINK_COLUMNS)


def _named(prof: LayerProfile, dims: str | Sequence[int], restricted: list[int] | None) -> list[int] | None:
    """The set of dimensions that was asked for; None where they are to be measured among all."""
    if isinstance(dims, str) and dims == "measured":
        return restricted
    if isinstance(dims, str) and dims == "published":
        published = prof.manifest.get("published_sink_dims")
        if not published:
            raise CapaProbeError(
                f'dims="published" was given, but no sink dimensions are published for '
                f'{prof.manifest.get("model", "this model")}; use dims="measured" or give the dimensions.'
            )
        named = sorted({int(dim) for dim in published})
    else:
        named = _explicit(dims, fact(prof, "d_model"))
    outside = [] if restricted is None else sorted(set(named) - set(restricted))
    if outside:
        raise CapaProbeError(
            f"dims={dims!r} was given, but sink strength was measured over sink_dims={restricted} only, without "
            f"{', '.join(map(str, outside))}; give dimensions of that set or profile again with sink_dims={named}."
        )
    return named


def _explicit(dims: str | Sequence[int], d_model: int) -> list[int]:
    try:
        if isinstance(dims, str) or any(isinstance(dim, (bool, np.bool_)) for dim in dims):
            raise TypeError
        named = sorted({operator.index(dim) for dim in dims})
    except TypeError:
        named = []
    if not named or named[0] < 0 or named[-1] >= d_model:
        raise CapaProbeError(
            f'dims={dims!r} was given; give "measured", "published", or at least one dimension, each a whole number '
            f"from 0 to {d_model - 1}."
        )
    return named


def _warn_of_offsets(offsets: NDArray[np.bool_], excluded: bool, tau: float, max_share: float) -> None:
    if offsets.any():
        what = (
            "offsets rather than sink dimensions, left out in these layers"
            if excluded
            else "offsets rather than sink dimensions, kept because they were asked for by name"
        )
        warnings.warn(
            f"These dimensions exceed tau={tau:g} on more than {max_share:.0%} of a layer's visual tokens: "
            f"{_by_dim(offsets)}; they are {what}.",
            stacklevel=4,
        )


def _warn_of_hidden(counts: DimCounts, tau: float) -> None:
    """Four dimensions per token are kept: a dimension may be an offset and hide behind four larger ones."""
    at_most = counts.n_tokens + counts.n_unseen
    doubtful = (
        (counts.n_tokens > 0) & ~counts.is_offset & (at_most > counts.max_share * counts.n_visual[:, None])
    )
    if doubtful.any():
        layers = np.asarray(doubtful.any(axis=1))
        warnings.warn(
            f"sink_strength_4 exceeds tau={tau:g} on so many visual tokens at {_at(layers)} that sink "
            f"dimensions measured there ({int(doubtful.any(axis=0).sum())}) may be offsets, hidden behind four larger "
            "ones; raise tau, or profile again with sink_dims=[...] to look at up to four dimensions exactly.",
            stacklevel=4,
        )


def _at(layers: NDArray[np.bool_]) -> str:
    return f"layer{'s' if layers.sum() > 1 else ''} {layer_ranges(np.flatnonzero(layers))}"


def _by_dim(table: NDArray[np.bool_]) -> str:
    dims = np.flatnonzero(table.any(axis=0))
    shown = [f"dimension {dim} at {_at(table[:, dim])}" for dim in dims[:20]]
    return "; ".join(shown) + (f"; and {len(dims) - 20} more" if len(dims) > 20 else "")


def _per_layer(table: NDArray[np.bool_]) -> list[list[int]]:
    return [[int(dim) for dim in np.flatnonzero(row)] for row in table]

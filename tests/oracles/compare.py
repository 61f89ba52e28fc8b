"""How far a table is from an oracle's, column by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

#: Columns that pass through zero: a cosine is compared on its own scale of 1, since a share of nearly nothing is noise.
ABSOLUTE = ("attn_cosine", "ffn_cosine")
#: The removal effect is the difference of two vectors about as long as the contribution. Where tokens are nearly alike
#: it is a small one, and no more exact than they are: it is compared on the scale of the larger of the two columns.
DIFFERENCE, OF = "removal_effect", "contribution"


def worst(
    found: pd.DataFrame, wanted: Sequence[Mapping[str, Any]], absolute: tuple[str, ...] = ABSOLUTE
) -> dict[str, float]:
    """The largest disagreement of each column, ``|a - b| / |b|`` with b the oracle's number.

    Names and indices must be equal, and what is NaN must be NaN in both. Of columns whose name starts as one of
    ``absolute`` it is ``|a - b|``.
    """
    assert len(found) == len(wanted)
    oracle = pd.DataFrame(list(wanted))
    result = {}
    for name in found.columns:
        if not pd.api.types.is_float_dtype(oracle[name]):
            assert list(found[name]) == list(oracle[name]), name
            result[name] = 0.0
            continue
        a, b = found[name].to_numpy(np.float64), oracle[name].to_numpy(np.float64)
        assert (np.isnan(a) == np.isnan(b)).all(), name
        known = ~np.isnan(b)
        scale = np.abs(b)
        if name.startswith(absolute):
            scale = np.ones_like(b)
        elif name.startswith(DIFFERENCE):
            scale = np.fmax(scale, np.abs(oracle[name.replace(DIFFERENCE, OF)].to_numpy(np.float64)))
        difference = np.abs(a - b)
        differs = known & (difference > 0)  # outside a sliding window both are 0
        with np.errstate(divide="ignore"):
            result[name] = float((difference[differs] / scale[differs]).max(initial=0.0))
    return result


def agree(
    found: pd.DataFrame,
    wanted: Sequence[Mapping[str, Any]],
    tolerance: float,
    absolute: tuple[str, ...] = ABSOLUTE,
) -> dict[str, float]:
    """Assert that every column is within ``tolerance`` of the oracle's; returns the disagreements."""
    measured = worst(found, wanted, absolute)
    too_far = {name: far for name, far in measured.items() if not far <= tolerance}
    assert not too_far, f"further from the oracle than {tolerance:g}: {too_far}"
    return measured

"""What an analysis says beside its table: its warnings as sentences, and that there is nothing to show."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import pandas as pd

from capa_probe.analysis.reading import strongest
from capa_probe.tables import LayerProfile

T = TypeVar("T")


def no_sinks(prof: LayerProfile, sinks: pd.DataFrame) -> str:
    """That a profile has no sinks, in a sentence with the largest sink strength that it has.

    Args:
        prof: a profile with its visual tokens.
        sinks: what ``classify_sinks(prof)`` returned, without a row.
    """
    threshold, offsets = sinks.attrs["tau"], sinks.attrs["offsets"]
    largest = strongest(prof, offsets)
    if largest is None:
        return f"No sinks at tau = {threshold:g}: the model has no layer from 2 on, where sinks count."
    but = ", offset dimensions left out," if any(offsets) else ""
    return (
        f"No sinks at tau = {threshold:g}; the largest sink strength of a visual token{but} is {largest[0]:.3g}, "
        f"in layer {largest[1]}."
    )


def remarking(remarks: list[str], analyse: Callable[[], T]) -> T:
    """Run an analysis; its warnings become remarks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = analyse()
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            remarks.append(str(warning.message))
        else:  # another package's, for developers
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result

"""Which samples show the same images, and which sinks are the same token of an image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.errors import CapaProbeError

#: A token's place in its image.
PLACE = ("image", "tile", "row", "col")


def check_groups(groups: Mapping[str, Hashable] | None) -> Mapping[str, Hashable]:
    """Sample id to key of its images, without samples that stand alone.

    Raises:
        CapaProbeError: it is no mapping to keys.
    """
    if groups is None:
        return {}
    if not (isinstance(groups, Mapping) and all(isinstance(key, Hashable) for key in groups.values())):
        raise CapaProbeError(
            f"groups={type(groups).__name__} was given; give a mapping of sample ids to keys of their images, such as "
            '{"a": "kitchen.jpg", "b": "kitchen.jpg"}.'
        )
    return {sample: key for sample, key in groups.items() if key is not None}


def distinct_tokens(sinks: pd.DataFrame, groups: Mapping[str, Hashable] | None) -> NDArray[np.int64]:
    """A number for each sink, the same for all that are one place of the same images, at any layer: (sink,)."""
    keys = check_groups(groups)
    shown: dict[tuple[bool, Hashable], int] = {}
    number = {
        sample: shown.setdefault((sample in keys, keys.get(sample, sample)), len(shown))
        for sample in sinks["sample"].unique()
    }
    places = sinks[list(PLACE)].assign(
        shown=sinks["sample"].map(number),
        # A token without a place in a grid is known by its position alone.
        nowhere=sinks["position"].where(sinks["row"] < 0, -1),
    )
    return np.asarray(places.groupby(list(places), sort=False).ngroup(), dtype=np.int64)

"""Shares of what all visual tokens of a sample and layer have, measured while the profile passes by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.analysis.reading import FIRST_LAYER


class Shares:
    """Share of the visual tokens' sum of one column that chosen tokens have, averaged over samples, by layer."""

    def __init__(self, column: str, n_layers: int) -> None:
        self.column = column
        self._groups = np.zeros(n_layers)  # samples with something to share; NaN where a value is missing
        self._groups[:FIRST_LAYER] = 1  # no sinks, by definition: a share of 0

    def of_each(self, part: pd.DataFrame, group: NDArray[np.int64]) -> NDArray[np.float64]:
        """Each token's share of the sum over its (sample, layer); ``part`` holds whole groups: (token,)."""
        values = part[self.column].to_numpy(np.float64)
        total = np.bincount(group, values)
        layer = np.zeros(len(total), dtype=np.int64)
        layer[group] = part["layer"].to_numpy()
        # Nothing on any visual token: there is no share of it.
        np.add.at(self._groups, layer, np.where(np.isnan(total), np.nan, total != 0))
        of_group = total[group]
        return np.divide(values, of_group, out=np.zeros(len(values)), where=of_group != 0)

    def means(self, layer: NDArray[np.int64], share: NDArray[np.float64]) -> list[float | None]:
        """Mean over samples of what tokens of these layers and shares have together: per layer, None if unknown."""
        taken = np.bincount(layer, share, minlength=len(self._groups))
        means = np.divide(
            taken, self._groups, out=np.full(len(self._groups), np.nan), where=self._groups != 0
        )
        # JSON, in which attributes are written, has no NaN.
        known: list[Any] = [None if np.isnan(mean) else float(mean) for mean in means]
        return known

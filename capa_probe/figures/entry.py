"""What a figure of the set is made of: which tables it is drawn from, how, and what it has to do with the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pandas as pd

from capa_probe.tables import LayerProfile

#: Tables by name.
Tables: TypeAlias = Mapping[str, pd.DataFrame]
#: Name of a model -> its tables.
ModelTables: TypeAlias = Mapping[str, Tables]
#: What a figure is made from.
Kind: TypeAlias = Literal["profile", "confirm", "depth", "training"]


@dataclass(frozen=True)
class Source:
    """What one run holds.

    Attributes:
        tables: by name: of a confirmation or of a depth, as they lie in ``tables/``; of a profile, what
            :class:`capa_probe.findings.Findings` holds, by its attributes' names, as far as it is there; of a model's
            folder, ``training`` and ``evaluation``.
        folder: where it lies; None for tables in memory.
        prof: the profile; None for other runs.
        settings: ``tau`` and ``eta`` of a profile's findings.
    """

    tables: Tables
    folder: Path | None = None
    prof: LayerProfile | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A figure of the set.

    Attributes:
        number: its place.
        name: of its files.
        kind: of the run that it is made from.
        tables: names of the tables that it goes by, as the run has them.
        claim: of the paper, or what else the figure is about.
        select: a run -> the small tables that hold all that is drawn or said; raises CapaProbeError with one sentence
            where the run cannot give them.
        draw: model -> those tables -> the figure.
        together: whether one figure shows all models; otherwise ``draw`` is given one at a time.
        fewest: models that it takes.
        pixels: whether it is made of pictures, which a vector file holds as pixels too: a set that is kept has it as a
            smaller PNG alone.
        shares: name of the figure whose selected tables it goes by, where it has none of its own.
    """

    number: int
    name: str
    kind: Kind
    tables: tuple[str, ...]
    claim: str
    select: Callable[[Source], dict[str, pd.DataFrame]]
    draw: Callable[[ModelTables], Any]
    together: bool
    fewest: int = 1
    pixels: bool = False
    shares: str = ""

    @property
    def data(self) -> str:
        """Name under which its selected tables are kept."""
        return self.shares or self.name

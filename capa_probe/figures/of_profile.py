"""The figures of the set that are made from profiles."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from capa_probe.errors import CapaProbeError
from capa_probe.figures.attention_contribution import attention_contribution_drawn
from capa_probe.figures.entry import Entry, ModelTables, Source
from capa_probe.figures.ffn_cosine import COLUMNS as COSINE_COLUMNS
from capa_probe.figures.ffn_cosine import ffn_cosine
from capa_probe.figures.reading import wanted
from capa_probe.figures.scatter_tables import COLUMNS, panel_layers, scatter_tables

#: Points of a scatter that are kept per layer and role.
_POINTS = 500


def attention_contribution_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`capa_probe.figures.attention_contribution` draws, thinned."""
    if source.prof is None or "sinks" not in source.tables:
        raise CapaProbeError(
            "sinks were not classified; give a profile with token rows and all default probes."
        )
    shown = panel_layers(range(int(source.prof.manifest["n_layers"])))
    where = [("step", "==", 0), ("kind", "==", "visual"), ("layer", "in", shown)]
    tokens = source.prof.select(list(COLUMNS), where)
    return scatter_tables(tokens, source.tables["sinks"], shown, _POINTS)


def ffn_cosine_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`capa_probe.figures.ffn_cosine` draws."""
    table = wanted(source.tables, "layers", COSINE_COLUMNS, "capa-probe profile")[list(COSINE_COLUMNS)]
    kept = table.reset_index(drop=True)
    kept.attrs = {"eta": float(source.settings["eta"])}
    return {"layers": kept}


def _attention_contribution(models: ModelTables) -> Figure:
    (tables,) = models.values()
    return attention_contribution_drawn(tables)


def _ffn_cosine(models: ModelTables) -> Figure:
    (tables,) = models.values()
    return ffn_cosine(tables["layers"], tables["layers"].attrs["eta"])


PROFILE_ENTRIES: tuple[Entry, ...] = (
    Entry(
        1, "attention_contribution", "profile", ("tokens", "sinks"),
        "Attention does not tell what a token contributes: Probability Dumps take attention and contribute little, "
        "Structural Anchors contribute much.",
        attention_contribution_tables, _attention_contribution, False,
    ),
    Entry(
        3, "ffn_cosine", "profile", ("redundant_layers",),
        "In some layers the FFN hardly turns visual tokens (cosine above 0.96), while it does turn text tokens.",
        ffn_cosine_tables, _ffn_cosine, False,
    ),
)  # fmt: skip

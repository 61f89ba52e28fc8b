"""The figures of the set that are made from profiles."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from capa_probe.errors import CapaProbeError
from capa_probe.figures.attention_contribution import attention_contribution_drawn
from capa_probe.figures.entry import Entry, ModelTables, Source
from capa_probe.figures.ffn_cosine import ffn_cosines, ffn_cosines_tables
from capa_probe.figures.norms import norms_compared, norms_tables
from capa_probe.figures.overlay_tables import overlays_tables
from capa_probe.figures.overlays import overlays_of_model
from capa_probe.figures.scatter_tables import COLUMNS, panel_layers, scatter_tables
from capa_probe.figures.sink_split import sink_split
from capa_probe.figures.split_tables import sink_split_tables
from capa_probe.figures.token_shares import token_shares, token_shares_tables

#: Points of the scatter that are kept per panel and role: what is shipped stays small.
_POINTS = 500


def attention_contribution_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`capa_probe.figures.attention_contribution` draws, from a profile with classified sinks.

    Raises:
        CapaProbeError: the run is no profile, its sinks could not be classified, or it kept no visual rows.
    """
    if source.prof is None or "sinks" not in source.tables:
        raise CapaProbeError(
            "This run holds no table of sinks; profile with attention, contribution and sink_strength among the "
            'probes and rows="visual" or "all".'
        )
    shown = panel_layers(range(int(source.prof.manifest["n_layers"])))
    where = [("step", "==", 0), ("kind", "==", "visual"), ("layer", "in", shown)]
    tokens = source.prof.select(list(COLUMNS), where)
    return scatter_tables(tokens, source.tables["sinks"], shown, _POINTS)


def _attention_contribution(models: ModelTables) -> Figure:
    (tables,) = models.values()
    return attention_contribution_drawn(tables)


PROFILE_ENTRIES: tuple[Entry, ...] = (
    Entry(
        1, "attention_contribution", "profile", ("tokens", "sinks"),
        "Attention overrates some visual tokens: Probability Dumps take attention and contribute little, Structural "
        "Anchors contribute much.",
        attention_contribution_tables, _attention_contribution, False,
    ),
    Entry(
        2, "sink_split", "profile", ("sinks", "bimodality"),
        "Sinks are of two kinds, told apart by their contribution.",
        sink_split_tables, sink_split, True,
    ),
    Entry(
        3, "ffn_cosine", "profile", ("layers",),
        "In some layers the FFN leaves the direction of visual tokens as it was (cosine above 0.96): it is redundant "
        "there.",
        ffn_cosines_tables, ffn_cosines, True,
    ),
    Entry(
        4, "norms", "profile", ("layers of the profile", "sinks"),
        "None of its own: how large value vectors and residual updates are, beside what they are added to.",
        norms_tables, norms_compared, True,
    ),
    Entry(
        5, "token_shares", "profile", ("layers of the profile", "sinks", "tokens"),
        "Visual tokens matter in stages: there is an early, a transition and a late layer at which to prune.",
        token_shares_tables, token_shares, True,
    ),
    Entry(
        6, "overlays", "profile", ("tokens", "sinks", "examples"),
        "Contribution lies on what a question is about, attention also on sinks in the background.",
        overlays_tables, overlays_of_model, False, pixels=True,
    ),
)  # fmt: skip

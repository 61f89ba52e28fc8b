"""The figures of the set that are made from runs of ``confirm`` and ``depth``, and from demo models' folders."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from capa_probe.figures.accuracy_budget import accuracy_budget, accuracy_budget_tables
from capa_probe.figures.accuracy_cost import accuracy_cost, accuracy_cost_tables
from capa_probe.figures.depth import depth
from capa_probe.figures.depth_compared import depth_compared
from capa_probe.figures.entry import Entry, ModelTables, Source
from capa_probe.figures.ffn_kinds import ffn_kinds, ffn_kinds_tables
from capa_probe.figures.over_steps import over_steps, over_steps_tables
from capa_probe.figures.reading import wanted
from capa_probe.figures.score_ranks import score_ranks, score_ranks_tables
from capa_probe.figures.sink_removal import sink_removal, sink_removal_tables
from capa_probe.figures.training import training, training_tables

#: Tables of a depth that are drawn; regions only where the data say what is asked about.
_DEPTH = ("depth", "depth_gone", "depth_kept", "depth_regions")
_UNUSED = r"^(agrees|kl|hellinger|n_kept|n_visual|flops|seconds)"


def depth_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`capa_probe.figures.depth.depth` draws, from a run of ``capa-probe depth``."""
    there = [name for name in _DEPTH if name in source.tables or name != "depth_regions"]
    found = {name: wanted(source.tables, name, ["task"], "capa-probe depth") for name in there}
    measure = str(found["depth"]["measure"].iloc[0]) if len(found["depth"]) else "correct"
    for name in there[1:]:
        table = found[name] if name == "depth_gone" else found[name][found[name]["task"] == "all"]
        drop = table.columns[table.columns.str.match(_UNUSED) & ~table.columns.str.startswith(measure)]
        found[name] = table.drop(columns=drop).reset_index(drop=True)
    return found


def _depth(models: ModelTables) -> Figure:
    (tables,) = models.values()
    return depth(tables)


BENCHMARK_ENTRIES: tuple[Entry, ...] = (
    Entry(
        7, "accuracy_budget", "confirm", ("budget",),
        "Most visual tokens can go if the right ones stay; chosen by attention contribution, a quarter of them keeps "
        "more of the accuracy than chosen by attention.",
        accuracy_budget_tables, accuracy_budget, True,
    ),
    Entry(
        8, "ffn_kinds", "confirm", ("ffn_redundancy", "ffn_redundancy_notes"),
        "For visual tokens of layers with an FFN cosine above 0.96, a Hadamard product stands for the FFN at no cost, "
        "where skipping it costs 5 to 10 % of the accuracy.",
        ffn_kinds_tables, ffn_kinds, True,
    ),
    Entry(
        9, "sink_removal", "confirm", ("dumps_anchors", "dumps_anchors_counts", "dumps_anchors_notes"),
        "Probability Dumps can be removed at no cost; removing Structural Anchors harms more than removing as many "
        "other tokens.",
        sink_removal_tables, sink_removal, True,
    ),
    Entry(
        10, "over_steps", "confirm", ("over_steps", "over_steps_maps"),
        "A large Hellinger distance in early generation steps is a sign that contribution was not computed against the "
        "current query.",
        over_steps_tables, over_steps, True,
    ),
    Entry(
        11, "accuracy_cost", "confirm", ("budget", "together", "together_time"),
        "CAPA saves 74 to 78 % of the FLOPs of visual tokens with a quarter of them kept, at next to no cost.",
        accuracy_cost_tables, accuracy_cost, True,
    ),
    Entry(
        12, "score_ranks", "confirm", ("knockout",),
        "Attention contribution tells better than attention what a visual token does.",
        score_ranks_tables, score_ranks, True,
    ),
    Entry(
        13, "training", "training", ("training", "evaluation"),
        "None: how the demo models learned what they are asked.",
        training_tables, training, True,
    ),
    Entry(
        14, "depth", "depth", _DEPTH,
        "Visual tokens are needed up to a third or half of the depth; behind it they can all go.",
        depth_tables, _depth, False,
    ),
    Entry(
        15, "depth_compared", "depth", _DEPTH,
        "The same, models side by side.",
        depth_tables, depth_compared, True, fewest=2, shares="depth",
    ),
)  # fmt: skip

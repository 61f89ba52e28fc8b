"""No column of a profile is left without an oracle: what the loops compute is what the tables promise, name by name."""

from __future__ import annotations

from capa_probe.probes import PROBES
from capa_probe.schema import (
    GROUP_COLUMNS,
    LAYER_SCHEMA,
    MEASURES,
    SAMPLE_SCHEMA,
    SINK_COLUMNS,
    STATISTICS,
    TOKEN_SCHEMA,
)
from tests.oracles import loops, models
from tests.oracles.prompts import Picture, write

#: Programs are written against these names, so they are spelled out here and not taken from the schema.
PLACES = ("sample", "step", "layer", "position", "kind", "image", "tile", "row", "col")
ATTENTION = ("attention", "attention_text", "contribution", "removal_effect", "value_norm")
RESIDUAL = (
    "resid_pre_norm",
    "resid_mid_norm",
    "attn_update_norm",
    "ffn_update_norm",
    "attn_cosine",
    "ffn_cosine",
)
SINKS = (
    *("sink_strength", "sink_dim", "sink_strength_2", "sink_dim_2"),
    *("sink_strength_3", "sink_dim_3", "sink_strength_4", "sink_dim_4"),
)
SUMMARIES = ("mean", "p05", "p50", "p95")


def test_the_tables_hold_the_columns_of_the_contract() -> None:
    assert set(PLACES + ATTENTION + RESIDUAL + SINKS) <= set(TOKEN_SCHEMA.names)
    summarised = (*ATTENTION, *RESIDUAL, *(name for name in SINKS if not name.startswith("sink_dim")))
    statistics = {f"{measure}_{statistic}" for measure in summarised for statistic in SUMMARIES}
    assert {"sample", "step", "layer", "kind", "n_tokens"} | statistics <= set(LAYER_SCHEMA.names)
    assert set(SAMPLE_SCHEMA.names) == {"sample", "task", "images", "n_images"}
    assert tuple(name for pair in SINK_COLUMNS for name in pair) == SINKS
    assert STATISTICS == SUMMARIES
    assert GROUP_COLUMNS == ("sample", "step", "layer", "kind")


def test_the_loops_compute_every_column_and_nothing_else() -> None:
    """Of both tables, at prefill and at a decode step; ``test_samples_table.py`` has the third table."""
    model = models.build("llava", "eager", num_hidden_layers=1)
    rows = loops.table(model, "llava", [write("llava", (2, Picture(), 2))], steps=1)
    for row in rows:
        assert list(row) == TOKEN_SCHEMA.names
    for line in loops.summary(rows, MEASURES):
        assert list(line) == LAYER_SCHEMA.names
    assert {row["step"] for row in rows} == {0, 1}


def test_every_probe_is_among_them_the_opt_in_ones_too() -> None:
    """``test_loops.py`` profiles with ``probes="all"``; that is every probe there is, and every measured column."""
    assert any(not probe.default for probe in PROBES.values())
    filled = [column for probe in PROBES.values() for column in probe.columns]
    assert len(filled) == len(set(filled))
    assert set(PLACES) | set(filled) == set(TOKEN_SCHEMA.names)

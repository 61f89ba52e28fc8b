"""Sink dimensions over resampled samples, beside published ones, and of the model as a whole."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capa_probe.analysis import measure_sink_dims, model_sink_dims, sink_dims
from capa_probe.errors import CapaProbeError
from tests.synthetic import TAU, Planted, World, profile, profile_of, tokens

SAMPLES = tuple("abcdefgh")
#: Dimension 7 in every sample at layers 2 and 3, 8 in one at layer 2, 9 on half of the tokens of one sample at layer 3.
SINKS = (
    *(Planted(sample, layer, 1, dim=7, phi=20.0 + layer) for sample in SAMPLES for layer in (2, 3)),
    Planted("c", 2, 5, dim=8),
    *(Planted("d", 3, position, dim=9) for position in range(4, 8)),
)
WORLD = World(samples=SAMPLES, n_layers=4, side=3, n_text=2, sinks=SINKS)


def naive_stability(
    n_tokens: dict[str, int], n_visual: dict[str, int], max_share: float, n_resamples: int
) -> float:
    rng = np.random.default_rng(5)
    names, found = list(n_visual), 0
    for _ in range(n_resamples):
        drawn = rng.choice(names, size=len(names))
        over = sum(n_tokens.get(name, 0) for name in drawn)
        found += 0 < over <= max_share * sum(n_visual[name] for name in drawn)
    return found / n_resamples


def row_of(table: pd.DataFrame, layer: int, dim: int) -> Any:
    (row,) = table[(table["layer"] == layer) & (table["dim"] == dim)].itertuples()
    return row


class TestResampling:
    def test_a_dimension_in_every_sample_is_always_found(self) -> None:
        table = measure_sink_dims(profile(WORLD), TAU)
        for layer in (2, 3):
            assert row_of(table, layer, 7).stability == 1
            assert row_of(table, layer, 7).n_samples == len(SAMPLES)

    def test_one_in_a_single_sample_as_often_as_that_is_drawn(self) -> None:
        row = row_of(measure_sink_dims(profile(WORLD), TAU), 2, 8)
        assert row.n_samples == 1
        # Standard error 0.011.
        assert row.stability == pytest.approx(1 - (1 - 1 / 8) ** 8, abs=0.04)

    def test_equal_a_loop_where_a_resample_makes_an_offset_of_it(self) -> None:
        """Sample d alone has the dimension, on 4 of its 9 tokens: drawn often enough, it is on too many."""
        for max_share in (0.06, 0.12, 0.25):
            row = row_of(measure_sink_dims(profile(WORLD), TAU, max_share), 3, 9)
            wanted = naive_stability({"d": 4}, dict.fromkeys(SAMPLES, 9), max_share, 4000)
            assert row.stability == pytest.approx(wanted, abs=0.05)
        assert row.n_samples == 1

    def test_samples_of_unequal_size_and_without_an_image(self) -> None:
        table = tokens(WORLD)
        few = (table["sample"] == "d") & (table["kind"] == "visual") & (table["position"] > 7)
        text_only = (table["sample"] == "h") & (table["kind"] == "visual")
        table = table[~few & ~text_only]
        found = measure_sink_dims(profile_of(table, WORLD), TAU, 0.2)
        assert found.attrs["n_samples"] == 7
        n_visual = {sample: 7 if sample == "d" else 9 for sample in SAMPLES[:7]}
        wanted = naive_stability({"d": 4}, n_visual, 0.2, 4000)
        assert row_of(found, 3, 9).stability == pytest.approx(wanted, abs=0.05)
        assert row_of(found, 3, 7).n_samples == 7
        assert row_of(found, 3, 7).stability == 1

    def test_an_offset_is_not_found_again(self) -> None:
        sinks = tuple(Planted(s, 2, p, dim=7) for s in SAMPLES for p in range(1, 10))
        (row,) = measure_sink_dims(profile(World(SAMPLES, 3, 3, sinks=sinks)), TAU).itertuples()
        assert row.offset
        assert row.stability == 0

    def test_the_same_seed_gives_the_same_table(self) -> None:
        prof = profile(WORLD)
        one, same, other = (measure_sink_dims(prof, TAU, seed=seed) for seed in (1, 1, 2))
        pd.testing.assert_frame_equal(one, same)
        assert not one["stability"].equals(other["stability"])
        names = [name for name in one if name != "stability"]
        pd.testing.assert_frame_equal(one[names], other[names])

    def test_the_size_of_the_blocks_does_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = measure_sink_dims(profile(WORLD), TAU)
        for at_once in (1, 8 * 7, 8 * 900):
            monkeypatch.setattr(sink_dims, "_COUNTS_AT_ONCE", at_once)
            found = measure_sink_dims(profile(WORLD), TAU)
            pd.testing.assert_frame_equal(found, whole)

    def test_a_single_sample_cannot_be_resampled(self) -> None:
        world = World(samples=("a",), n_layers=4, side=3, sinks=SINKS[:2])
        found = measure_sink_dims(profile(world), TAU)
        assert len(found) == 2
        assert found["stability"].isna().all()
        assert model_sink_dims(found)["stability"].isna().all()

    @pytest.mark.parametrize("seed", [-1, 0.5, None, True])
    def test_a_seed_that_is_none(self, seed: Any) -> None:
        with pytest.raises(CapaProbeError, match=r"seed=.* was given; give a whole number"):
            measure_sink_dims(profile(WORLD), TAU, seed=seed)

    @given(st.integers(0, 2**32 - 1))
    def test_what_is_in_more_samples_is_more_stable(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        chosen = {dim: set(rng.choice(SAMPLES, size=dim - 9, replace=False)) for dim in (10, 12, 14)}
        sinks = tuple(
            Planted(s, 2, dim - 9, dim=dim) for dim, samples in chosen.items() for s in sorted(samples)
        )
        found = measure_sink_dims(profile(World(SAMPLES, 3, 3, 1, sinks=sinks)), TAU)
        assert found["dim"].tolist() == [10, 12, 14]
        assert found["n_samples"].tolist() == [1, 3, 5]
        assert found["stability"].is_monotonic_increasing


class TestPublished:
    def test_found_ones_are_marked_and_others_named(self) -> None:
        table = measure_sink_dims(profile(WORLD, published_sink_dims=[900, 7, 8]), TAU)
        assert table["published"].tolist() == [dim in (7, 8) for dim in table["dim"]]
        assert table.attrs["published"] == [7, 8, 900]
        assert table.attrs["published_not_found"] == [900]
        assert table.attrs["published_not_measured"] == []
        assert table.attrs == json.loads(json.dumps(table.attrs))

    def test_none_are_published(self) -> None:
        table = measure_sink_dims(profile(WORLD), TAU)
        assert table["published"].isna().all()
        assert table.attrs["published"] is None
        assert table.attrs["published_not_found"] == []

    def test_what_a_profile_was_not_asked_for_is_not_missing(self) -> None:
        world = World(samples=("a", "b"), n_layers=3, sinks=())
        table = tokens(world)
        table[["sink_strength", "sink_dim"]] = [12.0, 7]
        table.loc[table["position"] != 3, "sink_strength"] = 2.0
        table[["sink_strength_2", "sink_dim_2"]] = [1.0, 8]
        for rank in (3, 4):
            table[f"sink_strength_{rank}"], table[f"sink_dim_{rank}"] = np.nan, -1
        prof = profile_of(table, world, sink_dims=[7, 8], published_sink_dims=[7, 8, 900])
        found = measure_sink_dims(prof, TAU)
        assert found["dim"].tolist() == [7]
        assert found.attrs["published_not_found"] == [8]
        assert found.attrs["published_not_measured"] == [900]
        whole = model_sink_dims(found).set_index("dim")
        assert whole.index.tolist() == [7, 8, 900]
        assert whole["stability"][8] == 0
        assert math.isnan(whole["stability"][900])


class TestOfTheModel:
    def test_over_layers(self) -> None:
        whole = model_sink_dims(measure_sink_dims(profile(WORLD, published_sink_dims=[7, 900]), TAU))
        assert whole["dim"].tolist() == [7, 9, 8, 900]
        assert whole["n_layers"].tolist() == [2, 1, 1, 0]
        assert whole["layers"].tolist() == ["2-3", "3", "2", "none"]
        assert whole["offset_layers"].tolist() == ["none"] * 4
        assert whole["n_tokens"].tolist() == [16, 4, 1, 0]
        assert whole["n_samples"].tolist() == [8, 1, 1, 0]
        np.testing.assert_array_equal(whole["largest"], [23.0, 25.0, 25.0, np.nan])
        assert whole["published"].tolist() == [True, False, False, True]
        assert whole["stability"][0] == 1
        assert whole["stability"][3] == 0

    def test_an_offset_somewhere_is_said(self) -> None:
        offset = tuple(Planted(s, 3, p, dim=8) for s in SAMPLES for p in range(4, 10))
        world = World(SAMPLES, 4, 3, sinks=(*SINKS[:17], *offset))
        whole = model_sink_dims(measure_sink_dims(profile(world), TAU)).set_index("dim")
        assert (whole["layers"][8], whole["offset_layers"][8]) == ("2", "3")
        assert whole["n_tokens"][8] == 1
        assert whole["published"].isna().all()
        # One that is an offset wherever it is large is none of the model's sink dimensions.
        only = model_sink_dims(measure_sink_dims(profile(World(SAMPLES, 4, 3, sinks=offset)), TAU))
        assert only.empty

    @pytest.mark.parametrize("published", [None, [7]])
    def test_without_any(self, published: list[int] | None) -> None:
        found = measure_sink_dims(profile(World(), published_sink_dims=published), TAU)
        some = measure_sink_dims(profile(WORLD), TAU)
        assert found.empty
        assert found.dtypes.equals(some.dtypes)
        whole = model_sink_dims(found)
        assert whole["dim"].tolist() == (published or [])
        assert whole.dtypes.equals(model_sink_dims(some).dtypes)

    def test_refuses_other_tables(self) -> None:
        with pytest.raises(CapaProbeError, match="give the table that measure_sink_dims returned"):
            model_sink_dims(pd.DataFrame({"dim": [1]}))

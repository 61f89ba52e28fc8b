"""The splits of sinks into dumps and anchors: Otsu's threshold against brute force, quantiles, and what is refused."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capa_probe.analysis import SPLITS, classify_sinks, otsu_threshold, sink_summary
from capa_probe.analysis.splits import Split
from capa_probe.errors import CapaProbeError
from tests.synthetic import TAU, Planted, World, profile, profile_of, tokens

CONTRIBUTIONS = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, 2.0, 4.0, 1e-6, 50.0]), st.floats(1e-8, 1e4)), max_size=12
)


def variance_between(values: list[float], threshold: float) -> float:
    """Between-class variance of log C for the classes below a threshold and from it on."""
    logs = [math.log(value) for value in values]
    low = [log for log, value in zip(logs, values, strict=True) if value < threshold]
    high = [log for log, value in zip(logs, values, strict=True) if value >= threshold]
    if not low or not high:
        return 0.0
    mean = sum(logs) / len(logs)
    return sum(len(each) / len(logs) * (sum(each) / len(each) - mean) ** 2 for each in (low, high))


class TestOtsu:
    @given(CONTRIBUTIONS)
    def test_no_other_cut_has_more_variance_between_the_classes(self, values: list[float]) -> None:
        threshold = otsu_threshold(values)
        positive = [value for value in values if value > 0]
        if len(set(values)) < 2:
            assert math.isnan(threshold)
        elif len(set(positive)) == 1:
            assert threshold == positive[0]
        else:
            best = max(variance_between(positive, cut) for cut in positive)
            assert threshold in positive
            assert threshold > min(positive)
            assert variance_between(positive, threshold) == pytest.approx(best, rel=1e-6, abs=1e-12)

    @given(CONTRIBUTIONS, st.sampled_from([1e-3, 0.5, 3.0, 1024.0]))
    def test_the_unit_of_contribution_does_not_matter(self, values: list[float], factor: float) -> None:
        scaled = otsu_threshold([value * factor for value in values])
        np.testing.assert_allclose(scaled, otsu_threshold(values) * factor, rtol=1e-12)

    @given(CONTRIBUTIONS, st.randoms())
    def test_neither_does_their_order(self, values: list[float], random: Any) -> None:
        shuffled = random.sample(values, len(values))
        np.testing.assert_equal(otsu_threshold(shuffled), otsu_threshold(values))

    def test_equal_cuts_take_the_lower(self) -> None:
        assert otsu_threshold([1, 2, 4]) == 2
        assert otsu_threshold([1, 3, 9, 27, 81]) in (9, 27)

    def test_zeros_do_not_move_the_cut(self) -> None:
        assert otsu_threshold([1, 1.1, 9, 10]) == 9
        assert otsu_threshold([0, 0, 0, 1, 1.1, 9, 10]) == 9
        assert otsu_threshold([0, 0, 5]) == 5
        assert math.isnan(otsu_threshold([0, 0]))
        assert math.isnan(otsu_threshold([]))


def world_with(contributions: dict[int, list[float]]) -> Any:
    """A profile whose sinks at each layer have these contributions, spread over two samples."""
    sinks, values = [], {}
    for layer, own in contributions.items():
        for number, value in enumerate(own):
            sample, position = "ab"[number % 2], 1 + number // 2
            sinks.append(Planted(sample, layer, position, dim=7 + number))
            values[sample, layer, position] = value
    world = World(samples=("a", "b"), n_layers=5, sinks=tuple(sinks))
    table = tokens(world)
    for (sample, layer, position), value in values.items():
        at = (table["sample"] == sample) & (table["layer"] == layer) & (table["position"] == position)
        table.loc[at, "contribution"] = value
    return profile_of(table, world)


def roles(found: pd.DataFrame, layer: int) -> list[tuple[float, str]]:
    own = found[found["layer"] == layer]
    return sorted(zip(own["contribution"].tolist(), own["role"], strict=True))


class TestSplitsOfAProfile:
    def test_otsu_is_taken_layer_by_layer_over_all_samples(self) -> None:
        prof = world_with({2: [1, 2, 100, 200], 3: [1000, 2000, 9, 1500, 8], 4: [0.0, 0.5, 0.5]})
        found = classify_sinks(prof, tau=TAU, split="otsu")
        assert roles(found, 2) == [(1, "dump"), (2, "dump"), (100, "anchor"), (200, "anchor")]
        assert [role for _, role in roles(found, 3)] == ["dump"] * 2 + ["anchor"] * 3
        assert [role for _, role in roles(found, 4)] == ["dump", "anchor", "anchor"]
        assert (found.attrs["split"], found.attrs["quantile"]) == ("otsu", None)

    @given(
        st.lists(st.sampled_from([0.0, 0.25, 1.0, 2.0, 8.0, 64.0]), min_size=1, max_size=8),
        st.sampled_from(["otsu", "quantile"]),
    )
    def test_equal_a_naive_twin(self, contributions: list[float], split: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = classify_sinks(world_with({2: contributions, 3: [1.0, 2.0]}), tau=TAU, split=split)
        positive = [value for value in contributions if value > 0]
        if split == "quantile":
            cut = float(np.median(contributions))
        elif len(set(contributions)) < 2:
            cut = math.nan
        elif len(set(positive)) == 1:
            cut = positive[0]
        else:
            variances = [(round(variance_between(positive, at), 9), -at) for at in sorted(set(positive))]
            cut = -max(variances)[1]
        wanted = [
            (value, "undetermined" if math.isnan(cut) else "anchor" if value >= cut else "dump")
            for value in sorted(contributions)
        ]
        assert roles(found, 2) == wanted

    def test_otsu_needs_two_values_and_names_the_layers_without(self) -> None:
        prof = world_with({2: [5.0], 3: [7.0, 7.0], 4: [1.0, 2.0]})
        message = (
            r"role of 3 of 5 sinks is undetermined: at layers 2-3, all sinks of the layer contribute alike "
            r"\(first: sample 'a', layer 2\)"
        )
        with pytest.warns(UserWarning, match=message) as caught:
            found = classify_sinks(prof, tau=TAU, split="otsu")
        assert [warning.filename for warning in caught] == [__file__]  # points at the caller
        assert sink_summary(found)["n_undetermined"].tolist() == [0, 0, 1, 2, 0]
        assert [role for _, role in roles(found, 4)] == ["dump", "anchor"]

    @pytest.mark.parametrize(
        ("quantile", "n_anchors"), [(None, 3), (0.5, 3), (0.25, 4), (0.75, 2), (0.99, 1), (0.01, 4)]
    )
    def test_quantiles(self, quantile: float | None, n_anchors: int) -> None:
        found = classify_sinks(world_with({2: [5, 1, 2, 4, 3]}), tau=TAU, split="quantile", quantile=quantile)
        assert [role for _, role in roles(found, 2)] == ["dump"] * (5 - n_anchors) + ["anchor"] * n_anchors
        assert found.attrs["quantile"] == (quantile or 0.5)

    def test_a_quantile_is_taken_layer_by_layer(self) -> None:
        found = classify_sinks(world_with({2: [1, 2], 3: [100, 200], 4: [7]}), tau=TAU, split="quantile")
        for layer, wanted in ((2, ["dump", "anchor"]), (3, ["dump", "anchor"]), (4, ["anchor"])):
            assert [role for _, role in roles(found, layer)] == wanted

    @pytest.mark.parametrize("split", SPLITS)
    def test_a_contribution_of_zero(self, split: str) -> None:
        found = classify_sinks(world_with({2: [0.0, 1e3, 2e3]}), tau=TAU, split=split)
        assert roles(found, 2)[0] == (0.0, "dump")
        assert roles(found, 2)[2] == (2e3, "anchor")

    @pytest.mark.parametrize("split", SPLITS)
    def test_without_sinks(self, split: str) -> None:
        found = classify_sinks(profile(World()), tau=TAU, split=split)
        assert found.empty
        assert found.dtypes.equals(classify_sinks(world_with({2: [1.0, 2.0]}), tau=TAU).dtypes)

    @pytest.mark.parametrize("split", SPLITS)
    def test_the_unit_of_contribution_does_not_matter(self, split: str) -> None:
        world = World(sinks=tuple(Planted("a", 2, p, dim=p, high=p > 3) for p in range(1, 8)))
        table = tokens(world)
        one = classify_sinks(profile_of(table, world), tau=TAU, split=split)
        table["contribution"] *= 1024
        other = classify_sinks(profile_of(table, world), tau=TAU, split=split)
        assert one["role"].tolist() == other["role"].tolist()
        assert set(one["role"]) == {"dump", "anchor"}


class TestArguments:
    @pytest.mark.parametrize("split", ["Otsu", "", "quantile:0.5"])
    def test_an_unknown_split_names_those_there_are(self, split: str) -> None:
        message = f"split={split!r} was given; available: 'non-sink-median', 'otsu', 'quantile'"
        with pytest.raises(CapaProbeError, match=message):
            classify_sinks(profile(World()), tau=TAU, split=split)

    @pytest.mark.parametrize("quantile", [0, 1, -0.1, 1.5, math.nan, "0.5", True])
    def test_a_quantile_that_is_none(self, quantile: Any) -> None:
        with pytest.raises(CapaProbeError, match=r"quantile=.* was given; give a number between 0 and 1"):
            classify_sinks(profile(World()), tau=TAU, split="quantile", quantile=quantile)

    @pytest.mark.parametrize("split", ["otsu", "non-sink-median"])
    def test_a_quantile_for_a_split_that_has_none(self, split: str) -> None:
        with pytest.raises(CapaProbeError, match=rf"""with split='{split}'.*; give split="quantile" too"""):
            classify_sinks(profile(World()), tau=TAU, split=split, quantile=0.5)

    def test_a_split_is_one_entry(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(
            SPLITS, "all-anchors", Split(lambda found, quantile: found["contribution"], "never")
        )
        found = classify_sinks(world_with({2: [1.0, 2.0]}), tau=TAU, split="all-anchors")
        assert set(found["role"]) == {"anchor"}
        assert found.attrs["split"] == "all-anchors"

"""Bimodality of log C: drawn distributions of known shape, invariances, and the table."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pandas as pd
import pytest
from diptest import diptest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from capa_probe.analysis import classify_sinks, otsu_threshold, sink_bimodality
from capa_probe.analysis.bimodality import ONE_GAUSSIAN, ashman_d, needed_d
from capa_probe.errors import CapaProbeError
from tests.synthetic import TAU, Planted, World, profile, profile_of, tokens


def mixture(distance: float, n: int, seed: int = 0, share: float = 0.5) -> NDArray[np.float64]:
    """Two Gaussians of standard deviation 1: their D is the distance of their means."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=n) + distance * (rng.random(n) < share)


def naive_ashman(values: list[float], steps: int = 500) -> float:
    """Expectation maximisation value by value."""
    n = len(values)
    centre = sum(values) / n
    scale = math.sqrt(sum((v - centre) ** 2 for v in values) / n)
    values = [(v - centre) / scale for v in values]
    cut = otsu_threshold([math.exp(v) for v in values])
    upper = [1.0 if math.exp(v) >= cut else 0.0 for v in values]
    means, variances = [0.0, 0.0], [1.0, 1.0]
    before = -math.inf
    for _ in range(steps):
        shares = [[1 - u for u in upper], upper]
        sizes = [sum(share) for share in shares]
        for k in range(2):
            means[k] = sum(s * v for s, v in zip(shares[k], values, strict=True)) / sizes[k]
            spread = sum(s * (v - means[k]) ** 2 for s, v in zip(shares[k], values, strict=True)) / sizes[k]
            variances[k] = max(spread, 1e-3)
        total, upper = 0.0, []
        for v in values:
            densities = [
                sizes[k]
                / n
                * math.exp(-((v - means[k]) ** 2) / (2 * variances[k]))
                / math.sqrt(2 * math.pi * variances[k])
                for k in range(2)
            ]
            total += math.log(sum(densities)) / n
            upper.append(densities[1] / sum(densities))
        if total - before < 1e-8:
            break
        before = total
    return math.sqrt(2) * abs(means[0] - means[1]) / math.sqrt(sum(variances))


class TestAshman:
    @pytest.mark.parametrize("distance", [3.0, 4.0, 6.0])
    def test_is_the_distance_of_two_gaussians(self, distance: float) -> None:
        assert ashman_d(mixture(distance, 4000)) == pytest.approx(distance, rel=0.06)
        assert ashman_d(mixture(distance, 4000, share=0.15)) == pytest.approx(distance, rel=0.06)

    def test_components_of_unequal_width(self) -> None:
        rng = np.random.default_rng(0)
        values = np.concatenate([rng.normal(0, 0.5, size=3000), rng.normal(6, 2, size=3000)])
        assert ashman_d(values) == pytest.approx(math.sqrt(2) * 6 / math.sqrt(0.25 + 4), rel=0.05)

    def test_one_gaussian_has_no_two_components(self) -> None:
        """Classes cut at a threshold would have D = 2.65 here."""
        assert ashman_d(mixture(0, 4000)) < 1.5

    @settings(max_examples=15)
    @given(st.floats(0, 5), st.integers(3, 40), st.integers(0, 1000))
    def test_equals_a_naive_twin(self, distance: float, n: int, seed: int) -> None:
        values = mixture(distance, n, seed)
        assert ashman_d(values) == pytest.approx(naive_ashman(values.tolist()), rel=1e-4)

    @settings(max_examples=20)
    @given(st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 40.0]), st.sampled_from([-30.0, 0.0, 7.0]))
    def test_unit_and_order_do_not_matter(self, seed: int, factor: float, offset: float) -> None:
        values = mixture(4, 60, seed)
        other = np.random.default_rng(seed).permutation(values) * factor + offset
        assert ashman_d(other) == pytest.approx(ashman_d(values), rel=1e-4)

    def test_two_values(self) -> None:
        assert ashman_d(np.array([1.0, 1.0, 5.0, 5.0])) > 10
        for values in ([], [2.0], [2.0, 2.0]):
            assert math.isnan(ashman_d(np.array(values)))

    def test_many_values_are_thinned_evenly(self) -> None:
        values = mixture(4, 100_000)
        assert ashman_d(values) == pytest.approx(4, rel=0.03)


@cache
def one_sink() -> pd.DataFrame:
    return classify_sinks(profile(World(sinks=(Planted("a", 2, 1, dim=7),))), tau=TAU)


def sinks_with(
    logs: NDArray[np.float64], others: NDArray[np.float64] | float = 1.0, layer: int = 2
) -> pd.DataFrame:
    """The sinks of a profile, replaced by as many as there are values of log C, all at one layer."""
    found = one_sink()
    table = found.iloc[np.zeros(len(logs), int)].reset_index(drop=True)
    table["layer"] = np.int32(layer)
    table["position"], table["col"] = (np.arange(len(logs), dtype=np.int32) for _ in range(2))
    table["contribution"] = np.exp(logs)
    table["others_contribution"] = others
    table.attrs = found.attrs | {"n_sinks": [len(logs) * (at == layer) for at in range(5)]}
    return table


class TestTable:
    @pytest.mark.parametrize(
        ("logs", "verdict"),
        [
            (mixture(6, 200), "bimodal"),
            (mixture(0, 2000), "unimodal"),
            (np.random.default_rng(0).uniform(size=500), "unclear"),  # flat: D is large, the dip is not
            (mixture(10, 200, share=0.03), "unclear"),  # a second mode too small for the dip
            (np.full(50, 2.0), "unimodal"),
            (np.repeat([-3.0, 3.0], 10), "bimodal"),
            (mixture(6, 19), "too few"),
        ],
    )
    def test_verdicts(self, logs: NDArray[np.float64], verdict: str) -> None:
        table = sink_bimodality(sinks_with(logs))
        assert table["layer"].tolist() == [2, 3, 4, -1]
        assert table["verdict"].tolist() == [verdict, "too few", "too few", verdict]
        row = table.iloc[0]
        assert row["n"] == len(logs)
        assert row["n_left_out"] == 0
        if verdict == "too few":
            assert table[["dip", "dip_p", "ashman_d", "ashman_d_needed"]].isna().all(axis=None)
        else:
            dip, p = diptest(logs)
            assert (row["dip"], row["dip_p"]) == pytest.approx((dip, p))

    @pytest.mark.parametrize("seed", range(3))
    def test_a_unimodal_distribution_is_seldom_called_bimodal(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for n in (20, 60, 300):
            wrong = sum(
                sink_bimodality(sinks_with(rng.normal(size=n)))["verdict"].iloc[0] == "bimodal"
                for _ in range(10)
            )
            assert wrong <= 1

    def test_layers_are_compared_with_their_own_others(self) -> None:
        """One mode in each of two layers of different scale: log C of both together has two, relative to others one."""
        logs = mixture(0, 400)
        low, high = sinks_with(logs, others=1.0), sinks_with(logs + 12, others=np.exp(12.0), layer=3)
        high["col"] += 400  # other tokens
        both = pd.concat([low, high], ignore_index=True)
        both.attrs = low.attrs | {"n_sinks": [0, 0, 400, 400, 0]}
        assert diptest(np.log(both["contribution"].to_numpy()))[1] < 0.001
        table = sink_bimodality(both).set_index("layer")
        assert table["n"].tolist() == [400, 400, 0, 800]
        assert table["dip_p"][-1] > 0.5
        assert table["verdict"][-1] != "bimodal"

    def test_contributions_without_a_logarithm_are_left_out(self) -> None:
        table = sinks_with(mixture(6, 100), others=np.r_[np.nan, 0.0, np.ones(98)])
        table.loc[5:9, "contribution"] = 0.0
        found = sink_bimodality(table).set_index("layer")
        assert found["n"].tolist() == [95, 0, 0, 93]
        assert found["n_left_out"].tolist() == [5, 0, 0, 7]
        assert found["verdict"][2] == "bimodal"

    @given(st.sampled_from([2.0**-20, 0.1, 1e6]))
    def test_the_unit_of_contribution_does_not_matter(self, factor: float) -> None:
        logs = mixture(3, 100)
        one, other = (sink_bimodality(sinks_with(logs + shift)) for shift in (0.0, math.log(factor)))
        pd.testing.assert_frame_equal(one, other, rtol=1e-3)

    def test_more_values_than_the_table_of_the_dip_test(self) -> None:
        found = sink_bimodality(sinks_with(mixture(6, 80_000))).set_index("layer")
        assert found["verdict"][2] == "bimodal"

    def test_planted_sinks(self) -> None:
        sinks = tuple(
            Planted(sample, 3, position, dim=7, high=position > 4)
            for sample in "abc"
            for position in range(1, 9)
        )
        world = World(sinks=sinks, side=6)
        found = sink_bimodality(classify_sinks(profile(world), tau=TAU)).set_index("layer")
        assert found["n"].tolist() == [0, 24, 0, 24]
        assert found["verdict"].tolist() == ["too few", "bimodal", "too few", "bimodal"]
        assert found["ashman_d"][3] > 10
        # A shuffled control: contributions drawn from one Gaussian of log C.
        table = tokens(world)
        table["contribution"] = np.random.default_rng(1).lognormal(size=len(table))
        found = sink_bimodality(classify_sinks(profile_of(table, world), tau=TAU)).set_index("layer")
        assert found["verdict"][3] in ("unimodal", "unclear")

    def test_repeats_of_a_token_count_once(self) -> None:
        """One mode of 40 tokens, each a sink in 26 layers: every repeat taken for itself has modes of its own."""
        rng = np.random.default_rng(0)
        effect, n_layers = np.sort(rng.normal(size=40)), 28
        parts = [sinks_with(effect + rng.normal(size=40) * 0.05, layer=at) for at in range(2, n_layers)]
        table = pd.concat(parts, ignore_index=True)
        counts = [0, 0] + [40] * 26
        nothing = [None] * n_layers
        table.attrs = parts[0].attrs | {
            "n_visual": [99] * n_layers,
            "n_sinks": counts,
            "attention_share": nothing,
        }
        assert diptest(np.log(table["contribution"].to_numpy()))[1] < 0.01
        whole = sink_bimodality(table).iloc[-1]
        assert (whole["n"], whole["n_tokens"]) == (40 * 26, 40)
        middle = [np.median([np.log(part["contribution"][i]) for part in parts]) for i in range(40)]
        assert whole["dip_p"] == pytest.approx(diptest(np.array(middle))[1])
        assert whole["verdict"] != "bimodal"

    def test_questions_about_one_image_count_once(self) -> None:
        one = sinks_with(mixture(6, 12))
        samples = list("abcde")
        table = pd.concat([one.assign(sample=s) for s in samples], ignore_index=True)
        table["sample"] = table["sample"].astype(one["sample"].dtype)
        table["position"] += 3 * table["sample"].map(samples.index)  # the question may come first
        table.attrs = one.attrs | {"n_sinks": [0, 0, 60, 0, 0]}
        for groups, n, verdict in ((None, 60, "bimodal"), (dict.fromkeys(samples, "cat"), 12, "too few")):
            found = sink_bimodality(table, groups)
            assert found["n"].tolist() == [60, 0, 0, 60]
            assert found["n_tokens"].tolist() == [n, 0, 0, n]
            assert found["verdict"].iloc[-1] == verdict
        with pytest.raises(CapaProbeError, match="give a mapping of sample ids"):
            sink_bimodality(table, ["a"])  # type: ignore[arg-type]

    @pytest.mark.parametrize("n", [20, 50, 100])
    def test_one_gaussian_seldom_has_the_d_that_is_needed(self, n: int) -> None:
        rng = np.random.default_rng(1)
        found = np.array([ashman_d(rng.normal(size=n)) for _ in range(100)])
        assert (found > needed_d(n)).mean() <= 0.1
        assert (found > 2).mean() > 0.3
        assert needed_d(n) == ONE_GAUSSIAN[n]
        assert (needed_d(10**6), needed_d(800)) == (2, 2)

    def test_without_sinks(self) -> None:
        found, some = (
            sink_bimodality(classify_sinks(profile(World(sinks=sinks)), tau=TAU))
            for sinks in ((), (Planted("a", 2, 1, dim=7),))
        )
        assert found["verdict"].tolist() == ["too few"] * 4
        assert found.dtypes.equals(some.dtypes)
        short = sink_bimodality(classify_sinks(profile(World(n_layers=2)), tau=TAU))
        assert short["layer"].tolist() == [-1]

    def test_refuses_a_part_of_the_table(self) -> None:
        part = sinks_with(np.zeros(2))[:1]
        with pytest.raises(CapaProbeError, match="sink_bimodality was given 1 of 2 sinks"):
            sink_bimodality(part)

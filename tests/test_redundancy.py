"""FFN redundancy against loops over the tokens, its bootstrap intervals, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capa_probe.analysis import layer_ranges, redundancy, redundant_layers, spread
from capa_probe.errors import CapaProbeError
from capa_probe.schema import LAYER_SCHEMA
from capa_probe.tables import LayerProfile
from capa_probe.writing import ProfileWriter
from tests.synthetic import World, facts, profile, profile_of, tokens

COSINES = {
    0: (0.5, 0.8),
    1: (0.98, 0.9),  # visual only
    2: (0.98, 0.98),  # both
    3: (0.9, 0.98),  # text only
    4: (0.97, 0.5),
}
WORLD = World(cosines=COSINES, steps=1)
COLUMNS = (
    "layer visual_cosine visual_low visual_high visual_p05 visual_p50 visual_p95 visual_share_above "
    "text_cosine text_low text_high text_p05 text_p50 text_p95 text_share_above "
    "n_samples n_visual n_text redundant visual_only"
)


def naive_redundancy(table: pd.DataFrame, eta: float) -> list[dict[str, Any]]:
    """Token by token."""
    rows = []
    for layer in sorted(set(table["layer"])):
        values: dict[str, list[float]] = {"visual": [], "text": []}
        samples = set()
        for token in table.itertuples():
            if token.step == 0 and token.layer == layer:
                values[token.kind].append(token.ffn_cosine)
                samples.add(token.sample)
        visual, text = (sum(v) / len(v) if v else math.nan for v in (values["visual"], values["text"]))
        rows.append(
            {
                "layer": layer,
                "visual_cosine": visual,
                "text_cosine": text,
                **{
                    f"{kind}_p{q:02}": naive_quantile(own, q / 100)
                    for kind, own in values.items()
                    for q in (5, 50, 95)
                },
                **{f"{kind}_share_above": naive_share(values[kind], eta) for kind in values},
                "n_samples": len(samples),
                "n_visual": len(values["visual"]),
                "n_text": len(values["text"]),
                "redundant": visual > eta,
                "visual_only": visual > eta >= text,
            }
        )
    return rows


def naive_share(values: list[float], eta: float) -> float:
    return sum(value > eta for value in values) / len(values) if values else math.nan


def naive_quantile(values: list[float], q: float) -> float:
    if not values:
        return math.nan
    ordered, place = sorted(values), q * (len(values) - 1)
    below = ordered[math.floor(place)]
    return below + (ordered[math.ceil(place)] - below) * (place - math.floor(place))


def assert_equals_the_twin(found: pd.DataFrame, table: pd.DataFrame, eta: float, rows: str = "all") -> None:
    assert list(found.columns) == COLUMNS.split()
    wanted = pd.DataFrame(naive_redundancy(table, eta))
    if rows != "all":
        wanted[["text_p05", "text_p50", "text_p95", "text_share_above"]] = np.nan
    if rows == "none":
        wanted[["visual_p05", "visual_p50", "visual_p95", "visual_share_above"]] = np.nan
    for name in wanted.columns:
        if wanted[name].dtype.kind == "f":
            np.testing.assert_allclose(
                found[name], wanted[name], rtol=1e-6, atol=1e-7
            )  # the layers table is float32
        else:
            assert found[name].tolist() == wanted[name].tolist(), name


def of_unequal_samples(sizes: tuple[int, ...], cosines: tuple[float, ...]) -> LayerProfile:
    """One layer; sample i has ``sizes[i]`` visual tokens and one text token, all of cosine ``cosines[i]``."""
    rows = []
    for number, (size, cosine) in enumerate(zip(sizes, cosines, strict=True)):
        for kind, n in (("visual", size), ("text", 1)):
            row = dict.fromkeys(LAYER_SCHEMA.names, np.nan)
            row |= {"sample": str(number), "step": 0, "layer": 0, "kind": kind, "n_tokens": n}
            rows.append(row | {"ffn_cosine_mean": cosine})
    table = pd.DataFrame(rows)[LAYER_SCHEMA.names]
    layers = pa.Table.from_pandas(table, schema=LAYER_SCHEMA, preserve_index=False)
    return LayerProfile(facts(World(n_layers=1)) | {"rows": "none", "n_parts": 0}, [], layers)


class TestMeans:
    @pytest.mark.parametrize("rows", ["all", "visual", "none"])
    def test_equal_loops_over_tokens(self, rows: str) -> None:
        found = redundant_layers(profile(WORLD, rows))
        assert_equals_the_twin(found, tokens(WORLD), 0.96, rows)
        assert found["redundant"].tolist() == [False, True, True, False, True]
        assert found["visual_only"].tolist() == [False, True, False, False, True]
        assert layer_ranges(found["layer"][found["redundant"]]) == "1-2 & 4"

    def test_count_tokens_and_not_samples(self) -> None:
        (row,) = redundant_layers(of_unequal_samples((1, 9), (0.0, 1.0))).itertuples()
        assert row.visual_cosine == 0.9
        assert row.text_cosine == 0.5
        assert (row.n_samples, row.n_visual, row.n_text) == (2, 10, 2)

    def test_samples_without_an_image_count_as_text_only(self) -> None:
        table = tokens(WORLD)
        table = table[(table["sample"] != "b") | (table["kind"] == "text")]
        found = redundant_layers(profile_of(table, WORLD))
        assert_equals_the_twin(found, table, 0.96)
        assert found["n_samples"].tolist() == [3] * 5
        assert found["n_visual"].tolist() == [32] * 5

    def test_dtypes(self) -> None:
        found = redundant_layers(profile(WORLD))
        kinds = {name: found[name].dtype.kind for name in found}
        assert {name for name, kind in kinds.items() if kind == "b"} == {"redundant", "visual_only"}
        assert {name for name, kind in kinds.items() if kind == "i"} == {
            "layer",
            "n_samples",
            "n_visual",
            "n_text",
        }

    def test_a_profile_without_text(self) -> None:
        table = tokens(WORLD)
        found = redundant_layers(profile_of(table[table["kind"] == "visual"], WORLD))
        assert found["text_cosine"].isna().all()
        assert found["text_low"].isna().all()
        assert found["n_text"].tolist() == [0] * 5
        assert not found["visual_only"].any()
        assert found["redundant"].any()


@st.composite
def samples_of_any_size(draw: st.DrawFn) -> pd.DataFrame:
    """A few samples with any number of visual and text tokens each, at least one of them visual."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_samples = draw(st.integers(1, 4))
    world = World(samples=tuple("abcd"[:n_samples]), n_layers=2, side=2, n_text=3, steps=1)
    table = tokens(world)
    kept = (rng.random(8 * 10) < draw(st.floats(0.1, 1.0)))[
        table["position"] + 10 * (table["sample"].map(ord) - 97)
    ]
    table = table[kept | (table["position"] == 1)].copy()
    table["ffn_cosine"] = rng.choice([-1.0, 0.0, 0.5, 0.96, 1.0], size=len(table)).astype(np.float32)
    return table


@settings(max_examples=30)
@given(samples_of_any_size(), st.sampled_from([-0.5, 0.0, 0.5, 0.96]))
def test_means_equal_loops_on_anything(table: pd.DataFrame, eta: float) -> None:
    world = World(samples=tuple(table["sample"].unique()), n_layers=2)
    found = redundant_layers(profile_of(table, world), eta=eta)
    # A mean of float32 group means may lie beside eta where the loop's lies on it: compare away from it.
    wanted = naive_redundancy(table, eta)
    close = any(abs(row[f"{kind}_cosine"] - eta) < 1e-6 for row in wanted for kind in ("visual", "text"))
    if not close:
        assert_equals_the_twin(found, table, eta)
    for kind in ("visual", "text"):
        low, high, mean = (found[f"{kind}_{name}"] for name in ("low", "high", "cosine"))
        known = low.notna()
        assert known.tolist() == high.notna().tolist()
        has_kind = table[(table["step"] == 0) & (table["kind"] == kind)].groupby("layer")["sample"].nunique()
        assert (known == (found["layer"].map(has_kind).fillna(0) >= 2)).all()
        assert (low[known] <= high[known]).all()
        assert mean[found[f"n_{kind}"] > 0].between(-1, 1).all()


class TestSpread:
    def test_shares_and_quantiles_of_single_tokens(self) -> None:
        """A mean above eta of which half the tokens are below, and one below eta of which most are above."""
        world = World(samples=("a", "b"), n_layers=2, side=4)
        table = tokens(world)
        visual = table["kind"] == "visual"
        odd = table["position"] % 2 == 1
        table["ffn_cosine"] = 0.0
        table.loc[visual & (table["layer"] == 0), "ffn_cosine"] = np.where(odd, 0.999, 0.95)[
            visual & (table["layer"] == 0)
        ]
        table.loc[visual & (table["layer"] == 1), "ffn_cosine"] = 0.99
        table.loc[visual & (table["layer"] == 1) & (table["position"] == 1), "ffn_cosine"] = 0.0
        found = redundant_layers(profile_of(table, world))
        assert found["redundant"].tolist() == [True, False]
        assert found["visual_share_above"].tolist() == [0.5, 15 / 16]
        assert found["text_share_above"].tolist() == [0.0, 0.0]
        np.testing.assert_allclose(found["visual_p50"], [(0.999 + 0.95) / 2, 0.99], rtol=1e-6)
        np.testing.assert_allclose(found["visual_p05"], [0.95, naive_quantile([0.0] * 2 + [0.99] * 30, 0.05)])

    def test_a_token_at_eta_is_not_above_it(self) -> None:
        table = tokens(WORLD).assign(ffn_cosine=0.5)  # exact in float32
        found = redundant_layers(profile_of(table, WORLD), eta=0.5)
        assert found["visual_share_above"].tolist() == [0.0] * 5
        found = redundant_layers(profile_of(table, WORLD), eta=0.49)
        assert found[["visual_share_above", "text_share_above"]].eq(1).all(axis=None)

    @pytest.mark.parametrize("at_once", [1, 48, 100, 10**6])
    def test_the_size_of_the_blocks_does_not_matter(
        self, monkeypatch: pytest.MonkeyPatch, at_once: int
    ) -> None:
        whole = redundant_layers(profile(WORLD))
        monkeypatch.setattr(spread, "_VALUES_AT_ONCE", at_once)
        pd.testing.assert_frame_equal(redundant_layers(profile(WORLD)), whole)

    def test_is_read_from_disk_as_from_memory(self, tmp_path: Path) -> None:
        table = tokens(WORLD)
        profile_of(table, WORLD, tmp_path / "run", "visual")
        found = redundant_layers(LayerProfile.load(tmp_path / "run"))
        assert_equals_the_twin(found, table, 0.96, "visual")


class TestEta:
    def test_at_eta_a_layer_is_not_redundant(self) -> None:
        prof = of_unequal_samples((2, 2), (0.5, 0.5))  # exact in float32
        assert redundant_layers(prof, eta=0.5)["redundant"].tolist() == [False]
        below = redundant_layers(prof, eta=np.nextafter(0.5, 0))
        assert below["redundant"].tolist() == [True]
        assert below["visual_only"].tolist() == [False]  # text is above it as well

    def test_text_at_eta_leaves_a_layer_visual_only(self) -> None:
        rows = of_unequal_samples((1, 1), (0.5, 0.5)).layers.copy()
        rows.loc[rows["kind"] == "visual", "ffn_cosine_mean"] = 0.75
        prof = of_unequal_samples((1, 1), (0.5, 0.5))
        prof.__dict__["layers"] = rows
        assert redundant_layers(prof, eta=0.5)["visual_only"].tolist() == [True]
        assert redundant_layers(prof, eta=0.49)["visual_only"].tolist() == [False]

    @settings(max_examples=20)
    @given(st.floats(-0.99, 0.99), st.floats(-0.99, 0.99))
    def test_a_higher_eta_never_finds_more(self, one: float, other: float) -> None:
        prof = profile(
            World(samples=("a",), n_layers=3, side=1, n_text=1, cosines={0: (0.5, 0), 1: (-0.5, 0)})
        )
        low, high = (redundant_layers(prof, eta=eta)["redundant"] for eta in sorted((one, other)))
        assert (low | ~high).all()

    @pytest.mark.parametrize("eta", [1, 1.0, -1, 1.5, math.nan, math.inf, "0.96", None, True])
    def test_out_of_range(self, eta: Any) -> None:
        with pytest.raises(
            CapaProbeError, match=r"eta=.* was given; give a number between -1 and 1, such as 0.96"
        ):
            redundant_layers(profile(WORLD), eta=eta)


class TestIntervals:
    def test_equal_a_loop_of_resamples(self) -> None:
        sizes, cosines = (3, 10, 1, 6), (0.9, 0.95, 0.2, 0.99)
        (row,) = redundant_layers(of_unequal_samples(sizes, cosines), confidence=0.9).itertuples()
        rng = np.random.default_rng(99)
        means = []
        for _ in range(20_000):
            drawn = rng.integers(0, 4, size=4)
            means.append(sum(sizes[i] * cosines[i] for i in drawn) / sum(sizes[i] for i in drawn))
        low, high = np.quantile(means, [0.05, 0.95])
        # Two bootstraps of one small sample: they differ by the noise of the tails.
        assert row.visual_low == pytest.approx(low, abs=0.03)
        assert row.visual_high == pytest.approx(high, abs=0.005)

    def test_the_same_seed_gives_the_same_table(self) -> None:
        prof = of_unequal_samples(tuple(range(1, 13)), tuple(np.linspace(0.8, 0.99, 12)))
        one, same, other = (redundant_layers(prof, seed=seed) for seed in (3, 3, 4))
        pd.testing.assert_frame_equal(one, same)
        assert one["visual_cosine"].equals(other["visual_cosine"])
        assert not one["visual_low"].equals(other["visual_low"])

    def test_the_size_of_the_blocks_does_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        prof = profile(WORLD)
        whole = redundant_layers(prof)
        monkeypatch.setattr(redundancy, "_COUNTS_AT_ONCE", 7)
        pd.testing.assert_frame_equal(redundant_layers(prof), whole, rtol=1e-12)

    def test_text_does_not_move_the_visual_interval(self) -> None:
        table = tokens(WORLD)
        without = redundant_layers(profile_of(table[table["kind"] == "visual"], WORLD))
        with_text = redundant_layers(profile(WORLD))
        assert with_text[["visual_low", "visual_high"]].equals(without[["visual_low", "visual_high"]])

    def test_more_confidence_is_wider_and_more_samples_are_narrower(self) -> None:
        def width(n: int, confidence: float) -> float:
            rng = np.random.default_rng(0)
            prof = of_unequal_samples((5,) * n, tuple(rng.uniform(0.9, 1.0, size=n)))
            (row,) = redundant_layers(prof, confidence=confidence).itertuples()
            return float(row.visual_high - row.visual_low)

        assert width(30, 0.5) < width(30, 0.95) < width(30, 0.999)
        assert width(400, 0.95) < width(30, 0.95) / 2

    def test_cover_the_truth_about_as_often_as_they_say(self) -> None:
        """Samples of unequal size whose size and cosine are independent: the truth is the mean cosine, 0.9."""
        rng = np.random.default_rng(0)
        inside = 0
        for seed in range(150):
            sizes = tuple(int(size) for size in rng.integers(5, 15, size=40))
            cosines = tuple(rng.normal(0.9, 0.02, size=40))
            (row,) = redundant_layers(
                of_unequal_samples(sizes, cosines), confidence=0.9, seed=seed
            ).itertuples()
            inside += row.visual_low <= 0.9 <= row.visual_high
        # Standard error 2.5 %; percentile intervals of 40 samples are a little short.
        assert 0.80 <= inside / 150 <= 0.97

    def test_one_sample_has_no_interval(self) -> None:
        found = redundant_layers(profile(World(samples=("a",), cosines=COSINES)))
        assert found[["visual_low", "visual_high", "text_low", "text_high"]].isna().all(axis=None)
        assert found["redundant"].tolist() == [False, True, True, False, True]
        # One sample with an image among three: an interval for text alone.
        table = tokens(WORLD)
        found = redundant_layers(
            profile_of(table[(table["sample"] == "a") | (table["kind"] == "text")], WORLD)
        )
        assert found["visual_low"].isna().all()
        assert found["text_low"].notna().all()

    @pytest.mark.parametrize("confidence", [0, 1, -0.5, 95, math.nan, "0.95", None])
    def test_confidence_out_of_range(self, confidence: Any) -> None:
        with pytest.raises(CapaProbeError, match=r"confidence=.* was given; give a number between 0 and 1"):
            redundant_layers(profile(WORLD), confidence=confidence)

    @pytest.mark.parametrize("seed", [-1, 0.5, "0", None, True])
    def test_a_seed_that_is_none(self, seed: Any) -> None:
        with pytest.raises(CapaProbeError, match=r"seed=.* was given; give a whole number of at least 0"):
            redundant_layers(profile(WORLD), seed=seed)


class TestProfilesThatWillNotDo:
    def test_without_visual_tokens(self) -> None:
        table = tokens(WORLD)
        with pytest.raises(
            CapaProbeError, match=r"without a visual token; profile samples that have an image"
        ):
            redundant_layers(profile_of(table[table["kind"] == "text"], WORLD))

    @pytest.mark.parametrize("kind", ["visual", "text"])
    def test_without_the_cosine(self, kind: str) -> None:
        table = tokens(WORLD)
        where = (table["kind"] == kind) & (table["sample"] == "b") & (table["layer"] == 3)
        table.loc[where, "ffn_cosine"] = np.nan
        message = rf"""ffn_cosine is missing \(NaN\) for the {kind} tokens of sample 'b' at layer 3; .*"ffn_cosine\""""
        with pytest.raises(CapaProbeError, match=message):
            redundant_layers(profile_of(table, WORLD))

    def test_an_empty_profile(self) -> None:
        with pytest.raises(CapaProbeError, match="without a visual token"):
            redundant_layers(ProfileWriter().finish(facts(WORLD)))


class TestLayerRanges:
    @pytest.mark.parametrize(
        ("layers", "text"),
        [
            ([2, 3, 4, 7], "2-4 & 7"),
            ([], "none"),
            ([0], "0"),
            ([5, 4], "4-5"),
            ([3, 3, 1], "1 & 3"),
            ((*range(2, 6), *range(22, 30)), "2-5 & 22-29"),
            (np.array([9, 10, 12]), "9-10 & 12"),
        ],
    )
    def test_examples(self, layers: Any, text: str) -> None:
        assert layer_ranges(layers) == text

    @given(st.sets(st.integers(0, 60)))
    def test_can_be_read_back(self, layers: set[int]) -> None:
        text = layer_ranges(layers)
        read: set[int] = set()
        for run in () if text == "none" else text.split(" & "):
            ends = [int(end) for end in run.split("-")]
            assert not read or ends[0] > max(read) + 1  # in order, and no two runs that touch
            read |= set(range(ends[0], ends[-1] + 1))
        assert read == layers

"""Sinks against a naive twin, on made-up profiles with planted sinks and on a model with one planted in its stream."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import capa_probe as cp
from capa_probe.analysis import classify_sinks, measure_sink_dims, sink_summary, sink_totals, sinks
from capa_probe.errors import CapaProbeError
from capa_probe.schema import SINK_COLUMNS
from capa_probe.tables import LayerProfile
from tests import tiny
from tests.synthetic import TAU, Planted, World, profile, profile_of, tokens

PLANTED = (
    Planted("a", 2, 1, dim=7),
    Planted("a", 3, 2, dim=7, high=True),
    Planted("a", 3, 9, dim=8, phi=12.5),
    Planted("b", 3, 4, dim=7, phi=10.5),
    Planted("c", 4, 16, dim=9, high=True),
)
NOT_SINKS = (
    Planted("a", 0, 1, dim=7),  # before layer 2
    Planted("b", 1, 1, dim=7),
    Planted("b", 2, 0, dim=7),  # BOS and text
    Planted("b", 2, 18, dim=7),
    Planted("c", 3, 5, dim=7, phi=10.0),  # at tau, not above it
)
WORLD = World(sinks=PLANTED + NOT_SINKS)
STRENGTHS, DIMS = ([pair[i] for pair in SINK_COLUMNS] for i in range(2))


def naive_sinks(
    table: pd.DataFrame, tau: float, dims: Sequence[int] | None = None, max_share: float = 0.25
) -> list[tuple[Any, ...]] | str:
    """(sample, layer, position, strength, dim, role) token by token; "unknown" where a token cannot be told."""
    table = table[(table["step"] == 0) & (table["kind"] == "visual") & (table["layer"] >= 2)]
    found: dict[int, tuple[float, int]] = {}
    for layer in table["layer"].unique():
        here = table[table["layer"] == layer]
        over: dict[int, int] = {}
        for _, row in here.iterrows():
            for strength, dim in SINK_COLUMNS:
                if row[strength] > tau:
                    over[row[dim]] = over.get(row[dim], 0) + 1
        offsets = {dim for dim, n in over.items() if n / len(here) > max_share}
        for at, row in here.iterrows():
            pairs = [(float(row[strength]), int(row[dim])) for strength, dim in SINK_COLUMNS]
            usable = [
                (s, d) for s, d in pairs if (d not in offsets if dims is None else d in dims) and s > tau
            ]
            if usable:
                found[at] = max(usable, key=lambda pair: pair[0])
            elif pairs[-1][0] > tau:
                return "unknown"
    rows = []
    for at, (strength, dim) in found.items():
        sink = table.loc[at]
        same = table[(table["sample"] == sink["sample"]) & (table["layer"] == sink["layer"])]
        others = sorted(float(row["contribution"]) for i, row in same.iterrows() if i not in found)
        if not others:
            role = "undetermined"
        else:
            n = len(others)
            median = (others[(n - 1) // 2] + others[n // 2]) / 2
            role = "anchor" if sink["contribution"] >= median else "dump"
        rows.append((sink["sample"], sink["layer"], sink["position"], strength, dim, role))
    return sorted(rows)


def as_rows(found: pd.DataFrame) -> list[tuple[Any, ...]]:
    names = ["sample", "layer", "position", "sink_strength", "sink_dim", "role"]
    return sorted(found[names].itertuples(index=False, name=None))


def assert_close(found: Any, wanted: Any) -> None:
    """Numbers in lists, or in lists in dicts."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        found, wanted = list(found.values()), list(wanted.values())
    np.testing.assert_allclose(np.array(found, float), np.array(wanted, float), rtol=1e-12)


def set_top(table: pd.DataFrame, where: pd.Series, pairs: Sequence[tuple[float, int]]) -> None:
    """Give tokens these (strength, dimension) pairs as their largest ones."""
    for (strength, dim), names in zip(pairs, SINK_COLUMNS, strict=False):
        table.loc[where, names[0]], table.loc[where, names[1]] = strength, dim


def place(table: pd.DataFrame, sample: str, layer: int, position: int | None = None) -> pd.Series:
    where = (table["sample"] == sample) & (table["layer"] == layer) & (table["kind"] == "visual")
    return where if position is None else where & (table["position"] == position)


class TestWhichTokensAreSinks:
    def test_the_planted_ones_and_no_others(self) -> None:
        found = classify_sinks(profile(WORLD), tau=TAU)
        wanted = sorted(
            (s.sample, s.layer, s.position, s.phi, s.dim, "anchor" if s.high else "dump") for s in PLANTED
        )
        assert as_rows(found) == wanted == naive_sinks(tokens(WORLD), TAU)
        assert list(found.columns) == list(sinks.COLUMNS)
        assert found.index.tolist() == list(range(len(found)))

    def test_other_columns_are_those_of_the_token(self) -> None:
        prof = profile(WORLD)
        found = classify_sinks(prof, tau=TAU)
        shared = [name for name in sinks.COLUMNS if name not in ("others_contribution", "role")]
        own = found[["sample", "layer", "position"]].merge(prof.tokens[prof.tokens["step"] == 0], how="left")
        pd.testing.assert_frame_equal(found[shared], own[shared], check_dtype=False)

    def test_what_was_used_is_kept(self) -> None:
        known = classify_sinks(profile(WORLD), tau=TAU).attrs
        assert known == json.loads(json.dumps(known))  # so that it survives in a parquet file
        assert (known["tau"], known["tau_given"], known["dims"], known["split"]) == (
            TAU,
            TAU,
            "measured",
            "non-sink-median",
        )
        assert known["dims_per_layer"] == [[], [], [7], [7, 8], [9]]
        assert known["offsets"] == [[]] * 5
        assert known["n_visual"] == [48] * 5
        assert known["n_sinks"] == [0, 0, 1, 3, 1]

    def test_decode_steps_do_not_count(self) -> None:
        world = World(sinks=PLANTED, steps=2)
        table = tokens(world)
        later = (table["step"] > 0) & (table["kind"] == "visual")
        set_top(table, later, [(25.0, 7)])
        found = classify_sinks(profile_of(table, world, rows="visual"), tau=TAU)
        assert as_rows(found) == naive_sinks(table, TAU)
        assert found.attrs["n_visual"] == [48] * 5

    @pytest.mark.parametrize("rows", ["all", "visual"])
    def test_a_profile_on_disk_gives_the_same(self, tmp_path: Path, rows: str) -> None:
        profile_of(tokens(WORLD), WORLD, tmp_path / "run", rows)
        on_disk = LayerProfile.load(tmp_path / "run")
        assert on_disk.n_parts == 3
        in_memory = profile(WORLD, batches=[("a", "b", "c")])
        assert in_memory.n_parts == 1
        found, wanted = (classify_sinks(prof, tau=TAU) for prof in (on_disk, in_memory))
        pd.testing.assert_frame_equal(found, wanted)
        for name, value in wanted.attrs.items():
            if "_share" in name and name != "max_share":  # means over samples are summed in another order
                assert_close(found.attrs[name], value)
            else:
                assert found.attrs[name] == value
        pd.testing.assert_frame_equal(measure_sink_dims(on_disk, TAU), measure_sink_dims(in_memory, TAU))

    def test_no_sinks_are_an_empty_table_of_the_same_types(self) -> None:
        found, some = classify_sinks(profile(WORLD), tau=30), classify_sinks(profile(WORLD), tau=TAU)
        assert found.empty
        assert found.dtypes.to_dict() == some.dtypes.to_dict()
        assert found.attrs["n_visual"] == [48] * 5
        summary = sink_summary(found)
        assert summary.dtypes.to_dict() == sink_summary(some).dtypes.to_dict()
        assert summary["n_sinks"].tolist() == [0] * 5
        assert summary["attention_share"].tolist() == [0.0] * 5
        assert measure_sink_dims(profile(WORLD), 30).empty

    def test_a_model_of_two_layers_has_none(self) -> None:
        assert classify_sinks(profile(World(n_layers=2)), tau=TAU).empty

    def test_relative_tau(self) -> None:
        found = classify_sinks(profile(WORLD), tau="relative")
        assert found.attrs["tau"] == pytest.approx(10.0)  # 0.3125 * sqrt(1024)
        assert found.attrs["tau_given"] == "relative"
        assert as_rows(found) == as_rows(classify_sinks(profile(WORLD), tau=TAU))

    def test_tau_is_compared_in_double_precision(self) -> None:
        tau = 25.0 - 1e-9  # as float32 this would be 25, which the planted 25 does not exceed
        assert len(classify_sinks(profile(WORLD), tau=tau)) == sum(s.phi == 25.0 for s in PLANTED)


@st.composite
def crowded(draw: st.DrawFn) -> tuple[World, pd.DataFrame]:
    """Few dimensions and strengths, so that offsets, ties, hidden dimensions and layers full of sinks all happen."""
    world = World(
        samples=("a", "b")[: draw(st.integers(1, 2))], n_layers=4, side=draw(st.integers(1, 3)), n_text=1
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    table = tokens(world)
    pool = draw(st.sampled_from([4, 6, 12, 60]))
    high = draw(st.sampled_from([0.05, 0.3, 0.9]))
    n = len(table)
    strengths = np.where(
        rng.random((n, 4)) < high, rng.integers(11, 15, size=(n, 4)), rng.integers(1, 11, size=(n, 4))
    )
    table[STRENGTHS] = -np.sort(-strengths, axis=1).astype(np.float32)
    table[DIMS] = rng.permuted(np.tile(np.arange(pool), (n, 1)), axis=1)[:, :4].astype(np.int32)
    table["contribution"] = rng.integers(1, 4, size=n).astype(np.float32)
    return world, table


@given(
    crowded(), st.one_of(st.none(), st.sets(st.integers(0, 12), min_size=1)), st.sampled_from([0.25, 0.6, 1])
)
def test_sinks_equal_the_naive_twin_on_anything(
    made: tuple[World, pd.DataFrame], dims: set[int] | None, max_share: float
) -> None:
    world, table = made
    wanted = naive_sinks(table, TAU, None if dims is None else sorted(dims), max_share)
    prof = profile_of(table, world)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # offsets and undetermined roles are what this is made of
        arguments = {"dims": "measured" if dims is None else sorted(dims), "max_share": max_share}
        if wanted == "unknown":
            with pytest.raises(CapaProbeError, match="cannot be told"):
                classify_sinks(prof, TAU, **arguments)
            return
        found = classify_sinks(prof, TAU, **arguments)
    assert as_rows(found) == wanted
    assert_summary(found, table)
    # Of a set that was given, a higher threshold keeps a part.
    if dims is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fewer = classify_sinks(prof, TAU + 2, **arguments)
        assert {row[:3] for row in as_rows(fewer)} <= {row[:3] for row in as_rows(found)}
        assert set(found["sink_dim"]) <= dims


def assert_summary(found: pd.DataFrame, table: pd.DataFrame) -> None:
    """Against counting."""
    visual = table[(table["step"] == 0) & (table["kind"] == "visual")]
    summary = sink_summary(found)
    assert summary["layer"].tolist() == sorted(table["layer"].unique())
    role_of = {(s, la, p): role for s, la, p, *_, role in as_rows(found)}
    for row in summary.itertuples():
        here, mine = visual[visual["layer"] == row.layer], found[found["layer"] == row.layer]
        assert row.n_visual == len(here)
        assert row.n_sinks == len(mine) == row.n_dump + row.n_anchor + row.n_undetermined
        assert row.n_dump == list(mine["role"]).count("dump")
        assert row.n_anchor == list(mine["role"]).count("anchor")
        assert row.share_sinks == pytest.approx(len(mine) / len(here))
        for name in ("attention", "contribution"):
            for role in ("", "_dump", "_anchor"):
                shares = []
                for sample in here["sample"].unique():
                    of_sample = here[here["sample"] == sample]
                    taken = [
                        getattr(token, name)
                        for token in of_sample.itertuples()
                        if role_of.get((sample, row.layer, token.position), "none").startswith(role[1:])
                        and (sample, row.layer, token.position) in role_of
                    ]
                    shares.append(sum(taken) / of_sample[name].sum())
                expected = sum(shares) / len(shares)
                assert getattr(row, f"{name}_share{role}") == pytest.approx(expected, rel=1e-5)
        assert row.sink_dims == ", ".join(map(str, sorted(set(mine["sink_dim"]))))
    assert_totals(found, summary, visual)


def assert_totals(found: pd.DataFrame, summary: pd.DataFrame, visual: pd.DataFrame) -> None:
    totals = sink_totals(found)
    assert totals["role"].tolist() == ["dump", "anchor", "undetermined", "all"]
    rows, from_2 = as_rows(found), summary[summary["layer"] >= 2]
    for row in totals.itertuples():
        own = [each for each in rows if row.role in (each[5], "all")]
        assert row.n_sinks == len(own)
        assert row.n_tokens == len({(sample, position) for sample, _, position, *_ in own})
        np.testing.assert_equal(row.role_share, len(own) / len(rows) if rows else np.nan)
        assert row.share_sinks == pytest.approx(len(own) / len(visual[visual["layer"] >= 2]))
        if row.role != "undetermined":
            suffix = "" if row.role == "all" else f"_{row.role}"
            for name in ("attention_share", "contribution_share"):
                assert getattr(row, name) == pytest.approx(from_2[f"{name}{suffix}"].mean())
    by_role = totals.set_index("role")
    for name in ("n_sinks", "share_sinks", "attention_share", "contribution_share"):
        assert by_role[name].iloc[:3].sum() == pytest.approx(by_role[name]["all"])


class TestDimensions:
    def test_measured(self) -> None:
        found = measure_sink_dims(profile(WORLD), TAU)
        names = ["layer", "dim", "n_tokens", "share", "largest", "offset", "n_samples"]
        assert found[names].to_numpy().tolist() == [
            [layer, dim, n, n / 48, largest, False, n]
            for layer, dim, n, largest in ((2, 7, 1, 25.0), (3, 7, 2, 25.0), (3, 8, 1, 12.5), (4, 9, 1, 25.0))
        ]

    def test_an_offset_is_left_out_and_named(self) -> None:
        table = tokens(WORLD)
        set_top(table, place(table, "a", 3), [(28.0, 50), (12.0, 51)])
        set_top(table, place(table, "a", 3, 2), [(28.0, 50), (26.0, 7)])
        prof = profile_of(table, WORLD)
        offsets = measure_sink_dims(prof, TAU).query("offset")
        assert offsets[["layer", "dim", "n_tokens"]].to_numpy().tolist() == [[3, 50, 16], [3, 51, 15]]
        message = (
            "exceed tau=10 on more than 25% of a layer's visual tokens: dimension 50 at layer 3; dimension 51 at "
            "layer 3; they are offsets rather than sink dimensions, left out"
        )
        with pytest.warns(UserWarning, match=message) as caught:
            found = classify_sinks(prof, tau=TAU)
        assert caught[0].filename == __file__  # points at the caller
        assert as_rows(found) == naive_sinks(table, TAU)
        # Below the offset, the sink's own dimension is seen.
        assert ("a", 3, 2, 26.0, 7, "anchor") in as_rows(found)
        assert len(found) == len(PLANTED) - 1  # the one at (a, 3, 9) has only the offsets above tau now
        assert found.attrs["offsets"] == [[], [], [], [50, 51], []]
        assert found.attrs["dims_per_layer"] == [[], [], [7], [7], [9]]

    def test_offsets_are_judged_by_layer_and_share(self) -> None:
        table = tokens(WORLD)
        for position in range(1, 13):  # 12 of 48 visual tokens: exactly a quarter, and so no offset
            set_top(table, place(table, "b", 4, position), [(25.0, 60)])
        prof = profile_of(table, WORLD)
        assert len(classify_sinks(prof, tau=TAU)) == len(PLANTED) + 12
        with pytest.warns(UserWarning, match="more than 20% .* dimension 60 at layer 4"):
            assert len(classify_sinks(prof, tau=TAU, max_share=0.2)) == len(PLANTED)

    def test_given_dimensions(self) -> None:
        prof = profile(WORLD)
        for dims in ([7], (7,), np.array([7]), [7, 7]):
            found = classify_sinks(prof, tau=TAU, dims=dims)
            assert as_rows(found) == naive_sinks(tokens(WORLD), TAU, [7])
            assert set(found["sink_dim"]) == {7}
            assert found.attrs["dims"] == [7]
        assert classify_sinks(prof, tau=TAU, dims=[3]).empty

    def test_a_given_dimension_that_looks_like_an_offset_is_kept_and_named(self) -> None:
        table = tokens(WORLD)
        set_top(table, place(table, "a", 3) & (table["position"] > 2), [(28.0, 50)])
        prof = profile_of(table, WORLD)
        with pytest.warns(
            UserWarning, match="dimension 50 at layer 3; they are offsets .* kept because they were"
        ):
            found = classify_sinks(prof, tau=TAU, dims=[50])
        assert as_rows(found) == naive_sinks(table, TAU, [50])
        assert found.attrs["offsets"][3] == [50]

    def test_published_dimensions(self) -> None:
        found = classify_sinks(profile(WORLD, published_sink_dims=[8, 9]), tau=TAU, dims="published")
        assert as_rows(found) == naive_sinks(tokens(WORLD), TAU, [8, 9])
        assert found.attrs["dims"] == "published"
        with pytest.raises(
            CapaProbeError, match=r'"published" was given, but no .* published for made-up; use dims='
        ):
            classify_sinks(profile(WORLD), tau=TAU, dims="published")

    @pytest.mark.parametrize("dims", [[], "all", [-1], [1024], [1.5], [True], 7, None, ["7"]])
    def test_dimensions_that_are_none(self, dims: Any) -> None:
        with pytest.raises(
            CapaProbeError, match=r'was given; give "measured", "published", or .* from 0 to 1023'
        ):
            classify_sinks(profile(WORLD), tau=TAU, dims=dims)


class TestFourDimensionsPerToken:
    """A fifth dimension above tau is not in the table: where that matters, it is said."""

    FOUR = ((28.0, 50), (27.0, 51), (26.0, 52), (25.0, 53))

    def test_given_dimensions_may_be_hidden(self) -> None:
        table = tokens(WORLD)
        set_top(table, place(table, "b", 4, 3), self.FOUR)
        prof = profile_of(table, WORLD)
        message = (
            r"cannot be told which visual tokens are sinks \(1 in doubt, first: sample 'b', layer 4, position 3\): "
            r"sink_strength_4 = 25 is above tau=10 and .* outside dims=\[7\]; profile again with sink_dims=\[7\]"
        )
        with pytest.raises(CapaProbeError, match=message):
            classify_sinks(prof, tau=TAU, dims=[7])
        # One of the four is in the set: its strength is exact.
        assert ("b", 4, 3, 26.0, 52) in [
            row[:5] for row in as_rows(classify_sinks(prof, tau=TAU, dims=[7, 52]))
        ]
        assert len(classify_sinks(prof, tau=TAU)) == len(PLANTED) + 1

    def test_four_offsets_hide_measured_dimensions(self) -> None:
        table = tokens(WORLD)
        set_top(table, place(table, "a", 3), self.FOUR)
        with (
            pytest.warns(UserWarning, match=r"may be offsets, hidden"),
            pytest.warns(UserWarning, match="dimension 50 at layer 3"),
            pytest.raises(
                CapaProbeError, match=r"\(16 in doubt, .* are offsets; profile again with sink_dims="
            ),
        ):
            classify_sinks(profile_of(table, WORLD), tau=TAU)

    def test_offsets_themselves_may_be_hidden(self) -> None:
        table = tokens(WORLD)
        rng = np.random.default_rng(0)
        at = place(table, "a", 3) & (table["position"] > 2)
        table.loc[at, STRENGTHS] = [28.0, 27.0, 26.0, 25.0]
        table.loc[at, DIMS] = rng.permuted(np.tile(np.arange(40), (at.sum(), 1)), axis=1)[:, :4]
        message = r"sink_strength_4 exceeds tau=10 on so many visual tokens at layer 3 that .*may be offsets"
        with pytest.warns(UserWarning, match=message):
            classify_sinks(profile_of(table, WORLD), tau=TAU)

    def test_a_set_given_at_profile_time_is_exact(self) -> None:
        """Then there are no other dimensions, and nothing is hidden."""
        world = World(sinks=())
        table = tokens(world)
        set_top(table, table["layer"] >= 0, [(3.0, 7), (2.0, 8), (np.nan, -1), (np.nan, -1)])
        set_top(table, place(table, "a", 3, 4), [(15.0, 8), (12.0, 7)])
        set_top(table, place(table, "b", 3, 4), [(14.0, 8), (9.0, 7)])
        prof = profile_of(table, world, sink_dims=[7, 8], published_sink_dims=[8, 99])
        for dims in ("measured", [7, 8], [8, 7]):
            found = classify_sinks(prof, tau=TAU, dims=dims)
            assert [row[:5] for row in as_rows(found)] == [("a", 3, 4, 15.0, 8), ("b", 3, 4, 14.0, 8)]
        assert [row[:5] for row in as_rows(classify_sinks(prof, TAU, [7]))] == [("a", 3, 4, 12.0, 7)]
        message = r"measured over sink_dims=\[7, 8\] only, without 99; .* again with sink_dims=\[8, 99\]"
        with pytest.raises(CapaProbeError, match=message):
            classify_sinks(prof, tau=TAU, dims=[8, 99])
        with pytest.raises(CapaProbeError, match=message):
            classify_sinks(prof, tau=TAU, dims="published")

    @pytest.mark.parametrize(
        ("given_dims", "hidden"), [([50, 51, 52, 53], False), ([7, 50, 51, 52, 53], True)]
    )
    def test_a_set_of_more_than_four_may_hide_one(self, given_dims: list[int], hidden: bool) -> None:
        table = tokens(WORLD)
        set_top(table, place(table, "b", 4, 3), self.FOUR)
        table.loc[table["layer"] != 4, STRENGTHS] = 1.0
        prof = profile_of(table, WORLD, sink_dims=given_dims)
        assert ("b", 4, 3, 28.0, 50) in [row[:5] for row in as_rows(classify_sinks(prof, tau=TAU))]
        dims = [7] if hidden else [53]
        if hidden:
            with pytest.raises(CapaProbeError, match="cannot be told"):
                classify_sinks(prof, tau=TAU, dims=dims)
        else:
            assert ("b", 4, 3, 25.0, 53) in [row[:5] for row in as_rows(classify_sinks(prof, TAU, dims))]


class TestRoles:
    def test_a_contribution_at_the_median_of_the_others_is_an_anchors(self) -> None:
        world = World(samples=("a",), n_layers=3, side=2, sinks=(Planted("a", 2, 1, dim=7),))
        table = tokens(world)
        # Exact in float64, not in float32: the median is 1 + 2**-24.
        for position, contribution in ((2, 1.0), (3, 1.0 + 2**-23), (4, 9.0)):
            table.loc[place(table, "a", 2, position), "contribution"] = np.float32(contribution)
        for own, role in ((1.0 + 2**-23, "anchor"), (1.0, "dump")):
            table.loc[place(table, "a", 2, 1), "contribution"] = np.float32(own)
            (found,) = classify_sinks(profile_of(table, world), tau=TAU, max_share=0.3)["role"]
            assert found == role
        # With an even number of others the median lies between two of them.
        world = World(samples=("a",), n_layers=3, side=3, sinks=(Planted("a", 2, 1, dim=7),))
        table = tokens(world)
        table.loc[place(table, "a", 2), "contribution"] = [1.0, 5, 5, 5, 5, 1 + 2**-23, 1, 1, 1]
        (found,) = classify_sinks(profile_of(table, world), tau=TAU)["role"]
        assert found == "dump"

    def test_undetermined_where_every_visual_token_is_a_sink(self) -> None:
        table = tokens(WORLD)
        for number, position in enumerate(range(1, 17)):
            set_top(table, place(table, "c", 2, position), [(25.0, 20 + number // 4)])
        message = r"role of 16 of 21 sinks is undetermined: .*\(first: sample 'c', layer 2\)"
        with pytest.warns(UserWarning, match=message) as caught:
            found = classify_sinks(profile_of(table, WORLD), tau=TAU)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert as_rows(found) == naive_sinks(table, TAU)
        assert_summary(found, table)
        assert sink_summary(found)["n_undetermined"].tolist() == [0, 0, 16, 0, 0]

    def test_what_the_others_contribute_is_kept(self) -> None:
        found, table = classify_sinks(profile(WORLD), tau=TAU), tokens(WORLD)
        keys = {(s, la, p) for s, la, p, *_ in as_rows(found)}
        for sink in found.itertuples():
            others = [
                float(token.contribution)
                for token in table[place(table, sink.sample, sink.layer)].itertuples()
                if (token.sample, token.layer, token.position) not in keys
            ]
            assert sink.others_contribution == pytest.approx(float(np.median(others)))
            assert sink.role == ("anchor" if sink.contribution >= sink.others_contribution else "dump")


class TestSummary:
    def test_equals_counting(self) -> None:
        assert_summary(classify_sinks(profile(WORLD), tau=TAU), tokens(WORLD))

    def test_samples_without_an_image_do_not_count(self) -> None:
        world = World(samples=("a", "b", "text"), sinks=PLANTED[:4])
        table = tokens(world)
        table = table[(table["sample"] != "text") | (table["kind"] == "text")]
        found = classify_sinks(profile_of(table, world), tau=TAU)
        assert as_rows(found) == naive_sinks(table, TAU)
        assert_summary(found, table)

    def test_survives_a_parquet_file(self, tmp_path: Path) -> None:
        found = classify_sinks(profile(WORLD), tau="relative")
        found.to_parquet(tmp_path / "sinks.parquet")
        again = pd.read_parquet(tmp_path / "sinks.parquet")
        pd.testing.assert_frame_equal(sink_summary(again), sink_summary(found))
        pd.testing.assert_frame_equal(sink_totals(again), sink_totals(found))

    def test_what_no_sink_needs_may_be_missing_and_its_share_is_unknown(self) -> None:
        table = tokens(WORLD)
        table.loc[place(table, "b", 2), "contribution"] = np.nan
        found = classify_sinks(profile_of(table, WORLD), tau=TAU)
        assert sink_summary(found)["contribution_share"].isna().tolist() == [False, False, True, False, False]
        assert sink_totals(found)["contribution_share"].notna().all()

    def test_a_sample_whose_visual_tokens_get_no_attention_has_no_share(self) -> None:
        table = tokens(WORLD)
        table.loc[place(table, "a", 3), "attention"] = 0.0
        found = classify_sinks(profile_of(table, WORLD), tau=TAU)
        b = table[place(table, "b", 3)]
        of_b = b["attention"][b["position"] == 4].iloc[0] / b["attention"].sum()
        assert sink_summary(found)["attention_share"][3] == pytest.approx(of_b / 2)  # the mean of b and c
        assert sink_summary(found)["attention_share"].notna().all()

    def test_without_sinks_there_is_nothing_to_share(self) -> None:
        for prof in (profile(World(sinks=())), profile(World(n_layers=2))):
            totals = sink_totals(classify_sinks(prof, tau=TAU))
            assert totals["n_sinks"].tolist() == totals["n_tokens"].tolist() == [0] * 4
            assert totals["role_share"].isna().all()
        assert totals["share_sinks"].isna().all()  # no layer from 2 on, and so no visual token either
        assert totals["attention_share"].isna().all()

    def test_a_profile_without_attention_has_no_share(self) -> None:
        table = tokens(WORLD).assign(attention=np.nan)
        summary = sink_summary(classify_sinks(profile_of(table, WORLD), tau=TAU))
        assert summary["attention_share"].isna().tolist() == [False, False, True, True, True]
        assert summary["attention_share_dump"].isna().tolist() == [False, False, True, True, True]
        assert summary["contribution_share"].notna().all()
        assert summary["n_sinks"].tolist() == [0, 0, 1, 3, 1]
        totals = sink_totals(classify_sinks(profile_of(table, WORLD), tau=TAU))
        assert totals["attention_share"].isna().all()
        assert totals["contribution_share"].notna().all()

    def test_refuses_other_tables_and_parts_of_one(self) -> None:
        found = classify_sinks(profile(WORLD), tau=TAU)
        with pytest.raises(CapaProbeError, match="give the table that classify_sinks returned"):
            sink_summary(pd.DataFrame(found.to_dict()))
        with pytest.raises(CapaProbeError, match="without the columns"):
            sink_summary(found.drop(columns="role"))
        with pytest.raises(CapaProbeError, match=r"was given 3 of 5 sinks.*give the whole table"):
            sink_summary(found[found["role"] == "dump"])
        with pytest.raises(CapaProbeError, match=r"sink_totals was given 3 of 5 sinks"):
            sink_totals(found[found["role"] == "dump"])


class TestProfilesThatWillNotDo:
    def test_thresholds(self) -> None:
        with pytest.raises(CapaProbeError, match=r"tau=40 can never be reached by a model of width 1024"):
            classify_sinks(profile(WORLD), tau=40)
        with pytest.raises(CapaProbeError, match=r'tau="relative" was given for a model of width 128'):
            classify_sinks(profile(WORLD, d_model=128), tau="relative")
        with pytest.raises(CapaProbeError, match=r"tau=20 can never be reached by a model of width 256"):
            measure_sink_dims(profile(WORLD, d_model=256))
        for tau in (0, -1.0, np.nan, "high", None, True):
            with pytest.raises(CapaProbeError, match=r"tau=.* was given; give a positive number"):
                classify_sinks(profile(WORLD), tau=tau)

    @pytest.mark.parametrize("max_share", [0, -0.1, 1.1, np.nan, True, "0.2"])
    def test_shares(self, max_share: Any) -> None:
        with pytest.raises(CapaProbeError, match=r"max_share=.* was given; give a share above 0 and up to 1"):
            measure_sink_dims(profile(WORLD), TAU, max_share=max_share)

    @pytest.mark.parametrize("analysis", [classify_sinks, measure_sink_dims])
    def test_without_token_rows(self, analysis: Any) -> None:
        with pytest.raises(
            CapaProbeError, match=r'made with rows="none".*again with rows="visual" or rows="all"'
        ):
            analysis(profile(WORLD, rows="none"), TAU)

    @pytest.mark.parametrize("analysis", [classify_sinks, measure_sink_dims])
    def test_without_visual_tokens(self, analysis: Any) -> None:
        table = tokens(WORLD)
        with pytest.raises(CapaProbeError, match=r"no visual token.*profile samples that have an image"):
            analysis(profile_of(table[table["kind"] == "text"], WORLD), TAU)

    def test_without_sink_strength(self) -> None:
        table = tokens(WORLD)
        table.loc[place(table, "b", 3, 2), "sink_strength"] = np.nan
        message = (
            """sink_strength is missing .* sample 'b' at layer 3; profile again with "sink_strength" among"""
        )
        with pytest.raises(CapaProbeError, match=message):
            classify_sinks(profile_of(table, WORLD), tau=TAU)

    @pytest.mark.parametrize("position", [1, 2])
    def test_without_the_contribution_of_a_sink_or_its_neighbours(self, position: int) -> None:
        table = tokens(WORLD)
        table.loc[place(table, "a", 2, position), "contribution"] = np.nan
        with pytest.raises(CapaProbeError, match=r"contribution is missing \(NaN\) at layer 2 of sample 'a'"):
            classify_sinks(profile_of(table, WORLD), tau=TAU)

    def test_a_contribution_that_no_sink_needs_may_be_missing(self) -> None:
        table = tokens(WORLD)
        table.loc[place(table, "b", 2), "contribution"] = np.nan
        assert as_rows(classify_sinks(profile_of(table, WORLD), tau=TAU)) == naive_sinks(table, TAU)

    @pytest.mark.parametrize("name", ["d_model", "n_layers"])
    def test_a_manifest_without_sizes(self, name: str) -> None:
        with pytest.raises(
            CapaProbeError, match=f"manifest of this profile does not say {name}; profile again"
        ):
            classify_sinks(profile(WORLD, **{name: None}), tau=TAU)

    @pytest.mark.parametrize("wrong", [{"d_model": 900}, {"n_layers": 4}])
    def test_a_manifest_that_contradicts_the_tables(self, wrong: dict[str, int]) -> None:
        with pytest.raises(CapaProbeError, match="but its manifest says"):
            classify_sinks(profile(WORLD, **wrong), tau=TAU)


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_a_sink_planted_in_a_models_residual_stream_is_found(family: str) -> None:
    lvlm = cp.HookedLVLM(tiny.shared(family))
    inputs = tiny.inputs(family)
    spans = lvlm.spans(inputs)
    place_in_batch = int(spans.visual[1].nonzero()[3])
    position = place_in_batch - int(spans.padding[1].sum())  # padded on the left

    def plant(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[1, place_in_batch, 5] += 1e3
        return x

    with lvlm.hooks(fwd_hooks=[("blocks.1.hook_resid_post", plant)]):
        prof = cp.profile(lvlm, [inputs], progress=False)
        exact = cp.profile(lvlm, [inputs], progress=False, sink_dims=[5, 6])
    for found in (
        cp.classify_sinks(prof, tau=5.0),
        cp.classify_sinks(prof, tau=5.0, dims=[5]),
        cp.classify_sinks(exact, tau=5.0),
    ):
        assert [row[:3] for row in as_rows(found)] == [("1", layer, position) for layer in (2, 3)]
        assert set(found["sink_dim"]) == {5}
        assert (found["sink_strength"] > 5.6).all()  # sqrt(32) = 5.66 at most
        assert set(found["role"]) <= {"dump", "anchor"}

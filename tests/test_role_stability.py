"""Stability of roles over layers and prompts against loops over pairs, and against roles drawn at random."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capa_probe.analysis import classify_sinks, role_stability
from capa_probe.analysis.stability import ALL_LAYERS
from capa_probe.errors import CapaProbeError
from tests.synthetic import TAU, Planted, World, profile

N_LAYERS = 5
Roles = dict[tuple[str, int, int], str]  # (sample, layer, position)


@cache
def one_sink() -> pd.DataFrame:
    return classify_sinks(profile(World(n_layers=N_LAYERS, sinks=(Planted("a", 2, 1, dim=7),))), tau=TAU)


def sinks_with(roles: Roles) -> pd.DataFrame:
    """A table of sinks with these roles; each position is its own column of the image's grid."""
    found = one_sink()
    table = found.iloc[np.zeros(len(roles), int)].reset_index(drop=True)
    sample, layer, position = zip(*roles, strict=True) if roles else ((), (), ())
    table["sample"] = pd.Series(sample, dtype=found["sample"].dtype)
    table["layer"], table["position"] = np.array(layer, np.int32), np.array(position, np.int32)
    table["row"] = np.int32(0)
    table["col"] = table["position"]
    table["role"] = pd.Series(list(roles.values()), dtype=found["role"].dtype)
    counts = [sum(at == number for at in layer) for number in range(N_LAYERS)]
    table.attrs = found.attrs | {"n_sinks": counts}
    return table


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def naive(roles: Roles, groups: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    """(over, layer, n_tokens, n_pairs, same, same_expected, constant, constant_expected) by loops."""
    roles = {key: role for key, role in roles.items() if role != "undetermined"}
    rows: list[tuple[Any, ...]] = []
    all_pairs, all_expected = [], []
    for at in range(N_LAYERS):
        pairs = [
            (role, roles[s, la + 1, p])
            for (s, la, p), role in roles.items()
            if la == at and (s, la + 1, p) in roles
        ]
        expected = math.nan
        if pairs:
            frequencies = [[each[i] == "anchor" for each in pairs].count(True) / len(pairs) for i in range(2)]
            expected = math.prod(frequencies) + math.prod(1 - f for f in frequencies)
        all_pairs += pairs
        all_expected += [expected] * len(pairs)
        same = mean([float(a == b) for a, b in pairs])
        rows.append(("layers", at, len(pairs), len(pairs), same, expected, math.nan, math.nan))
    tokens: dict[tuple[str, int], dict[int, str]] = {}
    for (s, la, p), role in roles.items():
        tokens.setdefault((s, p), {})[la] = role
    tokens = {key: own for key, own in tokens.items() if len(own) >= 2}

    def anchors_at(layer: int) -> float:
        return mean([float(own[layer] == "anchor") for own in tokens.values() if layer in own])

    constant = [float(len(set(own.values())) == 1) for own in tokens.values()]
    chance = [
        math.prod(anchors_at(la) for la in own) + math.prod(1 - anchors_at(la) for la in own)
        for own in tokens.values()
    ]
    same = mean([float(a == b) for a, b in all_pairs])
    whole = (len(tokens), len(all_pairs), same, mean(all_expected), mean(constant), mean(chance))
    rows.append(("layers", ALL_LAYERS, *whole))

    places: dict[tuple[int, Any, int], list[str]] = {}
    for (s, la, p), role in roles.items():
        if (groups or {}).get(s) is not None:
            places.setdefault((la, (groups or {})[s], p), []).append(role)
    places = {key: own for key, own in places.items() if len(own) >= 2}
    frequency = {
        la: mean([float(role == "anchor") for key, own in places.items() if key[0] == la for role in own])
        for la in range(N_LAYERS)
    }
    for at in (*range(N_LAYERS), ALL_LAYERS):
        mine = {key: own for key, own in places.items() if at in (key[0], ALL_LAYERS)}
        same_pairs, expected_pairs, kept, kept_expected = [], [], [], []
        for (la, _, _), own in mine.items():
            f = frequency[la]
            for a, b in itertools.combinations(own, 2):
                same_pairs.append(float(a == b))
                expected_pairs.append(f * f + (1 - f) ** 2)
            kept.append(float(len(set(own)) == 1))
            kept_expected.append(f ** len(own) + (1 - f) ** len(own))
        numbers = (mean(same_pairs), mean(expected_pairs), mean(kept), mean(kept_expected))
        rows.append(("prompts", at, len(mine), len(same_pairs), *numbers))
    return rows


def assert_equals_the_twin(found: pd.DataFrame, roles: Roles, groups: dict[str, Any] | None) -> None:
    wanted = pd.DataFrame(naive(roles, groups), columns=list(found.columns))
    pd.testing.assert_frame_equal(found, wanted, check_dtype=False)


@given(
    st.dictionaries(
        st.tuples(st.sampled_from("abcd"), st.integers(2, N_LAYERS - 1), st.integers(1, 4)),
        st.sampled_from(["dump", "anchor", "undetermined"]),
        max_size=40,
    ),
    st.one_of(
        st.none(),
        st.dictionaries(st.sampled_from("abcdz"), st.sampled_from(["x", ("y", 1), None]), max_size=5),
    ),
)
def test_equals_loops_over_pairs(roles: Roles, groups: dict[str, Any] | None) -> None:
    assert_equals_the_twin(role_stability(sinks_with(roles), groups), roles, groups)


def row(table: pd.DataFrame, over: str, layer: int = ALL_LAYERS) -> Any:
    (found,) = table[(table["over"] == over) & (table["layer"] == layer)].itertuples()
    return found


class TestLayers:
    def test_tokens_that_keep_their_role(self) -> None:
        roles = {("a", la, p): "anchor" if p % 2 else "dump" for la in (2, 3, 4) for p in range(1, 9)}
        table = role_stability(sinks_with(roles))
        whole = row(table, "layers")
        assert (whole.n_tokens, whole.n_pairs) == (8, 16)
        assert (whole.same, whole.same_expected) == (1, 0.5)
        assert (whole.constant, whole.constant_expected) == (1, 0.25)
        assert row(table, "layers", 2).n_pairs == 8
        assert row(table, "layers", 4).n_pairs == 0

    def test_roles_drawn_at_random_are_as_stable_as_chance(self) -> None:
        rng = np.random.default_rng(0)
        roles = {
            (s, la, p): "anchor" if rng.random() < 0.3 else "dump"
            for s in "abcdefgh"
            for la in (2, 3, 4)
            for p in range(300)
        }
        whole = row(role_stability(sinks_with(roles), dict.fromkeys("abcdefgh", "one image")), "layers")
        assert whole.same == pytest.approx(0.58, abs=0.02)
        assert whole.same_expected == pytest.approx(0.58, abs=0.02)
        assert whole.constant == pytest.approx(whole.constant_expected, abs=0.02)

    def test_a_gap_makes_no_pair_but_counts_for_the_whole(self) -> None:
        roles = {("a", 2, 1): "anchor", ("a", 4, 1): "anchor", ("a", 3, 2): "dump"}
        whole = row(role_stability(sinks_with(roles)), "layers")
        assert (whole.n_tokens, whole.n_pairs, whole.constant) == (1, 0, 1)
        assert math.isnan(whole.same)


#: Samples a and b agree, c does not.
ROLES = {
    **{("a", 2, p): "anchor" if p < 3 else "dump" for p in range(1, 5)},
    **{("b", 2, p): "anchor" if p < 3 else "dump" for p in range(1, 5)},
    **{("c", 2, p): "dump" for p in range(1, 5)},
}


class TestPrompts:
    def test_only_samples_of_one_image_are_compared(self) -> None:
        table = role_stability(sinks_with(ROLES), {"a": 1, "b": 1, "c": 2})
        whole = row(table, "prompts")
        assert (whole.n_tokens, whole.n_pairs, whole.same, whole.same_expected) == (4, 4, 1, 0.5)
        assert row(table, "prompts", 2).same == 1
        table = role_stability(sinks_with(ROLES), dict.fromkeys("abc", "same"))
        # Two of four places have roles anchor, anchor, dump.
        assert row(table, "prompts").same == pytest.approx((2 * 1 / 3 + 2) / 4)
        assert row(table, "prompts").constant == 0.5

    @pytest.mark.parametrize("k", [3, 4])
    def test_chance_of_constancy_over_many_prompts(self, k: int) -> None:
        """One place of five is an anchor in every sample, the others dumps: p is 0.2."""
        samples = "abcd"[:k]
        roles = {(s, 2, p): "anchor" if p == 1 else "dump" for s in samples for p in range(1, 6)}
        whole = row(role_stability(sinks_with(roles), dict.fromkeys(samples, "same")), "prompts")
        assert whole.n_pairs == 5 * k * (k - 1) / 2
        assert whole.constant == 1
        assert whole.constant_expected == pytest.approx({3: 0.008 + 0.512, 4: 0.0016 + 0.4096}[k])
        assert whole.same_expected == pytest.approx(0.04 + 0.64)

    def test_without_groups_nothing_is_known(self) -> None:
        for groups in (None, {}, {"a": 1, "b": 2}, {"z": 1}, dict.fromkeys("abc")):
            table = role_stability(sinks_with(ROLES), groups)
            own = table[table["over"] == "prompts"]
            assert len(own) == N_LAYERS + 1
            assert own["n_pairs"].eq(0).all()
            assert own[["same", "same_expected", "constant", "constant_expected"]].isna().all(axis=None)

    def test_a_place_is_the_same_wherever_the_prompt_puts_it(self) -> None:
        """Text before the image shifts positions; the place in the grid stays."""
        table = sinks_with(ROLES)
        later = (table["sample"] == "b").to_numpy()
        table.loc[later, "position"] += 7
        groups = {"a": 1, "b": 1}
        assert row(role_stability(table, groups), "prompts").n_pairs == 4
        # Without a place there is only the position.
        table[["row", "col"]] = np.int32(-1)
        assert row(role_stability(table, groups), "prompts").n_pairs == 0
        table.loc[later, "position"] -= 7
        assert row(role_stability(table, groups), "prompts").n_pairs == 4

    @pytest.mark.parametrize("groups", [["a", "b"], "ab", {"a": ["x"]}, 3])
    def test_groups_that_are_none(self, groups: Any) -> None:
        with pytest.raises(CapaProbeError, match="was given; give a mapping of sample ids to keys"):
            role_stability(sinks_with(ROLES), groups)


def test_without_sinks() -> None:
    found = role_stability(classify_sinks(profile(World(sinks=())), tau=TAU), {"a": 1, "b": 1})
    some = role_stability(classify_sinks(profile(World(sinks=(Planted("a", 2, 1, dim=7),))), tau=TAU))
    assert found["n_tokens"].eq(0).all()
    assert found.dtypes.equals(some.dtypes)
    assert len(found) == 12


def test_of_a_profile() -> None:
    """Two samples of one image; the third differs. Token 1 keeps its role over layers, token 2 does not."""
    sinks = tuple(
        Planted(s, la, p, dim=7, high=(p == 1) or (la == 3)) for s in "ab" for la in (2, 3) for p in (1, 2)
    )
    found = classify_sinks(profile(World(sinks=sinks)), tau=TAU)
    table = role_stability(found, {"a": "cat.png", "b": "cat.png", "c": "dog.png"})
    assert row(table, "layers").same == 0.5
    assert row(table, "prompts").same == 1
    assert row(table, "prompts").n_pairs == 4


def test_refuses_a_part_of_the_table() -> None:
    table = sinks_with(ROLES)
    with pytest.raises(CapaProbeError, match="role_stability was given 4 of 12 sinks"):
        role_stability(table[:4])

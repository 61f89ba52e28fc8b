"""VisiPruner's stages and the shares of attention and contribution, against plain twins; the paper's layers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capa_probe.analysis import classify_sinks, layer_shares, published_layers, visipruner_stages
from capa_probe.analysis.published import HADAMARD_LAYERS, PRUNE_LAYERS
from capa_probe.analysis.stages import _first_deep, largest_ratios
from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.families import FAMILIES
from capa_probe.tables import LayerProfile
from tests import synthetic
from tests.synthetic import Planted, World

SINKS = (Planted("a", 2, 3, 17), Planted("b", 2, 5, 17, high=True), Planted("b", 4, 5, 17, high=True))
WORLD = World(sinks=SINKS)


def with_ratios(ratios: list[list[float]]) -> LayerProfile:
    """A profile whose largest C / |attention output| is this: [sample][layer]."""
    world = World(samples=tuple("abcdefgh"[: len(ratios)]), n_layers=len(ratios[0]), side=2, n_text=2)
    table = synthetic.tokens(world)
    table["attn_update_norm"] = 0.5  # of the other tokens, which must not matter
    for sample, own in zip(world.samples, ratios, strict=True):
        for layer, ratio in enumerate(own):
            here = (table["sample"] == sample) & (table["layer"] == layer)
            last = table.loc[here, "position"].max()
            table.loc[here & (table["position"] == last), "attn_update_norm"] = 8.0
            table.loc[here & (table["kind"] == "visual"), "contribution"] = (
                8 * ratio * np.array([0.1, 0.5, 1, 0.2])
            )
    return synthetic.profile_of(table, world)


def naive_first_deep(middle: list[bool], deep: list[bool], boundary: int) -> int:
    """VisiPruner's walk through the layers."""
    selected, counter = False, 0
    for layer in range(boundary, len(middle)):
        if not selected:
            selected = middle[layer]
        elif not deep[layer]:
            counter += 1
            if counter == 2:
                return layer + 1
    return len(middle)


class TestStages:
    def test_stages_by_hand(self) -> None:
        ratios = [
            [
                0.9,
                0.9,
                0.01,
                0.2,
                0.06,
                0.01,
                0.06,
                0.01,
                0.9,
                0.9,
            ],  # looked at in 3, quiet in 5 and 7: deep from 8
            [
                0.9,
                0.9,
                0.2,
                0.01,
                0.01,
                0.9,
                0.9,
                0.9,
                0.9,
                0.9,
            ],  # looked at in 2, quiet in 3 and 4: deep from 5
            [0.9, 0.9, 0.05, 0.05, 0.05, 0.01, 0.01, 0.01, 0.01, 0.01],  # never looked at: never deep
        ]
        found = visipruner_stages(with_ratios(ratios), boundary=2)
        assert found["shallow"].tolist() == [1, 1] + [0] * 8
        np.testing.assert_allclose(found["deep"], [0] * 5 + [1 / 3] * 3 + [2 / 3] * 2)
        assert found["stage"].tolist() == ["shallow"] * 2 + ["middle"] * 6 + ["deep"] * 2
        np.testing.assert_allclose(found["largest"], np.median(ratios, axis=0), rtol=1e-5)
        np.testing.assert_allclose(found["can_turn"], (np.array(ratios) > 0.0999).mean(axis=0))
        np.testing.assert_allclose(found["can_turn_deep"], (np.array(ratios) > 0.0447).mean(axis=0))
        np.testing.assert_allclose(found[["shallow", "middle", "deep"]].sum(axis=1), 1)
        assert found.attrs["middle_bound"] == pytest.approx(math.sqrt(1 - 0.995**2))

    @given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=9), st.integers(0, 9))
    def test_the_walk(self, drawn: list[tuple[bool, bool]], boundary: int) -> None:
        middle, deep = [one for one, _ in drawn], [two for _, two in drawn]
        first = min(boundary, len(drawn))
        found = _first_deep(np.array(middle, dtype=bool), np.array(deep, dtype=bool), first)
        assert found == naive_first_deep(middle, deep, first)

    @given(st.integers(0, 2**32 - 1))
    def test_the_bound_on_the_turn_holds(self, seed: int) -> None:
        """Whatever the angle: cos(o - c, o) >= sqrt(1 - (|c| / |o|)^2)."""
        rng = np.random.default_rng(seed)
        o, c = rng.standard_normal(3), rng.standard_normal(3)
        ratio = rng.uniform(0, 0.999)
        c *= ratio * np.linalg.norm(o) / np.linalg.norm(c)
        cosine = (o - c) @ o / np.linalg.norm(o - c) / np.linalg.norm(o)
        assert cosine >= math.sqrt(1 - ratio**2) - 1e-9

    @pytest.mark.parametrize(("n_layers", "boundary"), [(32, 6), (28, 5), (8, 2), (1, 1)])
    def test_boundary_goes_with_depth(self, n_layers: int, boundary: int) -> None:
        found = visipruner_stages(with_ratios([[0.5] * n_layers]))
        assert found.attrs["boundary"] == boundary
        assert (found["stage"] == "shallow").sum() == boundary

    def test_what_cannot_be_read(self) -> None:
        with pytest.raises(CapaProbeError, match='rows="visual"'):
            visipruner_stages(synthetic.profile(WORLD, rows="visual"))
        table = synthetic.tokens(WORLD)
        text = table[table["kind"] == "text"]
        with pytest.raises(CapaProbeError, match="without a visual token"):
            visipruner_stages(synthetic.profile_of(text, WORLD))
        for column in ("contribution", "attn_update_norm"):
            holes = table.copy()
            holes.loc[(holes["sample"] == "b") & (holes["layer"] == 3), column] = np.nan
            with pytest.raises(CapaProbeError, match="in sample 'b' at layer 3"):
                visipruner_stages(synthetic.profile_of(holes, WORLD))
        prof = synthetic.profile(WORLD)
        for bad in ({"boundary": 6}, {"boundary": -1}, {"middle_cosine": 1.0}, {"deep_cosine": "high"}):
            with pytest.raises(CapaProbeError, match=f"{next(iter(bad))}="):
                visipruner_stages(prof, **bad)  # type: ignore[arg-type]

    def test_samples_without_an_image_do_not_count(self) -> None:
        table = synthetic.tokens(WORLD)
        table = table[(table["sample"] != "b") | (table["kind"] == "text")]
        assert list(largest_ratios(synthetic.profile_of(table, WORLD)).index) == ["a", "c"]


def naive_shares(table: pd.DataFrame, sinks: pd.DataFrame, quantity: str) -> dict[tuple[int, str], float]:
    """Token by token."""
    roles = {(r.sample, r.layer, r.position): r.role for r in sinks.itertuples()}
    sums: dict[tuple[Any, ...], float] = {}
    for r in table[table["step"] == 0].itertuples():
        part = roles.get((r.sample, r.layer, r.position), "visual") if r.kind == "visual" else "text"
        part = "first" if r.kind == "text" and r.position == 0 else part
        for key in ((r.sample, r.layer, part), (r.sample, r.layer, "total")):
            sums[key] = sums.get(key, 0.0) + getattr(r, quantity)
    samples = table["sample"].unique()
    return {
        (layer, part): float(
            np.mean([sums.get((s, layer, part), 0.0) / sums[s, layer, "total"] for s in samples])
        )
        for layer in sorted(set(table["layer"]))
        for part in ("visual", "dump", "anchor", "first", "text")
    }


class TestShares:
    def test_against_the_twin(self) -> None:
        prof = synthetic.profile(World(sinks=SINKS, steps=1))
        sinks = classify_sinks(prof, tau=synthetic.TAU)
        found = layer_shares(prof, sinks)
        for quantity, own in found.groupby("quantity"):
            wanted = naive_shares(prof.tokens, sinks, str(quantity))
            for (layer, part), share in wanted.items():
                value = own.loc[own["layer"] == layer, part].iloc[0]
                assert value == pytest.approx(share, abs=2e-6), (quantity, layer, part)
        parts = found[["visual", "dump", "anchor", "undetermined", "first", "text"]]
        np.testing.assert_allclose(parts.sum(axis=1), 1, atol=1e-6)
        sinks_share = found[["dump", "anchor", "undetermined"]].sum(axis=1)
        np.testing.assert_allclose(found["all_visual"], found["visual"] + sinks_share, atol=1e-6)
        assert found.loc[found["quantity"] == "contribution", "anchor"].max() > 0.2

    def test_without_text_rows_or_sinks(self) -> None:
        whole = layer_shares(synthetic.profile(WORLD))
        part = layer_shares(synthetic.profile(WORLD, rows="visual"))
        assert part["first"].isna().all()
        np.testing.assert_allclose(part["text"], whole["text"] + whole["first"], atol=1e-6)
        assert whole[["dump", "anchor", "undetermined"]].eq(0).all(axis=None)
        layers_only = layer_shares(synthetic.profile(WORLD, rows="none"))
        np.testing.assert_allclose(layers_only["visual"], whole["visual"], atol=1e-6)

    def test_what_cannot_be_shared(self) -> None:
        prof = synthetic.profile(WORLD)
        sinks = classify_sinks(prof, tau=synthetic.TAU)
        with pytest.raises(CapaProbeError, match="2 of 3 sinks"):
            layer_shares(prof, sinks.iloc[:2])
        renamed = sinks.assign(sample=sinks["sample"].replace("b", "z"))
        renamed.attrs = sinks.attrs
        with pytest.raises(
            CapaProbeError, match="sinks of sample 'z' at layer 2, which this profile does not"
        ):
            layer_shares(prof, renamed)
        table = synthetic.tokens(WORLD)
        text = table[table["kind"] == "text"]
        with pytest.raises(CapaProbeError, match="without a visual token"):
            layer_shares(synthetic.profile_of(text, WORLD))
        nothing = table.assign(attention=np.nan, contribution=np.nan)
        with pytest.raises(CapaProbeError, match="neither attention nor contribution"):
            layer_shares(synthetic.profile_of(nothing, WORLD))
        hole = table.copy()
        hole.loc[(hole["sample"] == "b") & (hole["kind"] == "text"), "attention"] = np.nan
        with pytest.raises(
            CapaProbeError, match="attention is missing.*text tokens of sample 'b' at layer 0"
        ):
            layer_shares(synthetic.profile_of(hole, WORLD))
        zero = table.copy()
        zero.loc[(zero["sample"] == "c") & (zero["layer"] == 1), "contribution"] = 0
        with pytest.raises(CapaProbeError, match="'c' has any contribution at layer 1"):
            layer_shares(synthetic.profile_of(zero, WORLD))
        one = layer_shares(synthetic.profile_of(table.assign(contribution=np.nan), WORLD))
        assert set(one["quantity"]) == {"attention"}


class TestPublished:
    def test_the_facts_are_those_of_the_families(self) -> None:
        """Analyses import no model code, so the paper's layers are written down twice."""
        assert set(PRUNE_LAYERS) == set(HADAMARD_LAYERS)
        for (family, n_layers, d_model), (model, layers) in PRUNE_LAYERS.items():
            schedule = FAMILIES[family].schedule
            assert schedule is not None
            assert (schedule.model, schedule.n_layers, schedule.d_model) == (model.lower(), n_layers, d_model)
            assert schedule.prune_layers == layers

    def test_own_and_scaled(self) -> None:
        own = published_layers({"family": "qwen2_5_vl", "n_layers": 28, "d_model": 3584})
        assert own is not None
        assert (own.layers, own.scaled) == ((3, 11, 21), False)
        assert (
            str(own) == "The paper's pruning layers for Qwen2.5-VL-7B: 3 (early), 11 (transition), 21 (late)."
        )
        small = published_layers({"family": "llava", "n_layers": 8, "d_model": 256})
        assert small is not None
        assert (small.layers, small.scaled) == ((1, 3, 4), True)
        assert "scaled to this model's depth" in str(small)
        tiny = published_layers({"family": "llava", "n_layers": 2, "d_model": 256})
        assert tiny is not None
        assert tiny.layers == (1,)
        assert published_layers({"family": "other", "n_layers": 8, "d_model": 256}) is None

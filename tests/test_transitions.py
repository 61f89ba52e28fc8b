"""Transition layers: distances and null against a plain twin, what they must not depend on, and edge cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capa_probe.analysis import transition_layers, transitions
from capa_probe.analysis.transitions import contribution_changes
from capa_probe.errors import CapaProbeError
from capa_probe.tables import LayerProfile
from tests import synthetic
from tests.synthetic import World


def profile(contribution: np.ndarray, **manifest: Any) -> LayerProfile:
    """A profile whose visual tokens have these contributions: (sample, layer, token), token a square number."""
    n_samples, n_layers, n_tokens = contribution.shape
    world = World(
        samples=tuple(f"s{i}" for i in range(n_samples)), n_layers=n_layers, side=math.isqrt(n_tokens)
    )
    assert world.side**2 == n_tokens
    table = synthetic.tokens(world)
    table.loc[table["kind"] == "visual", "contribution"] = contribution.ravel()
    return synthetic.profile_of(table, world, **manifest)


def masses(
    n_samples: int = 12, n_layers: int = 6, n_tokens: int = 9, at: Sequence[int] = (3,), seed: int = 0
) -> np.ndarray:
    """Each sample has its own distribution, drawn anew at the layers ``at`` and nearly kept at the others."""
    rng = np.random.default_rng(seed)
    found = np.empty((n_samples, n_layers, n_tokens))
    for layer in range(n_layers):
        if layer == 0 or layer in at:
            now = rng.lognormal(sigma=1.5, size=(n_samples, n_tokens))
        found[:, layer] = now * rng.lognormal(sigma=0.15, size=now.shape) * rng.lognormal()
    return found


def naive_hellinger(p: Sequence[float], q: Sequence[float]) -> float:
    """By the overlap of the two distributions, not by their difference."""
    overlap = sum(math.sqrt(a / sum(p) * b / sum(q)) for a, b in zip(p, q, strict=True))
    return math.sqrt(max(0.0, 1 - overlap))


def naive_changes(contribution: np.ndarray) -> np.ndarray:
    return np.array(
        [
            [naive_hellinger(sample[layer - 1], sample[layer]) for layer in range(1, len(sample))]
            for sample in contribution.tolist()
        ]
    )


def naive_null(
    distances: np.ndarray, image: Sequence[int], alpha: float, seed: int, n_resamples: int
) -> pd.DataFrame:
    """Drawing images one by one, samples repeated as often as drawn; standard errors from the repeated samples."""
    excess = distances - distances.mean(axis=1, keepdims=True)
    images = sorted(set(image))

    def mean_and_error(draws: list[int]) -> tuple[np.ndarray, np.ndarray]:
        clusters = [excess[[i for i, of in enumerate(image) if of == drawn]] for drawn in draws]
        total = sum(len(cluster) for cluster in clusters)
        mean = np.concatenate(clusters).mean(axis=0)
        square = sum((cluster - mean).sum(axis=0) ** 2 for cluster in clusters)
        return mean, np.sqrt(square) / total

    mean, error = mean_and_error(images)
    counts = np.random.default_rng(seed).multinomial(
        len(images), [1 / len(images)] * len(images), n_resamples
    )
    drawn, null = [], []
    for row in counts:
        draws = [at for at, n in zip(images, row, strict=True) for _ in range(n)]
        here, spread = mean_and_error(draws)
        null.append(
            max((h - m) / s if s > 1e-7 else math.inf for h, m, s in zip(here, mean, spread, strict=True))
        )
        drawn.append(
            np.concatenate([distances[[i for i, of in enumerate(image) if of == at]] for at in draws]).mean(0)
        )
    p = [
        (1 + sum(value >= m / e for value in null)) / (1 + n_resamples)
        for m, e in zip(mean, error, strict=True)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    largest = np.bincount(np.argmax(drawn, axis=1), minlength=len(mean)) / n_resamples
    return pd.DataFrame({"low": low, "high": high, "p": p, "share_largest": largest})


class TestAgainstTheTwin:
    def test_distances(self) -> None:
        values = masses()
        found = contribution_changes(profile(values))
        assert list(found.columns) == [1, 2, 3, 4, 5]
        np.testing.assert_allclose(found, naive_changes(values.astype(np.float32)), atol=1e-6)

    @pytest.mark.parametrize("image", [list(range(8)), [0, 0, 0, 1, 1, 2, 3, 4]])
    def test_interval_and_null(self, image: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transitions, "N_RESAMPLES", 150)
        values = masses(n_samples=8)
        groups = {f"s{i}": of for i, of in enumerate(image)}
        found = transition_layers(profile(values), groups=groups, seed=3)
        twin = naive_null(naive_changes(values.astype(np.float32)), image, 0.05, 3, 150)
        for name in twin:
            np.testing.assert_allclose(found[name], twin[name], rtol=1e-4, err_msg=name)
        assert (found["n_images"] == len(set(image))).all()

    def test_null_high_is_where_p_reaches_alpha(self) -> None:
        for seed in range(4):
            found = transition_layers(profile(masses(at=(), seed=seed)), alpha=0.2, seed=seed)
            np.testing.assert_array_equal(found["p"] <= 0.2, found["distance"] >= found["null_high"])
            assert found["null_high"].gt(found["distance"].mean()).all()


class TestWhatIsFound:
    def test_planted_transitions(self) -> None:
        found = transition_layers(profile(masses(at=(2, 4))))
        assert found.loc[found["transition"], "layer"].tolist() == [2, 4]
        assert found["share_largest"].sum() == pytest.approx(1)
        assert found.set_index("layer").loc[[1, 3, 5], "p"].min() > 0.5

    def test_no_transition_where_all_changes_are_alike(self) -> None:
        """One in twenty by chance, at any layer."""
        rng = np.random.default_rng(0)
        wrong = 0
        for trial in range(60):
            distances = 0.3 + 0.05 * rng.standard_normal((15, 1)) + 0.02 * rng.standard_normal((15, 7))
            null = transitions._resampled(distances, np.arange(15), 0.05, 0.95, trial)
            wrong += bool((null["p"] <= 0.05).any())
        assert wrong <= 8  # 3 expected; more than 8 have a probability of 0.3 %

    @pytest.mark.parametrize(("n_images", "smallest"), [(2, 1 / 2), (3, 1 / 9), (4, 1 / 64), (6, 1 / 6**5)])
    def test_few_images_cannot_say_much(self, n_images: int, smallest: float) -> None:
        """A resample of one image alone, of which there are n in n^n, is as far out as any change can be."""
        distances = np.full((n_images, 6), 0.2) + 1e-3 * np.random.default_rng(0).standard_normal(
            (n_images, 6)
        )
        distances[:, 3] += 0.7
        p = transitions._resampled(distances, np.arange(n_images), 0.05, 0.95, 0)["p"][3]
        assert p == pytest.approx(smallest, abs=4 * math.sqrt(smallest / 2000) + 1 / 2000)
        assert (p <= 0.05) == (n_images >= 4)

    def test_a_slope_is_no_transition(self) -> None:
        distance = np.array([0.1, 0.3, 0.5, 0.4, 0.4, 0.1])
        assert transitions._peaks(distance).tolist() == [False, False, True, False, False, False]
        assert transitions._peaks(np.array([0.2])).tolist() == [True]
        assert transitions._peaks(np.array([0.2, 0.4, 0.4, 0.1])).tolist() == [False, True, True, False]

    def test_the_seed_decides(self) -> None:
        prof = profile(masses())
        pd.testing.assert_frame_equal(transition_layers(prof, seed=1), transition_layers(prof, seed=1))
        assert not transition_layers(prof, seed=1)["low"].equals(transition_layers(prof, seed=2)["low"])

    def test_repeats_of_an_image_are_no_new_evidence(self) -> None:
        values = masses(n_samples=6)
        repeated = np.repeat(values, 3, axis=0)
        groups = {f"s{i}": i // 3 for i in range(18)}
        once, thrice = transition_layers(profile(values)), transition_layers(profile(repeated), groups)
        columns = ["distance", "low", "high", "p", "null_high", "transition", "n_images"]
        pd.testing.assert_frame_equal(once[columns], thrice[columns], rtol=1e-6)
        assert thrice["n_samples"].eq(18).all()
        alone = transition_layers(profile(repeated))
        assert (alone["high"] - alone["low"]).lt(once["high"] - once["low"]).all()


#: Contributions of 4 tokens in 3 layers, some of them 0.
SAMPLES = st.lists(
    st.lists(
        st.lists(st.sampled_from([0.0, 1e-3, 0.2, 1.0, 30.0]), min_size=4, max_size=4), min_size=3, max_size=3
    ),
    min_size=1,
    max_size=3,
)


class TestProperties:
    @given(SAMPLES, st.permutations(range(4)), st.floats(1e-3, 1e3))
    def test_order_and_scale_do_not_matter(
        self, drawn: list[list[list[float]]], order: list[int], scale: float
    ) -> None:
        values = np.array(drawn) + np.array([1e-2, 0, 0, 0])  # no layer without any
        found = contribution_changes(profile(values)).to_numpy()
        assert ((found >= 0) & (found <= 1)).all()
        scaled = values[:, :, order] * np.array([1.0, scale, 1.0])[None, :, None]
        np.testing.assert_allclose(contribution_changes(profile(scaled)).to_numpy(), found, atol=2e-4)
        np.testing.assert_allclose(found, naive_changes(values.astype(np.float32)), atol=2e-4)

    def test_nothing_changed_and_everything_changed(self) -> None:
        same = np.tile(np.array([1.0, 2, 3, 4]), (2, 2, 1))
        np.testing.assert_allclose(contribution_changes(profile(same)), 0, atol=1e-7)
        moved = np.array([[[1.0, 2, 0, 0], [0, 0, 3, 1]]])
        np.testing.assert_allclose(contribution_changes(profile(moved)), 1, atol=1e-7)


class TestEdges:
    def test_one_sample_has_neither_interval_nor_null(self) -> None:
        found = transition_layers(profile(masses(n_samples=1)))
        assert found[["low", "high", "p", "null_high", "share_largest"]].isna().all(axis=None)
        assert not found["transition"].any()
        assert found["distance"].notna().all()

    def test_samples_of_one_image_are_one(self) -> None:
        prof = profile(masses(n_samples=3))
        found = transition_layers(prof, groups=dict.fromkeys(["s0", "s1", "s2"], "kitchen.jpg"))
        assert found["n_images"].eq(1).all()
        assert found["p"].isna().all()

    def test_models_of_few_layers(self) -> None:
        none = transition_layers(profile(masses(n_layers=1, at=())))
        assert none.empty
        assert {"layer", "distance", "p", "transition", "n_samples"} <= set(none.columns)
        one = transition_layers(profile(masses(n_layers=2, at=(1,))))
        assert one["layer"].tolist() == [1]
        assert one[["low", "high"]].notna().all(axis=None)
        assert one[["p", "null_high"]].isna().all(axis=None)
        assert not one["transition"].any()
        assert transition_layers(profile(masses(n_layers=3, at=(2,))))["transition"].tolist() == [False, True]

    def test_samples_without_a_distribution_do_not_count(self) -> None:
        values = masses(n_samples=5)
        values[2, 4] = 0
        found = transition_layers(profile(values))
        assert found["n_samples"].eq(4).all()
        kept = transition_layers(profile(np.delete(values, 2, axis=0)))
        np.testing.assert_allclose(found["distance"], kept["distance"], rtol=1e-6)
        values[:, 0] = 0
        with pytest.raises(CapaProbeError, match="no sample in which two visual tokens or more contribute"):
            transition_layers(profile(values))
        with pytest.raises(CapaProbeError, match="two visual tokens or more"):
            transition_layers(profile(masses(n_tokens=1)))

    def test_images_of_different_size(self) -> None:
        small, large = (
            synthetic.tokens(World(samples=("a", "b"))),
            synthetic.tokens(World(samples=("c",), side=6)),
        )
        prof = synthetic.profile_of(
            pd.concat([small, large], ignore_index=True), World(samples=("a", "b", "c"))
        )
        assert transition_layers(prof)["n_samples"].eq(3).all()

    def test_missing_values_and_rows(self) -> None:
        values = masses(n_samples=2)
        values[1, 3, 5] = np.nan
        with pytest.raises(CapaProbeError, match=r"contribution is missing \(NaN\).*'s1' at layer 3"):
            transition_layers(profile(values))
        with pytest.raises(CapaProbeError, match='rows="none"'):
            transition_layers(synthetic.profile(World(), rows="none"))
        table = synthetic.tokens(World())
        text = synthetic.profile_of(table[table["kind"] == "text"], World())
        with pytest.raises(CapaProbeError, match="no visual token"):
            transition_layers(text)
        gap = table[~((table["sample"] == "b") & (table["layer"] == 2))]
        with pytest.raises(CapaProbeError, match="'b' does not have as many visual tokens"):
            transition_layers(synthetic.profile_of(gap, World()))

    def test_text_and_decode_steps_do_not_matter(self) -> None:
        plain = transition_layers(synthetic.profile(World(), rows="visual"))
        pd.testing.assert_frame_equal(transition_layers(synthetic.profile(World())), plain)

    @pytest.mark.parametrize(
        "bad", [{"alpha": 0}, {"alpha": 1.5}, {"confidence": "high"}, {"seed": -1}, {"alpha": True}]
    )
    def test_arguments(self, bad: dict[str, Any]) -> None:
        (name,) = bad
        with pytest.raises(CapaProbeError, match=f"{name}="):
            transition_layers(profile(masses(n_samples=2)), **bad)
        with pytest.raises(CapaProbeError, match="groups="):
            transition_layers(profile(masses(n_samples=2)), groups=["a"])  # type: ignore[arg-type]

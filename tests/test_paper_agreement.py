"""The paper's layers beside a profile's: the facts, the comparison, and models that are not the paper's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from capa_probe.analysis import layer_ranges, paper_agreement, redundant_layers
from capa_probe.analysis.published import HADAMARD_LAYERS
from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.families import FAMILIES
from tests.synthetic import World, profile

QWEN = {"family": "qwen2_5_vl", "n_layers": 28, "d_model": 3584}


def test_the_facts_are_those_of_the_families() -> None:
    """Analyses import no model code, so the paper's layers are written down twice."""
    assert {family for family, _, _ in HADAMARD_LAYERS} == set(FAMILIES)
    for (family, n_layers, d_model), (model, layers) in HADAMARD_LAYERS.items():
        schedule = FAMILIES[family].schedule
        assert schedule is not None
        assert (schedule.model, schedule.n_layers, schedule.d_model) == (model.lower(), n_layers, d_model)
        assert schedule.hadamard_layers == layers
        assert max(layers) < n_layers


def test_the_facts_are_those_of_the_paper() -> None:
    written = {model: layer_ranges(layers) for model, layers in HADAMARD_LAYERS.values()}
    assert written == {
        "LLaVA-1.5-7B": "2-5 & 22-29",
        "Qwen2.5-VL-7B": "2-5 & 13-19",
        "InternVL3-8B": "2-4 & 14-20",
    }


@pytest.mark.parametrize(
    ("found", "both", "jaccard"),
    [
        ([4, 5, 6, 13], (4, 5, 13), 3 / 12),
        ((*range(2, 6), *range(13, 20)), (*range(2, 6), *range(13, 20)), 1.0),
        (np.array([0, 27, 27]), (), 0.0),
        ([], (), 0.0),
    ],
)
def test_layers_of_both(found: Any, both: tuple[int, ...], jaccard: float) -> None:
    agreement = paper_agreement(found, QWEN)
    assert agreement is not None
    assert agreement.model == "Qwen2.5-VL-7B"
    assert agreement.found == tuple(sorted(set(found)))
    assert agreement.both == both
    assert agreement.jaccard == pytest.approx(jaccard)


def test_the_table_of_redundant_layers_is_taken_as_it_is() -> None:
    cosines = {layer: ((0.99 if layer in (3, 4, 9) else 0.5), 0.5) for layer in range(28)}
    prof = profile(World(samples=("a", "b"), n_layers=28, side=2, cosines=cosines), **QWEN)
    agreement = paper_agreement(redundant_layers(prof), prof.manifest)
    assert agreement is not None
    assert agreement.found == (3, 4, 9)
    assert agreement.both == (3, 4)
    assert str(agreement) == (
        "The model has the sizes of Qwen2.5-VL-7B, where the paper replaces the FFN in layers 2-5 & 13-19: 2 of these "
        "11 are among the 3 found here (Jaccard index 0.17)."
    )
    assert str(paper_agreement([], QWEN)).endswith("2-5 & 13-19: none is redundant here.")


@pytest.mark.parametrize(
    "other", [{"family": "llava"}, {"n_layers": 36}, {"d_model": 2048}, {"family": None}, {"d_model": None}]
)
def test_other_models_have_nothing_to_compare_with(other: dict[str, Any]) -> None:
    assert paper_agreement([2, 3], QWEN | other) is None
    assert paper_agreement([2, 3], {}) is None


def test_what_is_refused() -> None:
    with pytest.raises(
        CapaProbeError, match="Layer 28 was given for a model of 28 layers; give layers from 0 to 27"
    ):
        paper_agreement([2, 28], QWEN)
    prof = profile(World())
    with pytest.raises(CapaProbeError, match="without the columns layer and redundant"):
        paper_agreement(prof.tokens, QWEN)

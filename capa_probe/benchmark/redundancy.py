"""Redundant FFN layers and their Hadamard factors, from calibration samples, for the experiments that need them."""

from __future__ import annotations

import pandas as pd
import torch

from capa_probe.analysis import redundant_layers
from capa_probe.benchmark.schedule import is_paper_model, published
from capa_probe.benchmark.setup import Setup
from capa_probe.profiling import profile
from capa_probe.pruning.calibrate import calibrate_hadamard
from capa_probe.pruning.ffn import HadamardFFN

_TABLE = "calibration"
_COLUMNS = ["layer", "visual_cosine", "text_cosine", "redundant", "visual_only"]


def cosines(setup: Setup) -> pd.DataFrame:
    """FFN cosine of visual and text tokens in every layer, and which are redundant, on the calibration samples."""

    def make() -> pd.DataFrame:
        prof = profile(
            setup.lvlm,
            setup.calibration,
            batch_size=setup.settings.batch_size,
            rows="none",
            probes=["ffn_cosine"],
            progress=setup.progress,
        )
        return redundant_layers(prof, eta=setup.settings.eta)[_COLUMNS]

    return setup.store.part(_TABLE, "cosines", make)


def hadamard(setup: Setup) -> HadamardFFN:
    """Factors of every layer, fitted to the calibration samples."""
    lvlm = setup.lvlm

    def make() -> dict[str, torch.Tensor]:
        fitted = calibrate_hadamard(
            lvlm,
            setup.calibration,
            range(lvlm.n_layers),
            batch_size=setup.settings.batch_size,
            progress=setup.progress,
        )
        return {str(layer): alpha for layer, alpha in fitted.alpha.items()}

    alpha = setup.store.tensors(_TABLE, "hadamard", make)
    return HadamardFFN({int(layer): factors for layer, factors in alpha.items()})


def hadamard_layers(setup: Setup) -> tuple[int, ...]:
    """The paper's Hadamard layers for its own models, and for any other those that are redundant."""
    if is_paper_model(setup.lvlm):
        return published(setup.lvlm).hadamard_layers
    table = cosines(setup)
    return tuple(int(layer) for layer in table.loc[table["redundant"], "layer"])

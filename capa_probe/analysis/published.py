"""What the paper found in its three models, to hold a profile's findings against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from capa_probe.analysis.redundancy import layer_ranges
from capa_probe.errors import CapaProbeError

#: (family, layers, d_model) to the model's name and the layers in which the paper replaces the FFN (CAPA, arXiv
#: 2602.00247). Whether the paper counts layers from 0 is not known; we read them so.
HADAMARD_LAYERS: dict[tuple[str, int, int], tuple[str, tuple[int, ...]]] = {
    ("llava", 32, 4096): ("LLaVA-1.5-7B", (*range(2, 6), *range(22, 30))),
    ("qwen2_5_vl", 28, 3584): ("Qwen2.5-VL-7B", (*range(2, 6), *range(13, 20))),
    ("internvl", 28, 3584): ("InternVL3-8B", (*range(2, 5), *range(14, 21))),
}
#: The same, to the layers at which the paper prunes: early, transition and late.
PRUNE_LAYERS: dict[tuple[str, int, int], tuple[str, tuple[int, int, int]]] = {
    ("llava", 32, 4096): ("LLaVA-1.5-7B", (5, 12, 16)),
    ("qwen2_5_vl", 28, 3584): ("Qwen2.5-VL-7B", (3, 11, 21)),
    ("internvl", 28, 3584): ("InternVL3-8B", (3, 11, 21)),
}
#: What the paper calls those layers.
STAGE_NAMES = ("early", "transition", "late")


@dataclass(frozen=True)
class PublishedLayers:
    """The paper's pruning layers for a model.

    Attributes:
        model: the paper's model.
        layers: early, transition, late; those of this model where ``scaled``.
        scaled: whether the layers are the paper's, of a deeper or shallower model of this family, in proportion to
            depth: a rough guide, which the paper does not claim.
    """

    model: str
    layers: tuple[int, ...]
    scaled: bool

    def __str__(self) -> str:
        """One sentence."""
        listed = ", ".join(f"{layer} ({name})" for layer, name in zip(self.layers, STAGE_NAMES, strict=False))
        if self.scaled:
            return f"The paper's pruning layers for {self.model}, scaled to this model's depth: {listed}."
        return f"The paper's pruning layers for {self.model}: {listed}."


def published_layers(manifest: Mapping[str, Any]) -> PublishedLayers | None:
    """The layers at which the paper prunes a model of this family.

    Args:
        manifest: of the profile; ``family``, ``n_layers`` and ``d_model`` are looked at.

    Returns:
        The paper's own layers where the model has the sizes of one of its three; otherwise those of its model of
        this family, scaled by ``round(l * n_layers / paper's layers)``, at least 1, and moved up where two fall
        together, as far as the model is deep enough. None where the paper has no model of this family.
    """
    family, n_layers, d_model = (manifest.get(name) for name in ("family", "n_layers", "d_model"))
    for (own, depth, width), (model, layers) in PRUNE_LAYERS.items():
        if own != family or not isinstance(n_layers, int):
            continue
        if (n_layers, d_model) == (depth, width):
            return PublishedLayers(model, layers, scaled=False)
        found: list[int] = []
        for layer in layers:
            scaled = max([1, *(before + 1 for before in found), round(layer * n_layers / depth)])
            if scaled < n_layers:
                found.append(scaled)
        return PublishedLayers(model, tuple(found), scaled=True)
    return None


@dataclass(frozen=True)
class PaperAgreement:
    """The redundant layers of a profile beside those in which the paper replaces the FFN of the same model.

    Attributes:
        model: the paper's model, recognised by family, number of layers and width; fine-tunes share those.
        paper: the paper's layers.
        found: redundant layers of the profile.
        both: layers in both.
        jaccard: layers in both / layers in either.
    """

    model: str
    paper: tuple[int, ...]
    found: tuple[int, ...]
    both: tuple[int, ...]
    jaccard: float

    def __str__(self) -> str:
        """One sentence."""
        if not self.found:
            share = "none is redundant here"
        else:
            share = (
                f"{len(self.both)} of these {len(self.paper)} are among the {len(self.found)} found here "
                f"(Jaccard index {self.jaccard:.2f})"
            )
        return (
            f"The model has the sizes of {self.model}, where the paper replaces the FFN in layers "
            f"{layer_ranges(self.paper)}: {share}."
        )


def paper_agreement(
    layers: pd.DataFrame | Iterable[int], manifest: Mapping[str, Any]
) -> PaperAgreement | None:
    """Whether the redundant layers are those of the paper.

    Args:
        layers: what :func:`capa_probe.redundant_layers` returned, or the redundant layers themselves.
        manifest: of the profile; ``family``, ``n_layers`` and ``d_model`` are looked at.

    Returns:
        The comparison; None where the model does not have the sizes of one of the paper's three.

    Raises:
        CapaProbeError: ``layers`` is neither, or names a layer that the model does not have.
    """
    key = manifest.get("family"), manifest.get("n_layers"), manifest.get("d_model")
    found = _found(layers)
    if key not in HADAMARD_LAYERS:
        return None
    model, paper = HADAMARD_LAYERS[key]
    outside = [layer for layer in found if not 0 <= layer < key[1]]
    if outside:
        raise CapaProbeError(
            f"Layer {outside[0]} was given for a model of {key[1]} layers; give layers from 0 to {key[1] - 1}."
        )
    both = tuple(sorted(set(found) & set(paper)))
    return PaperAgreement(model, paper, found, both, len(both) / len(set(found) | set(paper)))


def _found(layers: pd.DataFrame | Iterable[int]) -> tuple[int, ...]:
    if not isinstance(layers, pd.DataFrame):
        return tuple(sorted({int(layer) for layer in layers}))
    if not {"layer", "redundant"} <= set(layers.columns):
        raise CapaProbeError(
            "paper_agreement was given a table without the columns layer and redundant; give what redundant_layers "
            "returned, or the layers themselves."
        )
    found = layers["layer"].to_numpy(np.int64)[layers["redundant"].to_numpy(np.bool_)]
    return tuple(sorted(found.tolist()))

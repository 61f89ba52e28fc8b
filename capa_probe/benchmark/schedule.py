"""At which layers a model is pruned early, at the transition and late: as published, or in proportion to its depth."""

from __future__ import annotations

from capa_probe.lvlm import HookedLVLM
from capa_probe.pruning.capa import STAGES

#: Layers and width of the checkpoints that the paper's schedules are for, by family.
_PAPER_SIZES = {"llava": (32, 4096), "qwen2_5_vl": (28, 3584), "internvl": (28, 3584)}


def is_paper_model(lvlm: HookedLVLM) -> bool:
    """Whether a model has the sizes of one of the paper's three (a fine-tune of it has them too)."""
    return _PAPER_SIZES.get(lvlm.family.name) == (lvlm.n_layers, lvlm.d_model)


def stage_layers(lvlm: HookedLVLM) -> dict[str, int]:
    """Pruning layer of each stage: "early", "transition" and "late".

    Of the paper's models the published ones. Of any other, those of its family's model in the paper, scaled to its
    depth: ``round(l * layers / paper's layers)``, at least 1, and moved up where two would fall together. A model
    of fewer than four layers has fewer stages.
    """
    published = lvlm.family.schedule.prune_layers
    if is_paper_model(lvlm):
        return dict(zip(STAGES, published, strict=True))
    depth, found = _PAPER_SIZES[lvlm.family.name][0], dict[str, int]()
    for stage, layer in zip(STAGES, published, strict=True):
        least = max([1, *(before + 1 for before in found.values())])
        scaled = max(least, round(layer * lvlm.n_layers / depth))
        if scaled < lvlm.n_layers:
            found[stage] = scaled
    return found

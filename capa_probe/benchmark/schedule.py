"""At which layers a model is pruned early, at the transition and late: as published, or in proportion to its depth."""

from __future__ import annotations

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM
from capa_probe.lvlm.families import PaperSchedule
from capa_probe.pruning.capa import STAGES


def published(lvlm: HookedLVLM) -> PaperSchedule:
    """The paper's schedule for a model of its family.

    Raises:
        CapaProbeError: the paper has no model of this family.
    """
    found = lvlm.family.schedule
    if found is None:
        raise CapaProbeError(
            f"A layer of the published schedule was asked for, but the paper has no {lvlm.family.name} model; give "
            "layers."
        )
    return found


def is_paper_model(lvlm: HookedLVLM) -> bool:
    """Whether a model has the sizes of one of the paper's three (a fine-tune of it has them too)."""
    plan = lvlm.family.schedule
    return plan is not None and (plan.n_layers, plan.d_model) == (lvlm.n_layers, lvlm.d_model)


def stage_layers(lvlm: HookedLVLM) -> dict[str, int]:
    """Pruning layer of each stage: "early", "transition" and "late".

    Of the paper's models the published ones. Of any other, those of its family's model in the paper, scaled to its
    depth: ``round(l * layers / paper's layers)``, at least 1, and moved up where two would fall together. A model
    of fewer than four layers has fewer stages.

    Raises:
        CapaProbeError: the paper has no model of this family.
    """
    plan, found = published(lvlm), dict[str, int]()
    if is_paper_model(lvlm):
        return dict(zip(STAGES, plan.prune_layers, strict=True))
    for stage, layer in zip(STAGES, plan.prune_layers, strict=True):
        least = max([1, *(before + 1 for before in found.values())])
        scaled = max(least, round(layer * lvlm.n_layers / plan.n_layers))
        if scaled < lvlm.n_layers:
            found[stage] = scaled
    return found

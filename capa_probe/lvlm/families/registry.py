"""The registry of model families. A new one is one file beside this one, and one line here."""

from __future__ import annotations

from transformers import PreTrainedConfig

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.families.base import Family
from capa_probe.lvlm.families.internvl import InternVL
from capa_probe.lvlm.families.llava import Llava
from capa_probe.lvlm.families.qwen2_5_vl import Qwen25VL

#: Every supported family, by ``config.model_type``.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Llava(),
        Qwen25VL(),
        InternVL(),
    )
}


def family_of(config: PreTrainedConfig, given: str = "The model") -> Family:
    """The family of a model's config.

    Raises:
        CapaProbeError: none of the supported ones.
    """
    family = FAMILIES.get(config.model_type)
    architectures = config.architectures or []
    if family is None or (architectures and family.architecture not in architectures):
        kind = f"{config.model_type} ({architectures[0]})" if architectures else config.model_type
        known = ", ".join(f"{each.name} (such as {each.example})" for each in FAMILIES.values())
        raise CapaProbeError(
            f"{given} is of type {kind}; supported are {known}; to add a family, write one file in "
            "capa_probe/lvlm/families."
        )
    family.check(config)
    return family

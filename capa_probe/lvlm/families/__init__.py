"""The supported model families, one file for each; ``registry.py`` names them."""

from capa_probe.lvlm.families.base import Family, PaperSchedule, Tiling
from capa_probe.lvlm.families.registry import FAMILIES, family_of

__all__ = ["FAMILIES", "Family", "PaperSchedule", "Tiling", "family_of"]

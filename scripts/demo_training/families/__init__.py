"""The families that have a demo model. A new one is one file here, and one line below."""

from __future__ import annotations

from demo_training.families.base import DemoFamily, Grid, Layout, Sizes
from demo_training.families.internvl import InternVL
from demo_training.families.llava import Llava
from demo_training.families.qwen2_5_vl import Qwen25VL

FAMILIES: dict[str, DemoFamily] = {family.name: family for family in (Llava(), Qwen25VL(), InternVL())}

__all__ = ["FAMILIES", "DemoFamily", "Grid", "Layout", "Sizes"]

"""Build hook: a wheel carries the demo model and its test questions; an editable install needs no copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = ("demo-lvlm", "shapesqa")


class DemoDataHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds ``data/demo-lvlm`` and ``data/shapesqa`` to the wheel as ``capa_probe/_data``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        for name in SHIPPED:
            folder = Path(self.root) / "data" / name
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"data/{name} is missing, so the wheel would have no demo; check out all of data/."
                )
            build_data["force_include"][str(folder)] = f"capa_probe/_data/{name}"

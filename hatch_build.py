"""Build hook: a wheel carries the demo models and their questions; an editable install needs no copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

#: Without these there is no demo; whatever else lies in data/ comes along.
NEEDED = ("demo-lvlm", "shapesqa")


class DemoDataHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the folders of ``data`` to the wheel, as ``capa_probe/_data``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        data = Path(self.root) / "data"
        for name in NEEDED:
            if not (data / name).is_dir():
                raise FileNotFoundError(
                    f"data/{name} is missing, so the wheel would have no demo; check out all of data/."
                )
        for folder in sorted(path for path in data.iterdir() if path.is_dir()):
            build_data["force_include"][str(folder)] = f"capa_probe/_data/{folder.name}"

"""Where the demo models and their questions lie: in ``data/`` of a checkout, inside the package when installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from capa_probe.errors import CapaProbeError


@dataclass(frozen=True)
class DemoModel:
    """A demo model.

    Attributes:
        folder: its name in ``data/``.
        world: what it was trained on, and is asked about.
    """

    folder: str
    world: str


#: By family.
DEMO_MODELS: Mapping[str, DemoModel] = {
    "llava": DemoModel("demo-lvlm", "rich"),
    "qwen2.5-vl": DemoModel("demo-qwen2.5-vl", "wide"),
    "internvl": DemoModel("demo-internvl", "wide"),
}
#: World -> folder of its splits.
_FOLDERS = {"rich": "shapesqa", "wide": "shapesqa-wide"}
_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parent / "data"
_INSTALLED = _PACKAGE / "_data"


def demo_model_path(family: str = "llava") -> Path:
    """Folder of a demo model, in Hugging Face format.

    Args:
        family: "llava", "qwen2.5-vl" or "internvl".

    Raises:
        CapaProbeError: there is no such model, or it does not lie where it should.
    """
    if family not in DEMO_MODELS:
        raise CapaProbeError(f"family={family!r} was given; give one of {', '.join(DEMO_MODELS)}.")
    return _find(DEMO_MODELS[family].folder, "config.json")


def demo_data_path(split: str = "test", world: str = "rich") -> Path:
    """Data folder of a shipped ShapesQA split.

    Args:
        split: "test" or "calibration".
        world: "rich", or "wide" with its boards of many sizes and shapes.

    Raises:
        CapaProbeError: there is no such split, or it does not lie where it should.
    """
    if split not in ("test", "calibration"):
        raise CapaProbeError(f'split={split!r} was given; "test" and "calibration" are shipped.')
    if world not in _FOLDERS:
        raise CapaProbeError(f"world={world!r} was given; shipped are {' and '.join(map(repr, _FOLDERS))}.")
    return _find(f"{_FOLDERS[world]}/{split}", "samples.jsonl")


def _find(name: str, marker: str) -> Path:
    for root in (_CHECKOUT, _INSTALLED):
        if (root / name / marker).is_file():
            return root / name
    raise CapaProbeError(
        f"{name} lies neither in {_CHECKOUT} nor in {_INSTALLED}; clone the project again or reinstall capa-probe."
    )

"""Where the demo model and its questions lie: in ``data/`` of a checkout, inside the package when installed."""

from __future__ import annotations

from pathlib import Path

from capa_probe.errors import CapaProbeError

#: World -> folder of its splits.
_FOLDERS = {"rich": "shapesqa", "wide": "shapesqa-wide"}
_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parent / "data"
_INSTALLED = _PACKAGE / "_data"


def demo_model_path() -> Path:
    """Folder of the demo model, in Hugging Face format.

    Raises:
        CapaProbeError: it is not there.
    """
    return _find("demo-lvlm", "config.json")


def demo_data_path(split: str = "test", world: str = "rich") -> Path:
    """Data folder of a shipped ShapesQA split.

    Args:
        split: "test" or "calibration".
        world: "rich", or "wide" with its boards of many sizes and shapes.

    Raises:
        CapaProbeError: it is not there.
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

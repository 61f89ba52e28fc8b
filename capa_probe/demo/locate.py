"""Where the demo model and its questions lie: in ``data/`` of a checkout, inside the package when installed."""

from __future__ import annotations

from pathlib import Path

from capa_probe.errors import CapaProbeError

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parent / "data"
_INSTALLED = _PACKAGE / "_data"


def demo_model_path() -> Path:
    """Folder of the demo model, in Hugging Face format.

    Raises:
        CapaProbeError: it is not there.
    """
    return _find("demo-lvlm", "config.json")


def demo_data_path(split: str = "test") -> Path:
    """Data folder of a shipped ShapesQA split, "test" or "calibration".

    Raises:
        CapaProbeError: it is not there.
    """
    if split not in ("test", "calibration"):
        raise CapaProbeError(f'split={split!r} was given; "test" and "calibration" are shipped.')
    return _find(f"shapesqa/{split}", "samples.jsonl")


def _find(name: str, marker: str) -> Path:
    for root in (_CHECKOUT, _INSTALLED):
        if (root / name / marker).is_file():
            return root / name
    raise CapaProbeError(
        f"{name} lies neither in {_CHECKOUT} nor in {_INSTALLED}; clone the project again or reinstall capa-probe."
    )

"""``import capa_probe`` is quick, names everything, and loads the heavy packages only when they are used."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from types import FunctionType, ModuleType

import pytest

import capa_probe as cp

HEAVY = (
    "torch",
    "transformers",
    "transformer_lens",
    "pandas",
    "numpy",
    "pyarrow",
    "matplotlib",
    "seaborn",
    "PIL",
    "datasets",
)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_takes_well_under_half_a_second() -> None:
    def seconds(code: str) -> float:
        start = time.perf_counter()
        run_python(code)
        return time.perf_counter() - start

    # The best of several, less the interpreter's own start: other work on the machine only ever adds.
    bare = min(seconds("pass") for _ in range(3))
    assert min(seconds("import capa_probe") for _ in range(3)) - bare < 0.25


def test_import_and_listing_load_nothing_heavy() -> None:
    code = (
        f"import sys, capa_probe; dir(capa_probe); print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert run_python(code) == "[]"


@pytest.mark.parametrize("name", cp.__all__)
def test_every_public_name_is_there_and_listed(name: str) -> None:
    assert name in dir(cp)
    assert getattr(cp, name) is getattr(importlib.import_module("capa_probe"), name)


def test_what_the_names_are() -> None:
    assert isinstance(cp.profile, FunctionType)
    assert isinstance(cp.measures, ModuleType)
    assert isinstance(cp.HookedLVLM, type)
    assert issubclass(cp.CapaProbeError, ValueError)
    # Importing the modules behind the names must not put modules in their place.
    code = "import capa_probe.profiling, capa_probe as cp; print(callable(cp.profile))"
    assert run_python(code) == "True"


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'capa_probe' has no attribute 'profiles'"):
        _ = cp.profiles

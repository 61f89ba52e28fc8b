"""What every test needs before anything heavy is imported."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Test processes side by side, and what they start, have one thread each: more wait for each other most of the time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import jaxtyping
import pytest
import torch

# In tests only, the shapes and dtypes that the measures are annotated with are checked on every call.
with jaxtyping.install_import_hook("capa_probe.measures", "beartype.beartype"):
    import capa_probe.measures  # noqa: F401

# No deadline: model code on a shared machine is slow now and then. CI draws the same examples each time.
hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("default"), derandomize=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)

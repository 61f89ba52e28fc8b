"""Kills profiling runs of a tiny model, for tests/test_resume.py; a process of its own, so that it may fork.

Prints one JSON object: for each trial what was there when the run died, and what the resumed run made of it.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import capa_probe as cp
from capa_probe import writing
from tests import forking, processors, tiny
from tests.forking import die_at

N_SAMPLES = 12
torch.set_num_threads(1)  # threads do not survive a fork
writing.ROWS_PER_PART = 300


def profile(out: Path, overwrite: bool = False) -> None:
    lvlm = cp.HookedLVLM(tiny.build("llava"), processors.shared("llava"))
    samples = [
        cp.Sample(f"q{n}", Image.new("RGB", (16, 16), (10 * n, 0, 255 - n)), "what" + " now" * (n % 5))
        for n in range(N_SAMPLES)
    ]
    for n in (5, N_SAMPLES - 1):  # left out, before the kill or after it
        samples[n] = cp.Sample(f"gone{n}", out / f"gone{n}.png", "what?")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        cp.profile(lvlm, samples, out, steps=1, batch_size=2, rows="all", progress=False, overwrite=overwrite)


def in_child(out: Path, prepare: Callable[[], Any], overwrite: bool = False, **options: Any) -> str:
    """Profile in a forked process (see ``forking.in_child``)."""

    def work() -> None:
        prepare()
        profile(out, overwrite)

    return forking.in_child(work, **options)


def small_disk(size: int) -> Callable[[], None]:
    """Let no file grow beyond a size, as on a full disk."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


def nothing() -> None:
    pass


def parts(out: Path) -> dict[str, tuple[int, int]]:
    """Finished token parts: a part counts once its summary is there too."""
    finished = {file.name for file in (out / "layers").glob("*.parquet")}
    if (out / "manifest.json").exists():
        finished |= {file.name for file in (out / "tokens").glob("*.parquet")}
    files = [file for file in (out / "tokens").glob("*.parquet") if file.name in finished]
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def content(out: Path) -> dict[str, str]:
    """Every file of a finished run, byte for byte; the manifest without what may differ."""
    found = {
        str(file.relative_to(out)): file.read_bytes().hex()
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.name not in ("manifest.json", ".lock")
    }
    manifest = json.loads((out / "manifest.json").read_text())
    # The missing image is named with its folder.
    manifest["skipped"] = [entry["sample"] for entry in manifest["skipped"]]
    return found | {
        "manifest": json.dumps({k: manifest[k] for k in manifest if k not in ("created", "seconds")})
    }


def trial(
    name: str, out: Path, whole: Any, prepare: Callable[[], Any] = nothing, **options: Any
) -> dict[str, Any]:
    """Stop a run, then run it again as if nothing had happened."""
    first = in_child(out, prepare, **options)
    before = parts(out)
    again = in_child(out, nothing)
    after = parts(out)
    result = {
        "trial": name,
        "first": first,
        "parts_before": len(before),
        "again": again,
        "kept": all(after.get(part) == stamp for part, stamp in before.items()),
        "equal": again == "done" and content(out) == whole,
    }
    shutil.rmtree(out)
    return result


def main(folder: Path, n_random: int) -> None:
    out = folder / "run"
    cp.HookedLVLM(tiny.shared("llava"), processors.shared("llava"))  # everything is imported before the forks
    started = time.perf_counter()
    assert in_child(out, nothing) == "done"
    seconds = time.perf_counter() - started
    whole, n_parts = content(out), len(parts(out))
    shutil.rmtree(out)

    trials: list[dict[str, Any]] = []
    rng = random.Random(0)
    for _ in range(n_random):
        after = rng.uniform(0.1, 0.9) * seconds
        trials.append(trial(f"kill -9 after {after:.2f} s", out, whole, after=after))
    trials.append(trial("Ctrl-C", out, whole, after=0.5 * seconds, send=signal.SIGINT))
    for call in range(1, 1000, 3):
        trials.append(trial(f"kill -9 at call {call}", out, whole, die_at(call)))
        if trials[-1]["first"] == "done":
            break
    sizes = (0, 400, 4000, 30_000)
    trials += [trial(f"files up to {size} bytes", out, whole, small_disk(size)) for size in sizes]
    for call in range(1, 30, 4):
        assert in_child(out, nothing) == "done"
        trials.append(
            trial(f"kill -9 at call {call} of an overwriting run", out, whole, die_at(call), overwrite=True)
        )
    json.dump({"n_parts": n_parts, "seconds": seconds, "trials": trials}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

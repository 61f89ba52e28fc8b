"""Kills calibrations of a tiny model, for tests/test_ffn_resume.py; a process of its own, so that it may fork.

Prints one JSON list: for each trial how the run ended, whether it had left a state, and what the resumed run made.
"""

from __future__ import annotations

import json
import random
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
from capa_probe.pruning import calibration_run
from tests import forking, processors, tiny
from tests.forking import die_at

torch.set_num_threads(1)  # threads do not survive a fork
calibration_run.SECONDS_BETWEEN_STATES = 0.0
N_SAMPLES = 10


def calibrate(out: Path) -> None:
    lvlm = cp.HookedLVLM(tiny.build("llava"), processors.shared("llava"))
    samples = [
        cp.Sample(f"q{n}", Image.new("RGB", (16, 16), (20 * n, 0, 255 - n)), "what" + " now" * (n % 4))
        for n in range(N_SAMPLES)
    ]
    samples[6] = cp.Sample("gone", "/nowhere/gone.png", "what?")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cp.calibrate_hadamard(lvlm, samples, [0, 2], out=out, batch_size=2, progress=False)


def in_child(out: Path, prepare: Callable[[], Any], **options: Any) -> str:
    """Calibrate in a forked process (see ``forking.in_child``)."""

    def work() -> None:
        prepare()
        calibrate(out)

    return forking.in_child(work, **options)


def main(folder: Path) -> None:
    out = folder / "alpha.safetensors"
    state = calibration_run.state_file(out)
    calibrate(folder / "warm-up")  # everything is imported before the forks
    started = time.perf_counter()
    assert in_child(out, lambda: None) == "done"
    seconds = time.perf_counter() - started
    whole = out.read_bytes()
    out.unlink()
    rng = random.Random(0)
    stops: list[dict[str, Any]] = [
        {"after": rng.uniform(0.2, 0.9) * seconds, "send": signal.SIGKILL} for _ in range(4)
    ]
    stops += [{"after": 0.6 * seconds, "send": signal.SIGINT}]
    stops += [{"prepare": die_at(number)} for number in range(1, 40, 2)]
    trials = []
    for stop in stops:
        first = in_child(out, stop.pop("prepare", lambda: None), **stop)
        left = json.loads(state_header(state))["progress"]["seen"] if state.exists() else 0
        finished = out.exists()
        again = in_child(out, lambda: None)
        trials.append(
            {
                "first": first,
                "left": left,
                "finished": finished,
                "again": again,
                "equal": out.exists() and out.read_bytes() == whole,
                "beside": sorted(p.name for p in folder.iterdir() if p.suffix in (".tmp", ".unfinished")),
            }
        )
        out.unlink(missing_ok=True)
    json.dump(trials, sys.stdout)


def state_header(state: Path) -> str:
    """The JSON in a state's header, read by hand: 8 bytes of length, then the header itself."""
    content = state.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return str(header["__metadata__"]["capa_probe.calibration"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Whether a long profile stays as fast as it begins, and its memory flat: 200 questions to the demo model.

One call of ``cp.profile`` takes its samples from a generator that notes the time and the resident memory whenever
another one is asked for. The same questions are repeated, under other names, until there are enough.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from _machine import machine, resident
from _overhead_rounds import RESULTS, Results

import capa_probe as cp
from capa_probe.samples import load_samples

DATA = Path(__file__).parents[1] / "data"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DATA / "demo-lvlm")
    parser.add_argument("--data", type=Path, default=DATA / "shapesqa" / "test")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1, help="in all, those in --out among them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "probe_throughput.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    lvlm = cp.HookedLVLM.from_pretrained(arguments.model)
    questions = list(load_samples(arguments.data))
    dtype = str(lvlm.model.dtype).removeprefix("torch.")
    settings = {
        "machine": machine("cpu", dtype, ["transformer-lens"]),
        "model": "demo-lvlm",
        "samples": arguments.samples,
        "steps": arguments.steps,
    }
    results = Results(arguments.out)
    while results.rounds(settings) < arguments.rounds:
        notes: list[tuple[float, float, int]] = []

        def samples(notes: list[tuple[float, float, int]] = notes) -> Iterator[cp.Sample]:
            cycle = itertools.cycle(questions)
            for number, sample in enumerate(itertools.islice(cycle, arguments.samples)):
                notes.append((time.perf_counter(), time.process_time(), resident()))
                yield replace(sample, id=f"{number}-{sample.id}")

        with tempfile.TemporaryDirectory() as folder:
            cp.profile(lvlm, list(samples())[:2], progress=False)  # warms up
            notes.clear()
            gc.collect()
            cp.profile(lvlm, samples(), out=Path(folder) / "run", steps=arguments.steps, progress=False)
            notes.append((time.perf_counter(), time.process_time(), resident()))
        pairs = list(itertools.pairwise(notes))
        measured = {
            "wall": [after[0] - before[0] for before, after in pairs],
            "cpu": [after[1] - before[1] for before, after in pairs],
            "resident": [after[2] for _, after in pairs],
        }
        results.add(settings, {"profile": measured})
    entry = next(entry for entry in results.entries if entry["settings"] == settings)
    for found in entry["rounds"]["profile"]:
        print(summary(found))


def ends(values: list[float]) -> tuple[float, float]:
    """Medians of the first and of the last quarter, the very first sample left out."""
    quarter = max(1, len(values) // 4)
    return median(values[1 : quarter + 1]), median(values[-quarter:])


def summary(found: dict[str, list[float]]) -> str:
    """A round in a line."""
    (first, last), (before, after) = ends(found["cpu"]), ends(found["resident"])
    return (
        f"{len(found['cpu'])} samples: {1000 * first:.1f} ms of CPU each in the first quarter, {1000 * last:.1f} ms in "
        f"the last ({last / first:.3f} x); resident {before / 1e6:.1f} MB, then {after / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()

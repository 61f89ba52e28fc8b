"""Kills confirmations of a tiny model, for tests/test_confirm.py; a process of its own, so that it may fork.

Prints one JSON object: for each trial how the first run ended, how many parts it left, how many of them the resumed run
kept as they were, and whether its tables are those of an undisturbed run.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

import capa_probe as cp
from capa_probe.benchmark.confirm import confirm
from capa_probe.benchmark.setup import Settings
from capa_probe.benchmark.store import read_tables
from tests import forking, processors, tiny
from tests.forking import die_at

torch.set_num_threads(1)  # threads do not survive a fork
EXPERIMENTS = "budget,ffn_redundancy"
#: Columns that say how long something took.
TIMED = ["seconds"]


def samples(n: int = 8) -> list[cp.Sample]:
    return [
        cp.Sample(f"q{i}", Image.new("RGB", (16, 16), (20 * i, 0, 255 - i)), "what" + " now" * (i % 3), "a")
        for i in range(n)
    ]


def run(out: Path) -> None:
    lvlm = cp.HookedLVLM(tiny.build("llava"), processors.shared("llava"))
    settings = Settings(batch_size=4, max_new_tokens=2, draws=2, keeps=(0.5,), layers=(1,), eta=-0.5)
    confirm(lvlm, samples(), out, experiments=EXPERIMENTS, settings=settings, progress=False)


def in_child(out: Path, prepare: Callable[[], Any] = lambda: None) -> str:
    def work() -> None:
        prepare()
        run(out)

    return forking.in_child(work)


def parts(out: Path) -> dict[str, tuple[int, int]]:
    files = [file for file in (out / "parts").rglob("*") if file.suffix in (".parquet", ".safetensors")]
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def tables(out: Path) -> dict[str, pd.DataFrame]:
    return {
        name: table.drop(columns=[column for column in TIMED if column in table])
        for name, table in read_tables(out).items()
    }


def main(folder: Path, step: int) -> None:
    out = folder / "run"
    cp.HookedLVLM(tiny.shared("llava"), processors.shared("llava"))  # everything is imported before the forks
    assert in_child(out) == "done"
    whole, n_parts = tables(out), len(parts(out))
    shutil.rmtree(out)
    trials: list[dict[str, Any]] = []
    for call in range(1, 1000, step):
        first = in_child(out, die_at(call))
        before = parts(out)
        again = in_child(out)
        after = parts(out)
        found = tables(out)
        trials.append(
            {
                "call": call,
                "first": first,
                "parts_before": len(before),
                "kept": all(after.get(part) == stamp for part, stamp in before.items()),
                "again": again,
                "equal": list(found) == list(whole)
                and all(found[name].equals(whole[name]) for name in whole),
            }
        )
        shutil.rmtree(out)
        if first == "done":
            break
    json.dump({"n_parts": n_parts, "trials": trials}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

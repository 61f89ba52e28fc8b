"""How much memory a profile takes beyond the plain forward, by the length of the prompt, beside other ways.

Each variant and length has a process of its own, which runs a short prompt first and gives freed memory back to the
system. Extra memory is the highest resident memory during the variant, less that during the plain forward. A process
that would need more than ``--limit-gb`` beyond the model gets an allocation error instead, which is what is then noted.
On Linux only, where a process can be asked for its highest resident memory since a moment.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _machine import machine, reset_peak, resident
from _overhead_models import add_sizes, build, prompt
from _overhead_rounds import RESULTS, Results
from _overhead_variants import TITLES, Variant, available, variants
from torch import Tensor

from capa_probe.errors import CapaProbeError

#: Freed memory goes back to the system at once, so that what is resident is what is in use.
_TIGHT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak(run: Variant, prompts: list[dict[str, Tensor]]) -> int:
    """Bytes that a variant takes at its highest, beyond what is resident before it."""
    gc.collect()
    before = resident()
    reset_peak()
    run(prompts)
    return resident("VmHWM") - before


def measure(arguments: argparse.Namespace, name: str, tokens: int) -> dict[str, Any]:
    """What one variant takes at one length, in this process."""
    model = build(arguments.layers, arguments.width, arguments.heads, arguments.kv_heads)
    runs = variants(model, list(dict.fromkeys(["plain", name])))
    prompts = [prompt(tokens, 0, model)]
    for run in runs.values():
        run([prompt(64 + 576, 0, model)])  # what is imported late, and thread pools
    runs["plain"](prompts)
    plain = peak(runs["plain"], prompts)
    limit = resident("VmSize") + int(arguments.limit_gb * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        highest = peak(runs[name], prompts)
    except (RuntimeError, MemoryError, CapaProbeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        return {"plain": plain, "extra": None, "failed": f"more than {arguments.limit_gb:g} GB"}
    return {"plain": plain, "extra": highest - plain, "failed": None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_sizes(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[608, 1024, 2048, 4096, 8192])
    parser.add_argument("--variants", nargs="+", default=["all"], choices=["all", *TITLES])
    parser.add_argument("--limit-gb", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3, help="in all, those in --out among them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "probe_memory.json")
    parser.add_argument(
        "--one", nargs=2, metavar=("VARIANT", "TOKENS"), help="measure this here and print it"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(measure(arguments, arguments.one[0], int(arguments.one[1]))))
        return

    names = [name for name in available(arguments.variants) if name != "plain"]
    packages = ["transformer-lens", *(["nnsight"] if "nnsight" in names else [])]
    results = Results(arguments.out)
    sizes = ("layers", "width", "heads", "kv_heads")
    for tokens in arguments.tokens:
        for name in names:
            settings = {
                "machine": machine("cpu", "float32", packages),
                **{size: getattr(arguments, size) for size in sizes},
                "tokens": tokens,
                "variant": name,
                "limit_gb": arguments.limit_gb,
            }
            while results.rounds(settings) < arguments.rounds:
                command = [sys.executable, __file__, "--one", name, str(tokens)]
                for option in (*sizes, "limit_gb", "threads"):
                    command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
                done = subprocess.run(
                    command, env={**os.environ, **_TIGHT}, capture_output=True, text=True, check=False
                )
                if done.returncode:
                    raise SystemExit(f"{name} at {tokens} tokens failed:\n{done.stderr}")
                found = json.loads(done.stdout.splitlines()[-1])
                results.add(settings, {name: found})
                extra = found["failed"] or f"{found['extra'] / 1e6:,.1f} MB extra"
                print(f"{tokens:6,} tokens  {name:26s} {extra}", flush=True)


if __name__ == "__main__":
    main()

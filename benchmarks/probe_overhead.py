"""How much longer a profile takes than the plain forward, beside other ways to the same numbers.

One model with random weights, all layers, the same prompts. The variants take turns in one process, every other round
backwards, and a ratio is one within a round, so that a drift of the machine's speed hits both. A round of a profile is
one call over all prompts, with its tables written to disk. Profiles take turns with the plain forward for ``--rounds``
rounds, other tools, some of which take several times as long, for ``--rounds-of-others``. Rounds that the results file
holds already count.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict
from pathlib import Path

import torch
from _machine import keep_freed_memory, machine
from _overhead_models import add_sizes, build, prompt
from _overhead_rounds import RESULTS, Results, in_turn, quartiles, ratios
from _overhead_variants import TITLES, available, variants
from _speed_rounds import timed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_sizes(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[608, 2048, 2336])
    parser.add_argument("--call-tokens", type=int, default=2432, help="prompts of one call, in tokens, about")
    parser.add_argument("--rounds", type=int, default=30, help="in all, those in --out among them")
    parser.add_argument("--rounds-of-others", type=int, default=8)
    parser.add_argument("--variants", nargs="+", default=["all"], choices=["all", *TITLES])
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "probe_overhead.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()

    names = available(["plain", *arguments.variants])
    model = build(arguments.layers, arguments.width, arguments.heads, arguments.kv_heads)
    model = model.to(arguments.device, getattr(torch, arguments.dtype))
    runs = variants(model, names)
    packages = ["transformer-lens", *(["nnsight"] if "nnsight" in names else [])]
    results = Results(arguments.out)
    ours = [name for name in names if name.startswith(("plain", "profile"))]
    others = ["plain", *(name for name in names if name not in ours)]
    turns = [(ours, arguments.rounds), (others, arguments.rounds_of_others)]
    for tokens, (names, rounds) in itertools.product(arguments.tokens, turns):
        if names == ["plain"]:
            continue
        settings = {
            "machine": machine(arguments.device, arguments.dtype, packages),
            "layers": arguments.layers,
            "width": arguments.width,
            "heads": arguments.heads,
            "kv_heads": arguments.kv_heads,
            "tokens": tokens,
            "samples": max(1, arguments.call_tokens // tokens),
            "variants": names,
        }
        prompts = [prompt(tokens, seed, model) for seed in range(settings["samples"])]
        if results.rounds(settings) < rounds:
            for name in names:  # warms up
                runs[name](prompts[:1])
        while (number := results.rounds(settings)) < rounds:
            measured = {}
            for name in in_turn(names, number):
                with timed() as seconds:
                    runs[name](prompts)
                measured[name] = asdict(seconds)
            results.add(settings, {name: measured[name] for name in names})
        entry = next(entry for entry in results.entries if entry["settings"] == settings)
        print(f"{tokens:,} tokens, {len(entry['rounds']['plain'])} rounds, {arguments.threads} threads")
        for name in names:
            on_clock, on_cpu = (quartiles(ratios(entry, name, clock)) for clock in ("wall", "cpu"))
            print(
                f"  {name:26s} {on_clock[1]:6.3f} x ({on_clock[0]:.3f} to {on_clock[2]:.3f}) on the clock, "
                f"{on_cpu[1]:6.3f} x ({on_cpu[0]:.3f} to {on_cpu[2]:.3f}) of CPU time",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""How much longer a profile of decode steps takes than plain generation of as many tokens.

Greedy, on a model with random weights whose answers never end early; the two take turns in one process. Plain
generation makes ``--steps`` + 1 tokens, as many forwards as the profile has: a prefill and ``--steps`` decode steps.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from _machine import keep_freed_memory, machine
from _overhead_models import add_sizes, build, prompt
from _overhead_rounds import RESULTS, Results, in_turn, ratios, spread
from _overhead_variants import Variant, profiled
from _speed_rounds import timed
from torch import Tensor

import capa_probe as cp


def generation(model: torch.nn.Module, steps: int) -> Variant:
    """Plain greedy generation."""

    def over(prompts: list[dict[str, Tensor]]) -> None:
        with torch.no_grad():
            for inputs in prompts:
                out = model.generate(**inputs, max_new_tokens=steps + 1, do_sample=False)
                if out.shape[1] != inputs["input_ids"].shape[1] + steps + 1:
                    raise SystemExit("An answer ended early.")

    return over


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_sizes(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[608])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30, help="in all, those in --out among them")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "probe_decode.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()

    sizes = ("layers", "width", "heads", "kv_heads")
    model = build(*(getattr(arguments, size) for size in sizes))
    model = model.to(arguments.device, getattr(torch, arguments.dtype))
    lvlm = cp.HookedLVLM(model)
    runs = {
        "plain": generation(model, arguments.steps),
        "profile": profiled(lvlm, "default", arguments.steps),
        "profile_all": profiled(lvlm, "all", arguments.steps),
    }
    results = Results(arguments.out)
    for tokens in arguments.tokens:
        settings = {
            "machine": machine(arguments.device, arguments.dtype, ["transformer-lens"]),
            **{size: getattr(arguments, size) for size in sizes},
            "tokens": tokens,
            "steps": arguments.steps,
        }
        prompts = [prompt(tokens, 0, model)]
        for run in runs.values() if results.rounds(settings) < arguments.rounds else ():
            run(prompts)  # warms up
        while (number := results.rounds(settings)) < arguments.rounds:
            measured = {}
            for name in in_turn(list(runs), number):
                with timed() as seconds:
                    runs[name](prompts)
                measured[name] = asdict(seconds)
            results.add(settings, {name: measured[name] for name in runs})
        entry = next(entry for entry in results.entries if entry["settings"] == settings)
        for name in runs:
            on_clock, on_cpu = (spread(ratios(entry, name, clock), 3) for clock in ("wall", "cpu"))
            print(f"{tokens:,} tokens, {arguments.steps} steps  {name:12s} {on_clock} wall, {on_cpu} CPU")


if __name__ == "__main__":
    main()

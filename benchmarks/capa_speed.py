"""How much time CAPA really saves: prefill and decoding at 7B width, beside what the FLOPs and bytes predict.

Decoders as wide as LLaVA-1.5-7B and Qwen2.5-VL-7B, but of fewer layers, with random weights and a vision tower of one
narrow block; pruning layer, Hadamard layers and vocabulary in proportion to the whole model's. Vanilla and pruned
generation take turns in one process, and a speed-up is a ratio within one round; further runs add rounds. With a GPU,
the whole model: ``python benchmarks/capa_speed.py --model llava --layers 32 --dtype bfloat16 --device cuda``.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch
from _machine import keep_freed_memory, machine
from _speed_models import WIDTHS
from _speed_rounds import DISTURBED, Comparison, add, rounds_held
from _speed_tables import put, tables

from capa_probe.files import write_json
from capa_probe.lvlm import HookedLVLM


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--layers", type=int, help="decoder layers; a quarter of the model's if not given")
    parser.add_argument(
        "--visual", type=int, nargs="+", default=[576, 2048], help="visual tokens, in multiples of 64"
    )
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="with one, other programs hardly change the CPU time"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--repeats", type=int, default=3, help="how often a disturbed measurement is taken again"
    )
    parser.add_argument("--steps", type=int, default=8, help="decode steps")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/capa_speed.json"),
        help="rounds are added to those in this file",
    )
    parser.add_argument("--show", action="store_true", help="print the tables of --out and measure nothing")
    parser.add_argument("--into", type=Path, help="with --show: put them between this page's two marks")
    parser.add_argument("--quick", action="store_true", help="tiny widths, to see that everything runs")
    arguments = parser.parse_args()
    if arguments.show:
        shown = tables(json.loads(arguments.out.read_text(encoding="utf-8")))
        print(shown) if arguments.into is None else put(arguments.into, shown)
        return
    if any(visual < 64 or visual % 64 for visual in arguments.visual):
        parser.error(f"--visual {arguments.visual} was given; give multiples of 64.")
    if arguments.quick:
        arguments.visual, arguments.rounds, arguments.repeats, arguments.steps = [64, 128], 2, 0, 2
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"disturbed_above": DISTURBED, "comparisons": []}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))
    for name in arguments.model:
        width = WIDTHS[name]
        n_layers = arguments.layers or width.n_layers // 4
        dtype = getattr(torch, arguments.dtype)
        lvlm = HookedLVLM(width.build(n_layers, dtype, arguments.device, tiny=arguments.quick))
        for visual in arguments.visual:
            comparison = Comparison(
                lvlm, width, arguments, visual, machine(arguments.device, arguments.dtype)
            )
            with torch.no_grad():
                comparison.warm_up()
                for number in range(arguments.rounds):
                    print(f"  {width.paper}, {n_layers} layers, {visual} visual tokens, round {number + 1}")
                    add(results, comparison.round(rounds_held(results, comparison)))
                    write_json(arguments.out, results)
        del lvlm, comparison
        gc.collect()
    print(tables(results))


if __name__ == "__main__":
    main()

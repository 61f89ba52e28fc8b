"""What probing costs: one prefill plain, with silent hook points, with each set of probes, and by other means.

All variants take turns in one run, so that a drift of the machine's speed hits them alike; printed are medians of the
ratio to the plain forward of the same round. ``python benchmarks/probe_overhead.py --help`` lists the sizes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from capa_probe.lvlm import HookedLVLM
from capa_probe.probes import Recorder, choose_probes


def build(layers: int, width: int, heads: int, kv_heads: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=int(width * 2.6875),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        pad_token_id=0,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=1000)
    ).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    plain = build(arguments.layers, arguments.width, arguments.heads, arguments.kv_heads).to(arguments.device)
    eager = build(arguments.layers, arguments.width, arguments.heads, arguments.kv_heads).to(arguments.device)
    eager.set_attn_implementation("eager")
    lvlm = HookedLVLM(plain)
    ids = torch.tensor([[2, *[1000] * 576, *range(3, 3 + arguments.text_tokens - 1)]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 336, 336),
    }
    inputs = {name: x.to(arguments.device) for name, x in inputs.items()}
    spans = lvlm.spans(inputs)

    def probed(names: str | list[str]) -> Callable[[], object]:
        def run() -> object:
            with Recorder(lvlm, choose_probes(names), spans).attached():
                return plain(**inputs, use_cache=False, logits_to_keep=1)

        return run

    variants: dict[str, Callable[[], object]] = {
        "plain forward": lambda: plain(**inputs, use_cache=False, logits_to_keep=1),
        "wrapped, nobody listens": lambda: lvlm(**inputs, use_cache=False, logits_to_keep=1),
        "value norms, contribution": probed(["value_norm", "contribution"]),
        "the same and removal effect": probed(["value_norm", "contribution", "removal_effect"]),
        "all default probes": probed("default"),
        "all probes": probed("all"),
        "eager with output_attentions": lambda: eager(
            **inputs, use_cache=False, logits_to_keep=1, output_attentions=True, output_hidden_states=True
        ),
        "run_with_cache, every hook point": lambda: lvlm.run_with_cache(
            **inputs, use_cache=False, logits_to_keep=1
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad():
        for round_number in range(arguments.rounds + 1):
            for name, variant in variants.items():
                started = time.perf_counter()
                variant()
                if arguments.device.startswith("cuda"):
                    torch.cuda.synchronize()
                if round_number:  # the first round warms up
                    times[name].append(time.perf_counter() - started)
    base = times["plain forward"]
    print(
        f"{arguments.layers} layers, width {arguments.width}, {ids.shape[1]} tokens, {arguments.device}, "
        f"{torch.get_num_threads()} threads, {arguments.rounds} rounds; plain forward {statistics.median(base):.3f} s"
    )
    for name, seconds in times.items():
        ratios = sorted(x / y for x, y in zip(seconds, base, strict=True))
        print(f"{name:34s} {statistics.median(ratios):5.2f} x   ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()

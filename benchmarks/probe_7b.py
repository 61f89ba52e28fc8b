"""A profile of a whole LLaVA-1.5-7B, with random weights in bfloat16, beside the plain forward: time and memory.

Every size is the published model's, vision tower included: 576 visual tokens, 64 text tokens, 32 layers. Needs about
16 GB of free memory; where there is less, it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
from _machine import machine, reset_peak, resident
from _overhead_rounds import RESULTS, Results, in_turn, ratios, spread
from _overhead_variants import Variant, profiled
from _speed_models import fill
from _speed_rounds import timed
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

import capa_probe as cp

_VISUAL, _IMAGE = 576, 32000
#: Beyond the weights: activations, the vision tower's among them, and the libraries.
_BESIDE = 2.5e9


def build(layers: int, dtype: torch.dtype, device: str, tiny: bool = False) -> PreTrainedModel:
    """LLaVA-1.5-7B by its config, made in its dtype at once."""
    wide = {} if tiny else {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    narrow = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4} if tiny else {}
    vision = CLIPVisionConfig(
        hidden_size=64 if tiny else 1024,
        intermediate_size=128 if tiny else 4096,
        num_hidden_layers=2 if tiny else 24,
        num_attention_heads=2 if tiny else 16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        **wide,
        **narrow,
        num_hidden_layers=layers,
        vocab_size=32064,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=_IMAGE)
    with torch.device(device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return fill(model, 0).eval()


def prompt(model: PreTrainedModel, text: int, batch: int) -> dict[str, Tensor]:
    """Samples of one image and ``text`` text tokens each."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, _IMAGE, (batch, text), generator=generator)
    before, after = words[:, : text // 2], words[:, text // 2 :]
    ids = torch.cat([before, torch.full((batch, _VISUAL), _IMAGE), after], dim=1)
    pixels = torch.randn(batch, 3, 336, 336, generator=generator).to(model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: x.to(model.device) for name, x in inputs.items()}


def plain(model: PreTrainedModel) -> Variant:
    """The forward that a profile is compared with."""

    def over(prompts: list[dict[str, Tensor]]) -> None:
        with torch.no_grad():
            for inputs in prompts:
                model(**inputs, use_cache=False, logits_to_keep=1)

    return over


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5, help="in all, those in --out among them")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="tiny width, to see that everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "probe_7b.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)

    needed = 0 if arguments.quick else dtype.itemsize * (arguments.layers * 202.4e6 + 0.6e9) + _BESIDE
    free = psutil.virtual_memory().available
    if arguments.device == "cpu" and free < needed:
        print(
            f"{free / 1e9:.1f} GB of memory are free and {needed / 1e9:.1f} GB are needed; nothing measured."
        )
        return
    results = Results(arguments.out)
    todo = []
    for batch in arguments.batch:
        settings = {
            "machine": machine(arguments.device, arguments.dtype, ["transformer-lens"]),
            "model": "llava-1.5-7b, tiny" if arguments.quick else "llava-1.5-7b",
            "layers": arguments.layers,
            "tokens": _VISUAL + arguments.text_tokens,
            "batch": batch,
        }
        if results.rounds(settings) < arguments.rounds:
            todo.append((batch, settings))
    model = build(arguments.layers, dtype, arguments.device, arguments.quick) if todo else None
    for batch, settings in todo:
        assert model is not None
        lvlm = cp.HookedLVLM(model)
        runs = {
            "plain": plain(model),
            "profile": profiled(lvlm, "default"),
            "profile_all": profiled(lvlm, "all"),
        }
        prompts = [prompt(model, arguments.text_tokens, batch)]
        for run in runs.values():  # warms up
            run(prompts)
        while (number := results.rounds(settings)) < arguments.rounds:
            measured = {}
            for name in in_turn(list(runs), number):
                gc.collect()
                reset_peak()
                with timed() as seconds:
                    runs[name](prompts)
                measured[name] = {**asdict(seconds), "peak": resident("VmHWM")}
                print(f"  batch {batch}, {name}: {seconds.wall:.2f} s", flush=True)
            results.add(settings, {name: measured[name] for name in runs})
    for entry in results.entries:
        for name, rounds in entry["rounds"].items():
            print(
                f"{entry['settings']['model']}, batch {entry['settings']['batch']}  {name:12s} "
                f"{spread([each['wall'] for each in rounds])} s, {spread(ratios(entry, name, 'wall'), 3)} x plain, "
                f"{max(each['peak'] for each in rounds) / 2**30:.2f} GiB resident at most"
            )


if __name__ == "__main__":
    main()

"""What profiling a 7B model takes in memory, time and disk: computed from the models' sizes, not measured on them.

Prints the two tables of docs/seven-billion.md. The models are built without weights, from the sizes in their
checkpoints' config files. The assumptions are the constants below. Those that can be measured on small models were,
and ``tests/test_estimate_cost.py`` measures them again, times excepted.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.utils import logging

from capa_probe.flops import Convention, Cost, Shape, kv_cache_values, prefill_cost

#: One prompt: an image of (height, width) pixels, and text.
IMAGE = (480, 640)
TEXT_TOKENS = 64
#: bfloat16.
BYTES = 2
#: An A100's dense bfloat16 peak (data sheet) and the share of it that a prefill is assumed to reach.
PEAK_FLOPS, UTILISATION = 312e12, 0.40
#: Time of a forward with the default probes over one without: benchmarks/probe_7b.py, LLaVA-1.5-7B on a CPU.
PROBED_OVER_PLAIN = 1.09
#: Parquet bytes of a token row, and microseconds on one CPU core to make and write it: a profile of the demo model with
#: one question per image. With more, rows of visual tokens before the question come again, and compress away.
BYTES_PER_ROW, MICROSECONDS_PER_ROW = 45, 3
#: Parquet bytes of a row of the layers table, likewise.
BYTES_PER_LAYER_ROW = 180
#: Largest memory in use at once inside a decoder layer, in numbers per token: this many times d_mlp and d_model ...
FORWARD_MLP, FORWARD_MODEL = 3, 6
#: ... and what the default probes add to it, in bytes per token and dimension of the residual stream.
PROBE_BYTES = 8
#: Bytes per token and layer of the columns, held on the device until the prompt is done: 14 numbers, 4 indices.
COLUMN_BYTES = 14 * 4 + 4 * 8


@dataclass(frozen=True)
class Prompt:
    """Tokens of one prompt, and what the vision tower sees of it."""

    visual: int
    text: int
    grids: tuple[tuple[int, int], ...]  # patches of each image or tile

    @property
    def tokens(self) -> int:
        return self.visual + self.text

    @property
    def patches(self) -> int:
        return sum(rows * cols for rows, cols in self.grids)


@dataclass(frozen=True)
class Case:
    """One model on one prompt."""

    name: str
    model: PreTrainedModel
    prompt: Prompt

    @property
    def text(self) -> PreTrainedConfig:
        return self.model.config.get_text_config()


def llava() -> PreTrainedModel:
    """llava-hf/llava-1.5-7b-hf."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
    )


def qwen25_vl() -> PreTrainedModel:
    """Qwen/Qwen2.5-VL-7B-Instruct."""
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "out_hidden_size": 3584,
        "spatial_merge_size": 2,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**QWEN_7B, "vocab_size": 152064}, vision_config=vision, tie_word_embeddings=False
        )
    )


def internvl3() -> PreTrainedModel:
    """OpenGVLab/InternVL3-8B-hf."""
    vision = InternVLVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=[448, 448],
        patch_size=[14, 14],
        attention_bias=True,
    )
    text = Qwen2Config(**QWEN_7B, vocab_size=151674)
    return InternVLForConditionalGeneration(
        InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
    )


QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


@cache
def cases() -> tuple[Case, ...]:
    """The three models on the same photograph and question."""
    logging.set_verbosity_error()
    with torch.device("meta"):
        models = {"LLaVA-1.5-7B": llava(), "Qwen2.5-VL-7B": qwen25_vl(), "InternVL3-8B": internvl3()}
    height, width = smart_resize(*IMAGE, factor=28)
    cols, rows = get_optimal_tiled_canvas(IMAGE, (448, 448), 1, 12)
    tiles = rows * cols + (rows * cols > 1)
    prompts = {
        "llava": Prompt(576, TEXT_TOKENS, ((24, 24),)),
        "qwen2_5_vl": Prompt(height * width // 28**2, TEXT_TOKENS, ((height // 14, width // 14),)),
        "internvl": Prompt(256 * tiles, TEXT_TOKENS, ((32, 32),) * tiles),
    }
    return tuple(Case(name, model, prompts[model.config.model_type]) for name, model in models.items())


def parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def prompt_cost(case: Case, n_tokens: int | None = None) -> Cost:
    """FLOPs of one prompt, of ``n_tokens`` tokens if given; without the output head, attention in full."""
    prompt = case.prompt
    text = prompt.text if n_tokens is None else n_tokens - prompt.visual
    return prefill_cost(
        Shape.of(case.model.config),
        visual=prompt.visual,
        text=text,
        grids=prompt.grids,
        convention=Convention(lm_head="none"),
    )


def cache_bytes(case: Case) -> int:
    """Keys and values of one prompt, which decode steps need and a prefill alone does not keep."""
    shape = Shape.of(case.model.config)
    return kv_cache_values(shape, visual=case.prompt.visual, text=case.prompt.text) * BYTES


def forward_bytes(d_model: int, d_mlp: int, tokens: int) -> int:
    """Largest memory in use at once for the activations of a decoder layer."""
    return tokens * (FORWARD_MLP * d_mlp + FORWARD_MODEL * d_model) * BYTES


def probe_bytes(d_model: int, n_layers: int, tokens: int) -> int:
    """What the default probes add to it: float32 copies inside a layer, and the columns of all layers."""
    return tokens * (PROBE_BYTES * d_model + COLUMN_BYTES * n_layers)


def vision_bytes(case: Case) -> int:
    """Largest memory in use at once in the vision tower, likewise."""
    config, prompt = case.model.config.vision_config, case.prompt
    return forward_bytes(config.hidden_size, config.intermediate_size, prompt.patches)


def memory_table() -> str:
    lines = [
        "| model | parameters | weights | prompt | forward | probes | together | KV cache, if kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases():
        text, prompt = case.text, case.prompt
        weights = parameters(case.model) * BYTES
        forward = max(
            forward_bytes(text.hidden_size, text.intermediate_size, prompt.tokens), vision_bytes(case)
        )
        probes = probe_bytes(text.hidden_size, text.num_hidden_layers, prompt.tokens)
        total = weights + forward + probes
        lines.append(
            f"| {case.name} | {parameters(case.model):,} | {weights / 1e9:.2f} GB | "
            f"{prompt.visual:,} visual + {prompt.text} text tokens | {forward / 1e9:.2f} GB | "
            f"{probes / 1e9:.2f} GB | **{total / 1e9:.1f} GB** | {cache_bytes(case) / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def time_table() -> str:
    lines = [
        "| model | FLOPs a prompt | GPU, 1000 prompts | token rows | CPU, tables | disk | `--rows visual` | `none` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases():
        flops = prompt_cost(case).total
        seconds = 1000 * flops * PROBED_OVER_PLAIN / (PEAK_FLOPS * UTILISATION)
        layers = case.text.num_hidden_layers
        rows = 1000 * layers * case.prompt.tokens
        lines.append(
            f"| {case.name} | {flops / 1e12:.1f} T | {seconds / 60:.1f} min | {rows / 1e6:.0f} million | "
            f"{rows * MICROSECONDS_PER_ROW / 1e6 / 60:.1f} min | {rows * BYTES_PER_ROW / 1e9:.1f} GB | "
            f"{1000 * layers * case.prompt.visual * BYTES_PER_ROW / 1e9:.1f} GB | "
            f"{1000 * layers * 2 * BYTES_PER_LAYER_ROW / 1e6:.0f} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(f"{memory_table()}\n\n{time_table()}")


if __name__ == "__main__":
    main()

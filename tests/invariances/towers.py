"""Tiny LLaVA models around text towers of other kinds than Llama: sliding windows, normed queries and keys, experts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BitNetConfig,
    CLIPVisionConfig,
    CodeGenConfig,
    Cohere2Config,
    DiffLlamaConfig,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MiniMaxConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    VaultGemmaConfig,
)

from tests import tiny

WINDOW = 6
#: Towers that are measured: their config class, and what makes them special.
MEASURED: dict[str, tuple[Any, dict[str, Any]]] = {
    "mistral, sliding windows": (MistralConfig, {"sliding_window": WINDOW}),
    "qwen2, sliding windows above layer 2": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3, normed q and k": (Qwen3Config, {"head_dim": 12}),
    "qwen3, normed q and k, sliding windows": (
        Qwen3Config,
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3, experts": (
        Qwen3MoeConfig,
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gemma 1": (GemmaConfig, {"head_dim": 8}),
}
#: Towers that are refused, and the words in which.
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "gemma 2": (
        Gemma2Config,
        {"head_dim": 8},
        "Gemma2DecoderLayer .*post_feedforward_layernorm.* soft-capped attention",
    ),
    "gemma 3": (Gemma3TextConfig, {"head_dim": 8}, "Gemma3DecoderLayer .*with pre_feedforward_layernorm"),
    "vaultgemma": (VaultGemmaConfig, {"head_dim": 8}, "VaultGemmaDecoderLayer .*soft-capped attention"),
    "olmo 2": (Olmo2Config, {}, "Olmo2DecoderLayer without input_layernorm"),
    "glm 4": (Glm4Config, {"head_dim": 8}, "Glm4DecoderLayer with post_self_attn_layernorm"),
    "granite": (
        GraniteConfig,
        {"residual_multiplier": 0.5},
        "GraniteDecoderLayer with residual_multiplier=0.5",
    ),
    "gpt-oss": (
        GptOssConfig,
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None},
        "GptOssDecoderLayer with learned sink logits",
    ),
    "cohere 2": (Cohere2Config, {}, "Cohere2DecoderLayer without post_attention_layernorm"),
    "bitnet": (BitNetConfig, {}, r"BitNetDecoderLayer with self_attn\.attn_sub_norm"),
    "differential llama": (DiffLlamaConfig, {}, r"DiffLlamaDecoderLayer with self_attn\.lambda_q1"),
    "doge": (DogeConfig, {}, "DogeDecoderLayer with input_residual"),
    "minimax": (
        MiniMaxConfig,
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention"] * 4,
            "full_attn_alpha_factor": 2,
        },
        "MiniMaxDecoderLayer with attn_alpha_factor=2",
    ),
    "qwen3-next, gated attention": (
        Qwen3NextConfig,
        {"head_dim": 8, "layer_types": ["full_attention"] * 4, "num_experts": 0},
        r"Qwen3NextDecoderLayer with self_attn\.q_proj of 64 numbers for 32",
    ),
    "codegen": (CodeGenConfig, {"rotary_dim": 8}, "CodeGenModel without layers"),
    "phi 3": (Phi3Config, {}, r"Phi3DecoderLayer without self_attn\.v_proj"),
}
_ONLY_EAGER = ("gemma 2", "vaultgemma", "gpt-oss", "codegen")


def build(name: str, attn: str = "sdpa") -> PreTrainedModel:
    """A random model in float32 whose attention is far from uniform and whose generation never stops."""
    torch.manual_seed(0)
    config_class, options = (MEASURED.get(name) or REFUSED[name])[:2]
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    text = config_class(**{**tiny.TEXT, **options})
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tiny.IMAGE, image_seq_length=16
    )
    config._attn_implementation = "eager" if name in _ONLY_EAGER else attn
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "layers" in parameter_name:
                parameter.mul_(6.0)
            elif parameter_name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(0.5, 2)  # all ones would do nothing after the first norm
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = tiny.PAD, None
    return model

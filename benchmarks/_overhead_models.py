"""The model that profiles are timed on, prompts for it, and the same model in other tools' hands."""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

#: Visual tokens of an image: 24 x 24 patches, as in LLaVA-1.5.
PER_IMAGE = 576
_IMAGE, _VOCABULARY = 1000, 1024


def add_sizes(parser: ArgumentParser) -> None:
    """Options for the sizes of :func:`build`; by default those of the published numbers."""
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)


def build(
    layers: int, width: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float32
) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights; its vision tower is one narrow block, which makes the decoder nearly all of it."""
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
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=int(width * 2.6875),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=16384,
        pad_token_id=0,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=_IMAGE)
    config.architectures = ["LlavaForConditionalGeneration"]
    model = LlavaForConditionalGeneration(config).to(dtype).eval()
    model.generation_config.eos_token_id = None  # every answer is as long as asked for
    model.generation_config.pad_token_id = 0
    return model


def twin(model: LlavaForConditionalGeneration, attention: str) -> LlavaForConditionalGeneration:
    """The same weights, not copied, in a model of its own on another attention backend."""
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        other = LlavaForConditionalGeneration(config)
    other.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():  # those that no checkpoint holds, as rotary frequencies
        owner, _, leaf = name.rpartition(".")
        other.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    other.set_attn_implementation(attention)
    return other.eval()


def prompt(tokens: int, seed: int = 0, model: Any = None) -> dict[str, Tensor]:
    """One sample of ``tokens`` tokens: as many images as fit beside at least 32 text tokens, which follow them."""
    generator = torch.Generator().manual_seed(seed)
    images = max(1, (tokens - 32) // PER_IMAGE)
    visual = min(images * PER_IMAGE, tokens)
    words = torch.randint(3, _IMAGE - 8, (tokens - visual,), generator=generator).tolist()
    ids = torch.tensor([[*words[:4], *[_IMAGE] * visual, *words[4:]]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(images, 3, 336, 336, generator=generator),
    }
    if model is None:
        return inputs
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return {name: x.to(model.device) for name, x in inputs.items()}


def bridge(model: LlavaForConditionalGeneration) -> Any:
    """TransformerLens's bridge around a twin of the model; it runs eager attention."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = WordLevel({f"w{number}": number for number in range(_VOCABULARY)}, unk_token="w3")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return TransformerBridge.boot_transformers(
            folder,
            hf_model=twin(model, "eager"),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            device=str(model.device),
            dtype=model.dtype,
        )

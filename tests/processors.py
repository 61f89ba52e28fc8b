"""Real processors for the tiny models of ``tests.tiny``, built offline: tokenizer, image processor, chat template.

Tokenizers are made of single characters, so that any question can be written with the 64 ids the tiny models know.
Special tokens and templates are those of llava-1.5-7b-hf, Qwen2.5-VL and InternVL3, options their checkpoints' own.
"""

from __future__ import annotations

import string
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from tests import tiny

#: Placeholder of one image in a prompt.
PLACEHOLDER = {"llava": "<image>", "qwen2_5_vl": "<|image_pad|>", "internvl": "<IMG_CONTEXT>"}

_CHARACTERS = string.ascii_lowercase + string.digits + " \n.,:;?!'-"
_TURNS = ("<|im_start|>", "<|im_end|>")
# Ids 60 to 63, as in the configs of the tiny models.
_MEDIA = {
    "llava": ("<image>", "<unused1>", "<unused2>", "<unused3>"),
    "qwen2_5_vl": ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
    "internvl": ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
}
_NAMED = {
    "llava": {"image_token": 0},
    "qwen2_5_vl": {"image_token": 0, "video_token": 3},
    "internvl": {
        "context_image_token": 0,
        "start_image_token": 1,
        "end_image_token": 2,
        "video_token": 3,
    },
}
TEMPLATES = {
    "llava": (
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "qwen2_5_vl": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
        "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "internvl": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
        "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer of characters in lower case, with the family's special tokens at the ids of the tiny models."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *_TURNS, *_CHARACTERS]
    words += [f"<spare{n}>" for n in range(tiny.IMAGE - len(words))]
    words += _MEDIA[family]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    bos = {}
    if family == "llava":  # Llama's tokenizer writes a BOS; those of Qwen have none
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tiny.BOS)]
        )
        bos = {"bos_token": "<s>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={name: _MEDIA[family][at] for name, at in _NAMED[family].items()},
        **bos,
    )
    made.add_special_tokens(
        {"additional_special_tokens": [*_TURNS, *_MEDIA[family]]}, replace_extra_special_tokens=False
    )
    assert len(made) == tiny.TEXT["vocab_size"]
    return made


def build(family: str) -> ProcessorMixin:
    """A new processor, sized for the tiny model of the family."""
    template = TEMPLATES[family]
    if family == "llava":
        return LlavaProcessor(
            CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
            tokenizer(family),
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if family == "qwen2_5_vl":
        patches: dict[str, Any] = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
        pixels = {"min_pixels": 8 * 8, "max_pixels": 32 * 32}
        return Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(**patches, **pixels),
            tokenizer(family),
            Qwen2VLVideoProcessor(**patches, **pixels),
            chat_template=template,
        )
    size = {"height": 16, "width": 16}
    return InternVLProcessor(
        # Checkpoints leave crop_to_patches at False here; InternVLProcessor turns it on.
        GotOcr2ImageProcessor(size=size, crop_to_patches=False, min_patches=1, max_patches=12),
        tokenizer(family),
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=template,
    )


@cache
def shared(family: str) -> ProcessorMixin:
    """One processor per family for tests that do not change it."""
    return build(family)


def image(height: int, width: int, seed: int = 0) -> Image.Image:
    """An RGB image of noise, so that no two places and no two seeds look alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def save(family: str, folder: Path, **text: Any) -> Path:
    """A checkpoint folder with a tiny model and its processor, as a hub checkpoint has them."""
    tiny.build(family, **text).save_pretrained(folder)
    build(family).save_pretrained(folder)
    return folder

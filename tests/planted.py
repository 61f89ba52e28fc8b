"""A planted LVLM: real LLaVA and Qwen2.5-VL models with weights set by hand, so that the truth about them is known.

The models are built from configs and never patched; images are real ones that pass through the family's own
processor. Each 8 x 8 block of pixels becomes one visual token, and its colours say what kind of token that is
(``tests.planted_weights.KINDS``) and what content it has. In each of eight layers it is known which visual tokens are
massive, in which dimension, whether they are Probability Dumps or Structural Anchors, and what the FFN does::

    layer                0     1     2     3     4     5     6     7
    sinks at its input   -     -     yes   yes   yes   yes   yes   -      (layer 1 makes them, 4 moves, 6 removes)
    FFN, visual tokens   turn  turn  same  scale turn  scale turn  turn
    FFN, text tokens     turn  turn  turn  turn  turn  scale same  turn

Anchors carry the answer: it is the token that the model predicts, and goes when they go.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from capa_probe import Sample
from capa_probe.lvlm import TokenSpans
from tests import planted_weights as weights
from tests import processors, tiny
from tests.planted_images import ANSWERS, N_BITS, SIDE, Kinds, make_samples, write_vision
from tests.planted_weights import D_HEAD, D_MLP, D_MODEL, LayerPlan, Layout

FAMILIES = ("llava", "qwen2_5_vl")
#: What layer l does to visual and to text tokens.
FFN = tuple(
    zip(
        ("turn", "turn", "same", "scale", "turn", "scale", "turn", "turn"),
        ("turn", "turn", "turn", "turn", "turn", "scale", "same", "turn"),
        strict=True,
    )
)
#: First layer with sinks, the first where they have moved, and the first without.
BORN, MOVED, GONE = 2, 5, 7
#: Of the three sink dimensions, the one each kind has before and after the move; and its roles.
SINK_DIMS = {"dump": (0, 2), "anchor": (1, 0), "switch": (0, 1), "unread": (1, 2)}
SINK_ROLES = {
    "dump": ("dump", "dump"),
    "anchor": ("anchor", "anchor"),
    "switch": ("dump", "anchor"),
    "unread": ("dump", "dump"),
}
#: Factor of layer 3, and of layer 5, on the sink dimensions.
MASSIVE_FACTOR = {3: 1.03, 5: 0.97}
NO_ANSWER = "?"


class Sink(NamedTuple):
    """A planted sink at one layer."""

    sample: str
    layer: int
    image: int
    row: int
    col: int
    dim: int
    role: str


@dataclass(frozen=True, repr=False)
class Planted:
    """A model, samples for it, and what is true of them.

    Attributes:
        family: "llava" (multi-head attention) or "qwen2_5_vl" (grouped queries, M-RoPE, biases).
        model: in float32, eval mode.
        processor: the family's own.
        samples: of one or two images each.
        kinds: sample id to the kind of token at (image, row, col).
        answers: sample id to the token that the model predicts next.
        without_answer: the token that it predicts when no anchor is there.
        plan: per layer, what the FFN does and which dimensions and roles the sinks have.
        layout: what each channel means.
    """

    family: str
    model: PreTrainedModel
    processor: ProcessorMixin
    samples: tuple[Sample, ...]
    kinds: Kinds
    answers: dict[str, str]
    without_answer: str
    plan: tuple[LayerPlan, ...]
    layout: Layout

    @property
    def sinks(self) -> set[Sink]:
        """Every sink at every layer."""
        return {
            Sink(sample, layer, *place, plan.dims[kind], plan.roles[kind])
            for sample, kinds in self.kinds.items()
            for place, kind in kinds.items()
            for layer, plan in enumerate(self.plan)
            if kind in plan.dims
        }

    @property
    def redundant(self) -> set[int]:
        """Layers whose FFN keeps the direction of visual tokens."""
        return {layer for layer, plan in enumerate(self.plan) if plan.visual != "turn"}

    @property
    def visual_only(self) -> set[int]:
        """Those of them whose FFN turns text tokens."""
        return {layer for layer in self.redundant if self.plan[layer].text == "turn"}

    def alpha(self, layer: int) -> Tensor:
        """The factors of a redundant layer: (d_model,), all 1 where the FFN adds nothing."""
        alpha = self.plan[layer].alpha
        return torch.ones(D_MODEL) if alpha is None else alpha.float()

    def mask(self, spans: TokenSpans, samples: Sequence[Sample], kinds: Collection[str]) -> Tensor:
        """Where tokens of some kinds lie in a batch of these samples: bool (batch, position)."""
        mask = torch.zeros_like(spans.visual)
        for image in spans.images:
            of_sample = self.kinds[samples[image.sample].id]
            places = zip(image.row.tolist(), image.col.tolist(), strict=True)
            chosen = [of_sample[image.index, row, col] in kinds for row, col in places]
            mask[image.sample, image.positions] = torch.tensor(chosen)
        return mask

    def shuffled(self, seed: int) -> Planted:
        """The same model under a false truth: kinds dealt out anew within each sample, layers moved along."""
        rng = np.random.default_rng(seed)
        kinds = {
            sample: dict(zip(places, rng.permutation(list(places.values())).tolist(), strict=True))
            for sample, places in self.kinds.items()
        }
        by = int(rng.integers(1, len(self.plan)))
        plan = (*self.plan[by:], *self.plan[:by])
        return replace(self, kinds=kinds, plan=plan)


@cache
def plant(family: str, seed: int = 0) -> Planted:
    """A planted model of the family, with samples; not to be changed, since tests share it."""
    seed = seed * len(FAMILIES) + FAMILIES.index(family)  # other channels in the other family
    generator = torch.Generator().manual_seed(seed)
    model, processor = _model(family), _processor(family)
    layout = Layout.random(generator)
    with torch.no_grad():
        weights.clear(model)
        plan = _write_decoder(model, layout, processor, generator)
        write_vision(family, model, layout, generator)
    samples, kinds, answers = make_samples(family, np.random.default_rng(seed))
    return Planted(family, model, processor, samples, kinds, answers, NO_ANSWER, plan, layout)


def unplanted(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of the same sizes with random weights; those of the decoder are large enough to turn residuals."""
    torch.manual_seed(seed)
    model = _model(family)
    with torch.no_grad():
        for parameter in model.model.language_model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    return model


def _write_decoder(
    model: PreTrainedModel, layout: Layout, processor: ProcessorMixin, generator: torch.Generator
) -> tuple[LayerPlan, ...]:
    text = model.model.language_model
    signs = 2.0 * torch.randint(2, (tiny.TEXT["vocab_size"], D_MODEL), generator=generator) - 1
    text.embed_tokens.weight.copy_(layout.of_text(signs))
    tokens = layout.of_kind()
    plans = []
    for index, layer in enumerate(text.layers):
        (visual, to_text), alpha = FFN[index], None
        if visual == "scale":
            massive = dict.fromkeys(_dims(layout, index).values(), MASSIVE_FACTOR[index])
            alpha = weights.random_alpha(layout, tokens, massive, generator)
        roles = {kind: both[index >= MOVED] for kind, both in SINK_ROLES.items()}
        plan = LayerPlan(visual, to_text, _dims(layout, index), roles, alpha)
        heads = model.config.get_text_config().num_attention_heads
        weights.write_attention(layer.self_attn, layout, plan, tokens, heads)
        tokens = weights.write_ffn(layer.mlp, layout, plan, _dims(layout, index + 1), tokens)
        plans.append(plan)
    answers = processor.tokenizer.convert_tokens_to_ids(list(ANSWERS))
    (default,) = processor.tokenizer.convert_tokens_to_ids([NO_ANSWER])
    weights.write_head(model.lm_head, layout, answers, default)
    return tuple(plans)


def _dims(layout: Layout, layer: int) -> dict[str, int]:
    if not BORN <= layer < GONE:
        return {}
    return {kind: layout.sink[both[layer >= MOVED]] for kind, both in SINK_DIMS.items()}


# -- models and processors


def _model(family: str) -> PreTrainedModel:
    """Real models at the narrowest width where two dimensions of a token can both exceed tau = 20."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    text: dict[str, Any] = {
        **tiny.TEXT,
        "hidden_size": D_MODEL,
        "intermediate_size": D_MLP,
        "num_hidden_layers": len(FFN),
        "tie_word_embeddings": False,
    }
    ids = {"image_token_id": tiny.IMAGE, "tie_word_embeddings": False}
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=2 * N_BITS,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=6 * SIDE,
            patch_size=SIDE,
        )
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": D_HEAD}
        language = LlamaConfig(**{**text, **heads}, rope_parameters=rope)
        config: Any = LlavaConfig(vision_config=vision, text_config=language, image_seq_length=36, **ids)
        architecture: Any = LlavaForConditionalGeneration
    else:
        heads = {"num_attention_heads": D_MODEL // D_HEAD, "num_key_value_heads": 4}
        config = Qwen2_5_VLConfig(
            text_config={**text, **heads, "rope_parameters": {**rope, "mrope_section": [8, 12, 12]}},
            vision_config={
                "depth": 2,
                "hidden_size": 2 * N_BITS // 4,
                "intermediate_size": 8,
                "num_heads": 2,
                "patch_size": SIDE // 2,
                "spatial_merge_size": 2,
                "window_size": 2 * SIDE,
                "fullatt_block_indexes": [1],
                "out_hidden_size": D_MODEL,
                "temporal_patch_size": 2,
            },
            video_token_id=63,
            vision_start_token_id=tiny.START,
            vision_end_token_id=tiny.END,
            **ids,
        )
        architecture = Qwen2_5_VLForConditionalGeneration
    model = architecture(config).eval()
    model.generation_config.pad_token_id = tiny.PAD
    return model


def _processor(family: str) -> ProcessorMixin:
    """The family's own, for images of whole blocks, whose pixels come out as -1 and 1."""
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    tokenizer, template = processors.tokenizer(family), processors.TEMPLATES[family]
    if family == "llava":
        side = 6 * SIDE
        return LlavaProcessor(
            CLIPImageProcessor(
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **pixels
            ),
            tokenizer,
            patch_size=SIDE,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    patches = {"patch_size": SIDE // 2, "temporal_patch_size": 2, "merge_size": 2}
    limits = {"min_pixels": SIDE * SIDE, "max_pixels": (16 * SIDE) ** 2}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**patches, **limits, **pixels),
        tokenizer,
        Qwen2VLVideoProcessor(**patches, **limits),
        chat_template=template,
    )

"""LLaVA-1.5: a CLIP tower, a fixed square grid, a Llama decoder."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from capa_probe.demo.worlds import World
from demo_training.families.base import DemoFamily, Layout, Sizes, one_after_the_other, reading_order
from demo_training.vocabulary import (
    ASSISTANT,
    BOS,
    EOS,
    IMAGE,
    N_PATCHES,
    PAD,
    PATCHES_PER_SIDE,
    USER,
    build_processor,
    build_tokenizer,
    vocabulary,
)


class Llava(DemoFamily):
    """144 visual tokens, one for each patch of a square image."""

    name = "llava"
    folder = "demo-lvlm"
    model_class = LlavaForConditionalGeneration
    opening = USER
    ask = f" {ASSISTANT}"
    capitals = False
    prompt_form = (
        "The prompt form is that of LLaVA-1.5: `USER: <image>`, a line break, the question, `ASSISTANT:`; "
        "the chat template writes it."
    )

    def tokenizer(self, world: World) -> PreTrainedTokenizerFast:
        """Whole words."""
        return build_tokenizer(world)

    def processor(self, world: World) -> LlavaProcessor:
        """With a CLIP image processor."""
        return build_processor(world)

    def config(self, sizes: Sizes, world: World) -> LlavaConfig:
        """Of the whole model."""
        return LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=sizes.d_vision,
                intermediate_size=4 * sizes.d_vision,
                num_hidden_layers=sizes.vision_layers,
                num_attention_heads=4,
                image_size=world.image_size,
                patch_size=world.image_size // PATCHES_PER_SIDE,
            ),
            text_config=LlamaConfig(
                vocab_size=len(vocabulary(world)),
                hidden_size=sizes.d_model,
                intermediate_size=sizes.d_mlp,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.heads,
                num_key_value_heads=sizes.kv_heads,
                max_position_embeddings=512,
                rms_norm_eps=1e-5,
                pad_token_id=PAD,
                bos_token_id=BOS,
                eos_token_id=EOS,
            ),
            image_token_id=IMAGE,
            image_seq_length=N_PATCHES,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            tie_word_embeddings=False,
        )

    def tower(self, model: PreTrainedModel) -> nn.Module:
        """CLIP."""
        return model.model.vision_tower

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Two layers."""
        return model.model.multi_modal_projector

    def d_feature(self, sizes: Sizes) -> int:
        """Of one patch."""
        return sizes.d_vision

    def features(self, model: PreTrainedModel, images: Mapping[str, Tensor]) -> Tensor:
        """The last hidden states, without that of the class token."""
        tower = self.tower(model)
        found = tower(pixel_values=images["pixel_values"], output_hidden_states=True).hidden_states[-1]
        return found[:, 1:].flatten(0, 1)

    def layout(self, shape: tuple[int, int], world: World) -> Layout:
        """Always the same grid."""
        return one_after_the_other(reading_order(PATCHES_PER_SIDE, PATCHES_PER_SIDE))

    def describe(self, sizes: Sizes, world: World) -> str:
        """The tower and the images."""
        patch = world.image_size // PATCHES_PER_SIDE
        return (
            f"a CLIP vision tower ({sizes.d_vision} wide, {sizes.vision_layers} layers, {patch}-pixel patches, "
            f"{world.image_size} x {world.image_size} images, {N_PATCHES} visual tokens), a two-layer MLP projector "
            "and a Llama decoder"
        )

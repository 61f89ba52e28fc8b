"""The demo model's sizes, and the small parts that only training needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from demo_training.recipe import RECIPE, Recipe
from demo_training.sketches import field_sizes
from demo_training.vocabulary import BOS, EOS, IMAGE, N_PATCHES, PAD, PATCHES_PER_SIDE, vocabulary


def build_config(recipe: Recipe = RECIPE) -> LlavaConfig:
    """The model's configuration."""
    sizes, world = recipe.sizes, recipe.world
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


class PatchHeads(nn.Module):
    """Reads from a patch's features what its sketch tells: the tower's own training task."""

    def __init__(self, sizes: list[int], d_vision: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.read = nn.Linear(d_vision, sum(sizes))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """(batch, patch, d) to one (batch, patch, value) for each field."""
        return self.read(features).split(self.sizes, dim=-1)


class Symbols(nn.Module):
    """A patch as the sum of six learned embeddings: what the decoder learns to read before it sees images."""

    def __init__(self, sizes: list[int], d_model: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, d_model) for n in sizes)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, sketch: Tensor) -> Tensor:
        """(batch, token, field) to (batch, token, d_model)."""
        return torch.stack([table(sketch[..., i]) for i, table in enumerate(self.tables)]).sum(dim=0)


class Parts(nn.Module):
    """The model, and beside it what is thrown away after training."""

    def __init__(self, recipe: Recipe = RECIPE) -> None:
        super().__init__()
        self.recipe = recipe
        sizes = list(field_sizes(recipe.world).values())
        self.lvlm = LlavaForConditionalGeneration(build_config(recipe))
        self.heads = PatchHeads(sizes, recipe.sizes.d_vision)
        self.symbols = Symbols(sizes, recipe.sizes.d_model)

    @property
    def tower(self) -> nn.Module:
        return self.lvlm.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        return self.lvlm.model.multi_modal_projector

    @property
    def decoder(self) -> nn.Module:
        return self.lvlm.model.language_model

    def patch_features(self, pixels: Tensor) -> Tensor:
        """(batch, patch, d_vision), as the projector sees them."""
        return self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]

"""The demo model, and the small parts that only training needs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from demo_training.recipe import RECIPE, Recipe
from demo_training.sketches import field_sizes


class PatchHeads(nn.Module):
    """Reads from a visual token's features what its sketch tells: the tower's own training task."""

    def __init__(self, sizes: list[int], d_feature: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.read = nn.Linear(d_feature, sum(sizes))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """(token, d) to one (token, value) for each field."""
        return self.read(features).split(self.sizes, dim=-1)


class Symbols(nn.Module):
    """A visual token as the sum of six learned embeddings: what the decoder learns to read before it sees images."""

    def __init__(self, sizes: list[int], d_model: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, d_model) for n in sizes)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, sketch: Tensor) -> Tensor:
        """(token, field) to (token, d_model)."""
        return torch.stack([table(sketch[..., i]) for i, table in enumerate(self.tables)]).sum(dim=0)


class Parts(nn.Module):
    """The model, and beside it what is thrown away after training.

    Attributes:
        fields: what a sketch tells, by name, with the number of values.
        opening, closing: (position,) ids of the tokens before and after the image.
    """

    def __init__(self, recipe: Recipe = RECIPE) -> None:
        super().__init__()
        self.recipe, self.family = recipe, recipe.family
        self.fields = field_sizes(recipe.world, recipe.family.has_untold)
        sizes = list(self.fields.values())
        self.lvlm = self.family.model_class(self.family.config(recipe.sizes, recipe.world))
        self.heads = PatchHeads(sizes, self.family.d_feature(recipe.sizes))
        self.symbols = Symbols(sizes, recipe.sizes.d_model)
        tokenizer = self.family.tokenizer(recipe.world)
        # LLaVA's tokenizer begins every text with a BOS.
        self.opening = torch.tensor(tokenizer(self.family.opening)["input_ids"])
        closing = tokenizer(self.family.closing, add_special_tokens=False)["input_ids"]
        self.closing = torch.tensor(closing, dtype=torch.long)

    @property
    def tower(self) -> nn.Module:
        return self.family.tower(self.lvlm)

    @property
    def projector(self) -> nn.Module:
        return self.family.projector(self.lvlm)

    @property
    def decoder(self) -> nn.Module:
        return self.family.decoder(self.lvlm)

    def features(self, images: Mapping[str, Tensor]) -> Tensor:
        """(visual token, d_feature) of all images, one image after the other."""
        return self.family.features(self.lvlm, images)

    def project(self, features: Tensor) -> Tensor:
        """(visual token, d_feature) to (visual token, d_model)."""
        return self.family.project(self.lvlm, features)

"""The demo model's sizes, and the small parts that only training needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from capa_probe.demo.scenes import Scene
from capa_probe.demo.worlds import CHARACTERS, COLORS, SHAPES, SMALL
from demo_training.vocabulary import (
    BOS,
    EOS,
    IMAGE,
    N_PATCHES,
    PAD,
    PATCHES_PER_SIDE,
    vocabulary,
)

D_VISION, D_MODEL = 128, 256
BOARD = SMALL.largest_board
#: What each cell is described by, and how many values each takes; the last of the first four is "none".
CELL_FIELDS = {
    "shape": len(SHAPES) + 1,
    "color": len(COLORS) + 1,
    "character 1": len(CHARACTERS) + 1,
    "character 2": len(CHARACTERS) + 1,
    "row": BOARD,
    "column": BOARD,
}
#: Patch -> the cell that it lies in.
PATCH_CELL = torch.tensor(
    [
        (p // PATCHES_PER_SIDE * BOARD // PATCHES_PER_SIDE) * BOARD
        + p % PATCHES_PER_SIDE * BOARD // PATCHES_PER_SIDE
        for p in range(N_PATCHES)
    ]
)


def build_config() -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=D_VISION,
            intermediate_size=4 * D_VISION,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SMALL.image_size,
            patch_size=SMALL.image_size // PATCHES_PER_SIDE,
        ),
        text_config=LlamaConfig(
            vocab_size=len(vocabulary()),
            hidden_size=D_MODEL,
            intermediate_size=2 * D_MODEL,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
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


class CellHeads(nn.Module):
    """Reads from a patch's features what its cell holds: the tower's own training task."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(D_VISION, sum(CELL_FIELDS.values()))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """(batch, patch, d) to one (batch, patch, value) for each field."""
        return self.read(features).split(list(CELL_FIELDS.values()), dim=-1)


class CellSymbols(nn.Module):
    """A cell as the sum of six learned embeddings: what the decoder learns to read before it sees images."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, D_MODEL) for n in CELL_FIELDS.values())
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, cells: Tensor) -> Tensor:
        """(batch, field, cell) to (batch, cell, d_model)."""
        return torch.stack([table(cells[:, i]) for i, table in enumerate(self.tables)]).sum(dim=0)


class Parts(nn.Module):
    """The model, and beside it what is thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.lvlm = LlavaForConditionalGeneration(build_config())
        self.heads = CellHeads()
        self.symbols = CellSymbols()

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


def describe_cells(scene: Scene) -> list[list[int]]:
    """Field by cell: indices of what each cell holds."""
    none = [n - 1 for n in CELL_FIELDS.values()]
    fields = [[none[f]] * BOARD**2 for f in range(4)]
    for cell, (shape, color) in scene.objects.items():
        fields[0][cell] = SHAPES.index(shape)
        fields[1][cell] = list(COLORS).index(color)
    for cell, text in scene.texts.items():
        for place, character in enumerate(text):
            fields[2 + place][cell] = CHARACTERS.index(character)
    cells = range(BOARD**2)
    return [*fields, [cell // BOARD for cell in cells], [cell % BOARD for cell in cells]]

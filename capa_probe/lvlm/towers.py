"""The vision towers of the families: where they are, and which patches each visual token is made of.

All towers put out rows of patches: (image or tile, CLS token and patches) or, in Qwen2.5-VL, all images one after the
other. :meth:`Tower.patches` says where in those rows the patches of a visual token are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capa_probe.errors import CapaProbeError


class Tower(ABC):
    """One kind of vision tower."""

    @abstractmethod
    def module(self, model: PreTrainedModel) -> PreTrainedModel:
        """The tower itself, with its config."""

    @abstractmethod
    def blocks(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Its transformer blocks, in order."""

    @abstractmethod
    def attention(self, block: nn.Module) -> nn.Module:
        """The attention module of a block."""

    @abstractmethod
    def patches(self, model: PreTrainedModel, rows: int, length: int, given: Mapping[str, Any]) -> Tensor:
        """Flat indices (visual, patch) into the tower's rows, visual tokens in the order of the prompt.

        Args:
            model: the whole model.
            rows: images or tiles that the tower put out.
            length: patches of each, a CLS token included.
            given: what the tower was called with.
        """

    def n_leading(self, model: PreTrainedModel) -> int:
        """Tokens before the patches of each row: 1 for a CLS token."""
        return 0

    def feature_block(self, model: PreTrainedModel) -> nn.Module:
        """The block whose output becomes the visual tokens; of several, the last one named."""
        blocks = self.blocks(model)
        at = getattr(model.config, "vision_feature_layer", -1)
        at = at if isinstance(at, int) else at[-1]
        index = at + len(blocks) if at < 0 else at - 1  # 0 would be the embeddings
        if not 0 <= index < len(blocks):
            raise CapaProbeError(
                f"The model takes its visual tokens from vision_feature_layer={at}, which is no block of its vision "
                "tower; use a pruning method that does not read the tower."
            )
        return blocks[index]


class ClipTower(Tower):
    """LLaVA: CLIP, with a CLS token, or SigLIP, without; one visual token per patch."""

    def module(self, model: PreTrainedModel) -> PreTrainedModel:
        """The tower itself."""
        return model.model.vision_tower

    def blocks(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Its encoder layers."""
        tower = self.module(model)
        return getattr(tower, "vision_model", tower).encoder.layers

    def attention(self, block: nn.Module) -> nn.Module:
        """Of an encoder layer."""
        return block.get_submodule("self_attn")

    def n_leading(self, model: PreTrainedModel) -> int:
        """CLIP's CLS token."""
        return int("clip" in model.config.vision_config.model_type)

    def patches(self, model: PreTrainedModel, rows: int, length: int, given: Mapping[str, Any]) -> Tensor:
        """Every patch in reading order; the first of each row only where the model keeps it."""
        first = int(model.config.vision_feature_select_strategy == "default")
        return torch.arange(rows * length).view(rows, length)[:, first:].reshape(-1, 1)


class InternVLTower(Tower):
    """InternVL: a CLS token and square tiles, of which pixel shuffle merges 2 x 2 patches."""

    def module(self, model: PreTrainedModel) -> PreTrainedModel:
        """The tower itself."""
        return model.model.vision_tower

    def blocks(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Its encoder layers."""
        return self.module(model).encoder.layer

    def attention(self, block: nn.Module) -> nn.Module:
        """Of an encoder layer."""
        return block.get_submodule("attention")

    def n_leading(self, model: PreTrainedModel) -> int:
        """The CLS token."""
        return 1

    def patches(self, model: PreTrainedModel, rows: int, length: int, given: Mapping[str, Any]) -> Tensor:
        """Squares of patches, tile after tile, in the order in which pixel shuffle lines their channels up."""
        merge = round(1 / model.config.downsample_ratio)
        side = round((length - 1) ** 0.5)
        grid = torch.arange(rows * length).view(rows, length)[:, 1:]
        squares = grid.view(rows, side // merge, merge, side // merge, merge)
        return squares.permute(0, 1, 3, 2, 4).reshape(-1, merge * merge)


class QwenTower(Tower):
    """Qwen2.5-VL: all images in one row, 2 x 2 patches side by side, and these squares sorted by windows."""

    def module(self, model: PreTrainedModel) -> PreTrainedModel:
        """The tower itself."""
        return model.model.visual

    def blocks(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Its blocks."""
        return self.module(model).blocks

    def attention(self, block: nn.Module) -> nn.Module:
        """Of a block."""
        return block.get_submodule("attn")

    def patches(self, model: PreTrainedModel, rows: int, length: int, given: Mapping[str, Any]) -> Tensor:
        """Where the window order has put each square of patches."""
        vision = model.config.vision_config
        merge = vision.spatial_merge_size
        window = vision.window_size // merge // vision.patch_size
        order, start = [], 0
        for _, height, width in given["grid_thw"].tolist():
            squares = start + torch.arange(height // merge * (width // merge)).view(height // merge, -1)
            bands = torch.split(squares, window)
            order += [tile.flatten() for band in bands for tile in torch.split(band, window, dim=1)]
            start += squares.numel()
        place = torch.cat(order).argsort()  # square, in reading order -> its place in the tower
        return place[:, None] * merge**2 + torch.arange(merge**2)

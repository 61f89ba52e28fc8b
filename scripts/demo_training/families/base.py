"""What a family says of its demo model: architecture, processor, prompt form, and how images become visual tokens.

Everything else (worlds, questions, stages, the training loop, evaluation, export) is the same for all families.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from capa_probe.demo.worlds import World


@dataclass(frozen=True)
class Sizes:
    """Of the vision tower and the decoder.

    Attributes:
        d_vision, vision_layers: width and layers of the tower.
        d_model, d_mlp, layers, heads, kv_heads: of the decoder.
    """

    d_vision: int = 128
    vision_layers: int = 3
    d_model: int = 256
    d_mlp: int = 256
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4


@dataclass(frozen=True)
class Grid:
    """Visual tokens that lie over a whole image in rows and columns.

    Attributes:
        rows, cols: how many.
        order: the cells of the grid, counted in reading order, in the order of their tokens.
        told: whether each token is taught to tell what it shows and where that lies; a thumbnail is too coarse.
    """

    rows: int
    cols: int
    order: tuple[int, ...]
    told: bool = True


@dataclass(frozen=True)
class Layout:
    """The visual tokens of one image.

    Attributes:
        grids: one after the other in the prompt.
        steps: (3, token) position ids (temporal, height, width) as seen from the first one of the image.
        length: how far the image moves the text behind it on.
    """

    grids: tuple[Grid, ...]
    steps: NDArray[np.int64]
    length: int

    @property
    def n_tokens(self) -> int:
        return sum(len(grid.order) for grid in self.grids)


def reading_order(rows: int, cols: int) -> Grid:
    """A grid whose tokens come in reading order."""
    return Grid(rows, cols, tuple(range(rows * cols)))


def one_after_the_other(*grids: Grid) -> Layout:
    """A layout with plain position ids, one for each token."""
    n = sum(len(grid.order) for grid in grids)
    return Layout(grids, np.broadcast_to(np.arange(n), (3, n)), n)


class DemoFamily(ABC):
    """One model family, as its demo model shows it."""

    #: As the command line calls it, and the folder of the trained model.
    name: ClassVar[str]
    folder: ClassVar[str]
    model_class: ClassVar[type[PreTrainedModel]]
    #: A prompt is opening, visual tokens, closing, question, ``ask``; the answer ends with the tokenizer's EOS.
    opening: ClassVar[str]
    closing: ClassVar[str] = ""
    ask: ClassVar[str]
    #: The prompt form in words, for the model card.
    prompt_form: ClassVar[str]
    #: Whether the tokenizer tells "What" from "what", so that both must be learned.
    capitals: ClassVar[bool] = True
    #: Whether visual tokens have three position ids each (M-RoPE), or one.
    three_positions: ClassVar[bool] = False
    #: Whether some visual tokens are taught nothing about the board (thumbnails).
    has_untold: ClassVar[bool] = False

    @abstractmethod
    def tokenizer(self, world: World) -> PreTrainedTokenizerBase:
        """The family's tokenizer class, with the words of a world."""

    @abstractmethod
    def processor(self, world: World) -> ProcessorMixin:
        """The family's processor class."""

    @abstractmethod
    def config(self, sizes: Sizes, world: World) -> PreTrainedConfig:
        """Of the whole model."""

    @abstractmethod
    def tower(self, model: PreTrainedModel) -> nn.Module:
        """The vision tower, without what maps its features onto visual tokens."""

    @abstractmethod
    def projector(self, model: PreTrainedModel) -> nn.Module:
        """What maps the tower's features onto visual tokens."""

    def decoder(self, model: PreTrainedModel) -> PreTrainedModel:
        """The decoder stack, without the output head."""
        return model.model.language_model

    def d_feature(self, sizes: Sizes) -> int:
        """Width of the tower's features of one visual token."""
        return 4 * sizes.d_vision

    def images(self, processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the tower takes, by name."""
        made = processor.image_processor(list(images), return_tensors="pt")
        return {name: made[name] for name in ("pixel_values", "image_grid_thw") if name in made}

    @abstractmethod
    def features(self, model: PreTrainedModel, images: Mapping[str, Tensor]) -> Tensor:
        """(visual token, d_feature) of all images, one image after the other."""

    def project(self, model: PreTrainedModel, features: Tensor) -> Tensor:
        """(visual token, d_feature) to (visual token, d_model)."""
        return self.projector(model)(features)

    @abstractmethod
    def layout(self, shape: tuple[int, int], world: World) -> Layout:
        """The visual tokens of an image of this (height, width)."""

    @abstractmethod
    def describe(self, sizes: Sizes, world: World) -> str:
        """The vision side in a few words, for the model card."""

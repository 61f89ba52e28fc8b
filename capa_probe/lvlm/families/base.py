"""What a model family says of itself: where its parts are, how it lays out images, what has been published for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.frames import Box
from capa_probe.lvlm.spans import ImageSpan
from capa_probe.lvlm.towers import Tower

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PaperSchedule:
    """What CAPA's paper prescribes for one checkpoint.

    Attributes:
        model: what the checkpoint is called in ``CAPA.paper``.
        n_layers: its decoder layers.
        d_model: its width.
        prune_layers: three alternative pruning layers: early, transition, late.
        hadamard_layers: layers whose FFN is approximated.
    """

    model: str
    n_layers: int
    d_model: int
    prune_layers: tuple[int, ...]
    hadamard_layers: tuple[int, ...]


@dataclass(frozen=True)
class Tiling:
    """How one image was cut up: rows and columns of tiles, and whether a thumbnail follows them."""

    rows: int
    cols: int
    thumbnail: bool

    def __len__(self) -> int:
        return self.rows * self.cols + self.thumbnail


class Family(ABC):
    """One model family of transformers. Subclasses say what differs; none of them touches the model's code."""

    #: ``config.model_type`` of the family's checkpoints.
    name: ClassVar[str]
    #: The transformers class, and a checkpoint to name in messages.
    architecture: ClassVar[str]
    example: ClassVar[str]
    #: What CAPA's paper prescribes for a checkpoint of it; None if it names none.
    schedule: ClassVar[PaperSchedule | None] = None
    #: Whether images may stand side by side in a prompt, with nothing between; all are of one size then. If not, a
    #: pruner takes every unbroken run of visual tokens for an image in ``generate``.
    images_adjoin: ClassVar[bool] = False
    #: Where its vision tower is, and which patches a visual token is made of; needed by methods that read the tower.
    tower: ClassVar[Tower | None] = None
    #: (d_model, layers, d_mlp) of a checkpoint to the sink dimensions published for it.
    published_sink_dims: ClassVar[Mapping[tuple[int, int, int], tuple[int, ...]]] = {}
    #: Prompt for processors that ship none; {images} and {question} are filled in.
    fallback_prompt: ClassVar[str | None] = None

    def text_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The decoder stack: has ``layers``, each with ``self_attn``, ``post_attention_layernorm`` and ``mlp``."""
        return model.model.language_model

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """The decoder layers, in order.

        Raises:
            CapaProbeError: the decoder keeps them elsewhere than in ``layers``.
        """
        text_model = self.text_model(model)
        if not hasattr(text_model, "layers"):
            raise CapaProbeError(
                f"The text tower is a {type(text_model).__name__} without layers of the kind of Llama's; give a model "
                "around a decoder such as Llama, Mistral, Qwen2, Qwen3 or Gemma 1."
            )
        return text_model.layers

    def image_token_id(self, model: PreTrainedModel) -> int:
        """Id of the token that stands for one visual token in ``input_ids``."""
        return int(model.config.image_token_id)

    def sink_dims(self, model: PreTrainedModel) -> tuple[int, ...] | None:
        """Sink dimensions published for a checkpoint of these sizes; None if there are none."""
        text = model.config.get_text_config()
        return self.published_sink_dims.get(
            (text.hidden_size, text.num_hidden_layers, text.intermediate_size)
        )

    def check(self, config: PreTrainedConfig) -> None:  # noqa: B027  # most families have one layout
        """Raise CapaProbeError for a member of the family that is laid out differently."""

    @abstractmethod
    def images(
        self,
        model: PreTrainedModel,
        visual: Tensor,
        inputs: Mapping[str, Any],
        tilings: Sequence[Tiling] | None,
    ) -> Iterator[ImageSpan]:
        """The images of a batch.

        Args:
            model: the wrapped model.
            visual: bool (batch, position), True at visual tokens.
            inputs: the tensors that go into the model.
            tilings: one per image, where ``prepare`` carried them along.

        Raises:
            CapaProbeError: the visual tokens do not match the images.
        """

    def processor_options(self, processor: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of ``prepare`` as the processor takes them."""
        return dict(options)

    def tilings(
        self, processor: Any, sizes: Sequence[tuple[int, int]], options: Mapping[str, Any]
    ) -> tuple[Tiling, ...] | None:
        """How the processor tiles images of these (height, width); None for a family that does not tile."""
        return None

    def seen(self, processor: Any, image: Image) -> Image:
        """The part of an RGB image that its visual tokens cover, so that their grid can be laid over it.

        Here the whole image: the processor only stretches it. Where a model tiles, the tiles are equal rectangles of
        it, and a thumbnail is all of it.
        """
        return image

    def frame(self, processor: Any, size: tuple[int, int]) -> Box:
        """Where :meth:`seen` lies in an image of this (height, width), in its pixels; it may reach beyond.

        Raises:
            CapaProbeError: that is not known for this processor.
        """
        return 0.0, 0.0, float(size[1]), float(size[0])


def expect_tokens(visual: Tensor, expected: int, what: str) -> None:
    """Raise CapaProbeError unless the batch holds as many visual tokens as its images give."""
    found = int(visual.sum())
    if found != expected:
        raise CapaProbeError(
            f"The prompts hold {found} visual tokens but the images give {expected} ({what}); "
            "use one placeholder per image, or let prepare() write them."
        )

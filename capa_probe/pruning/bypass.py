"""Tokens that bypass a layer's FFN: they never enter its matrix multiplications, and something else takes its place.

Module hooks alone do it. The FFN is handed the other rows only, as one (1, row, d_model); its output is then spread
over all positions again. Both hooks are put on the FFN anew in every forward, so that they are the last before it and
the first after it: whoever listens there, from before or from later on, sees full-length tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM
from capa_probe.lvlm.inputs import VIDEO_INPUTS

#: Decoder layer to bool (batch, position), True at the visual tokens of its current hidden state; None: there are none.
Rows: TypeAlias = Callable[[int], Tensor | None]


@dataclass(frozen=True)
class BypassedRows:
    """The rows that one FFN does not see.

    Attributes:
        layer: which decoder layer, from 0.
    """

    layer: int
    _residual: Tensor
    _normed: Tensor
    _index: Tensor

    @property
    def residual(self) -> Tensor:
        """(row, d_model) residual stream that enters the FFN block, in the model's dtype."""
        return self._residual.flatten(0, 1)[self._index]

    @property
    def normed(self) -> Tensor:
        """(row, d_model) what the FFN itself would have been given."""
        return self._normed.flatten(0, 1)[self._index]


#: Rows to what the FFN's output is to be there: (row, d_model), of any float dtype; or one number for all.
Fill: TypeAlias = Callable[[BypassedRows], Tensor | float]

_MODELS: WeakSet[PreTrainedModel] = WeakSet()


@contextmanager
def bypass(lvlm: HookedLVLM, layers: Iterable[int], rows: Rows, fill: Fill) -> Iterator[None]:
    """Let rows bypass the FFN of some layers for a ``with`` block; a layer without such rows is left alone.

    Args:
        lvlm: the model.
        layers: decoder layers, from 0.
        rows: which rows, asked once per layer and forward; a mask is not to be changed while the forward lasts.
        fill: what stands in their place.

    Raises:
        CapaProbeError: the model's FFNs are bypassed already; in the forward, a mask of another shape than the hidden
            state's.
    """
    model = lvlm.model
    if model in _MODELS:
        raise CapaProbeError(
            "An FFN approximation was attached to a model that has one already; leave the first with block, or use "
            "one object for all layers."
        )
    with ExitStack() as stack:
        _MODELS.add(model)
        stack.callback(_MODELS.discard, model)
        decoder, splits = lvlm.family.layers(model), _Splits(rows)
        for layer in layers:
            stack.callback(_Bypass(layer, decoder[layer], splits, fill).detach)
        yield


def is_bypassed(lvlm: HookedLVLM) -> bool:
    """Whether rows bypass FFNs of the model at present."""
    return lvlm.model in _MODELS


class PromptRows:
    """Finds the visual tokens of each forward in its ``input_ids``, for a model from which no token is dropped.

    Image tokens of a later turn count like those of the first; one that a decode step generated comes without an image
    and is text.

    Attributes:
        found: whether any forward so far had a visual token.
    """

    def __init__(self, lvlm: HookedLVLM) -> None:
        self.found = False
        self._lvlm, self._image_token = lvlm, lvlm.family.image_token_id(lvlm.model)
        self._visual: Tensor | None = None

    def __call__(self, layer: int) -> Tensor | None:
        """Bool (batch, position) of the present forward, the same for every layer; None without visual tokens."""
        return self._visual

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at every forward of the model for a ``with`` block."""
        model = self._lvlm.model
        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(self._after, always_call=True).remove)
            yield

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._visual = None
        encoded = kwargs.get("mm_encoder_outputs") or {}  # generate encodes images before prefill
        if any(kwargs.get(name) is not None for name in VIDEO_INPUTS) or encoded.get("video") is not None:
            raise CapaProbeError("Video input was given; only images are supported.")
        if kwargs.get("pixel_values") is None and encoded.get("image") is None:
            return
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise CapaProbeError(
                "A forward without input_ids was run while an FFN approximation is attached; pass input_ids, since "
                "image placeholders are found in them."
            )
        self._visual = ids == self._image_token
        self.found = True

    def _after(self, *_: Any) -> None:
        self._visual = None


@dataclass(frozen=True)
class _Split:
    """Flat positions (row,) in batch * position of a hidden state."""

    bypassed: Tensor
    others: Tensor


class _Splits:
    """Turns masks into positions; layers that share a mask share them, so that a GPU is waited for only once."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._layer = -1
        self._latest: tuple[Tensor, torch.device, _Split | None] | None = None

    def of(self, layer: int, hidden: Tensor) -> _Split | None:
        """Where the rows of a layer are in its hidden state (batch, position, d_model); None if there are none."""
        if layer <= self._layer:  # another forward
            self._latest = None
        self._layer = layer
        mask = self._rows(layer)
        if mask is None:
            return None
        if self._latest is None or self._latest[0] is not mask or self._latest[1] != hidden.device:
            self._latest = (mask, hidden.device, self._split(layer, mask, hidden))
        return self._latest[2]

    @staticmethod
    def _split(layer: int, mask: Tensor, hidden: Tensor) -> _Split | None:
        if mask.dtype != torch.bool or mask.shape != hidden.shape[:2]:
            raise CapaProbeError(
                f"Rows of shape {tuple(mask.shape)} and {mask.dtype} were given for layer {layer}, whose hidden state "
                f"has (batch, position) = {tuple(hidden.shape[:2])}; give a bool mask of that shape."
            )
        flat = mask.to(hidden.device).flatten()
        bypassed = flat.nonzero().flatten()
        return _Split(bypassed, (~flat).nonzero().flatten()) if len(bypassed) else None


class _Bypass:
    """The hooks on one decoder layer."""

    def __init__(self, index: int, layer: nn.Module, splits: _Splits, fill: Fill) -> None:
        self._index, self._splits, self._fill = index, splits, fill
        self._mlp = layer.get_submodule("mlp")
        self._around_mlp: list[RemovableHandle] = []
        # The norm is called with the residual stream itself, to which the layer then adds the FFN's output.
        norm = layer.get_submodule("post_attention_layernorm")
        self._on_norm = norm.register_forward_pre_hook(self._at_norm)

    def detach(self) -> None:
        self._on_norm.remove()
        self._clear()

    def _clear(self) -> None:
        for handle in self._around_mlp:
            handle.remove()
        self._around_mlp = []

    def _at_norm(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._clear()  # a forward that ended inside the FFN
        residual = args[0]
        split = self._splits.of(self._index, residual)
        if split is None:
            return
        rows: list[BypassedRows] = []

        def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            normed = args[0]
            rows.append(BypassedRows(self._index, residual, normed, split.bypassed))
            return (normed.flatten(0, 1)[split.others][None], *args[1:])

        def widen(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            self._clear()
            whole = output.new_empty(residual.shape).flatten(0, 1)
            whole.index_copy_(0, split.others, output[0])
            filled = self._fill(rows.pop())
            if isinstance(filled, Tensor):
                whole.index_copy_(0, split.bypassed, filled.to(output.dtype))
            else:
                whole.index_fill_(0, split.bypassed, filled)
            return whole.view(residual.shape)

        self._around_mlp = [
            self._mlp.register_forward_pre_hook(narrow),
            self._mlp.register_forward_hook(widen, prepend=True),
        ]

"""The interface of whatever stands in for the FFN of visual tokens."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM
from capa_probe.lvlm.attached import refuse_pruner
from capa_probe.lvlm.checks import refuse_compiled
from capa_probe.pruning.bypass import Fill, PromptRows, Rows, bypass


class VisualFFN(ABC):
    """Something that takes the place of the FFN for visual tokens, in some layers.

    While it is attached, those tokens skip the FFN's matrix multiplications; text goes through it, and so does padding,
    which no real token sees. Hook points of the layer fire with all positions: ``mlp.hook_in`` shows what the
    FFN would have got, ``hook_mlp_out`` what is added to the residual stream, substitute included, and
    ``hook_resid_post`` the sum. Edits there count; one of ``mlp.hook_in`` reaches visual tokens only where their
    substitute depends on the normed input.

    Attributes:
        layers: the decoder layers, from 0, in rising order.
    """

    layers: tuple[int, ...]

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = check_layers(layers)

    @contextmanager
    def attach(self, lvlm: HookedLVLM) -> Iterator[VisualFFN]:
        """Put it on a model from which no token is dropped, for a ``with`` block, ``generate`` included.

        Visual tokens are found in the ``input_ids`` of each forward. Where none passed by until the end of the
        block, a warning says so.

        Raises:
            CapaProbeError: it is for other layers or another model, or the model has one or a pruner already; in the
                forward, video input or no ``input_ids``.
        """
        refuse_compiled(lvlm.model)
        refuse_pruner(lvlm.model, type(self).__name__)
        rows = PromptRows(lvlm)
        with self.attach_rows(lvlm, rows), rows.watching():
            yield self
        if not rows.found:
            warnings.warn(
                f"{type(self).__name__} was attached, but no forward had a visual token, so it changed nothing.",
                stacklevel=3,
            )

    @contextmanager
    def attach_rows(self, lvlm: HookedLVLM, rows: Rows) -> Iterator[VisualFFN]:
        """The same where the caller knows which rows are visual, as when tokens have been dropped.

        Args:
            lvlm: the model.
            rows: decoder layer to bool (batch, position), True at the visual tokens of that layer's current hidden
                state; None if there are none. Asked once per layer and forward.

        Raises:
            CapaProbeError: as for :meth:`attach`; in the forward, a mask of another shape than the hidden state's.
        """
        self.check(lvlm)
        with bypass(lvlm, self.layers, rows, self._fill()):
            yield self

    def check(self, lvlm: HookedLVLM) -> None:
        """Refuse a model that it is not for.

        Raises:
            CapaProbeError: the model lacks a layer, or is another one.
        """
        if self.layers[-1] >= lvlm.n_layers:
            raise CapaProbeError(
                f"{type(self).__name__} is for layer {self.layers[-1]}, but the model has layers 0 to "
                f"{lvlm.n_layers - 1}; use layers that it has."
            )

    @abstractmethod
    def _fill(self) -> Fill:
        """What the FFN's output is to be at visual tokens."""


def check_layers(layers: Iterable[int], n_layers: int | None = None) -> tuple[int, ...]:
    """Layers in rising order.

    Args:
        layers: whole numbers from 0, each once.
        n_layers: how many the model has; None if it is not known.

    Raises:
        CapaProbeError: they are not that.
    """
    given = list(layers) if isinstance(layers, Iterable) else [layers]
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in given)
    if not given or not whole or len({*given}) < len(given):
        raise CapaProbeError(
            f"layers={given!r} was given; give at least one decoder layer, as whole numbers from 0, each once."
        )
    if n_layers is not None and max(given) >= n_layers:
        raise CapaProbeError(
            f"Layer {max(given)} was given, but the model has layers 0 to {n_layers - 1}; give some of these."
        )
    return tuple(sorted(given))

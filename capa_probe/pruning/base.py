"""Pruners: what every method that drops visual tokens has in common.

A method is a frozen dataclass whose fields are its hyperparameters, with one method: from what the hook points offer at
a layer to a score per visual token. To add one, subclass :class:`Pruner` in a file of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM
from capa_probe.lvlm.attached import pruning
from capa_probe.lvlm.checks import refuse_compiled
from capa_probe.lvlm.tap import check_backend
from capa_probe.pruning.bypass import is_bypassed
from capa_probe.pruning.engine import Engine
from capa_probe.pruning.keep import Budget, Keep, check_keep, select
from capa_probe.pruning.scoring import Scoring
from capa_probe.pruning.showing import describe_pruner, pruner_html
from capa_probe.pruning.trace import Trace

Execution: TypeAlias = Literal["compact", "masked"]
#: From a layer to bool (batch, position): visual tokens among the rows of its hidden states; None: no such.
VisualRows: TypeAlias = Callable[[int], Tensor | None]

_CHOICES = {
    "execution": ("compact", "masked"),
    "score_at": ("previous", "same"),
    "budget": ("sample", "image"),
    "positions": ("original", "compacted"),
}


@dataclass(frozen=True)
class Pruner(ABC):
    """Scores visual tokens at its layers, keeps the best, and drops the others from there on; text always stays.

    Attributes:
        layers: decoder layers, counted from 0, before which tokens are dropped. With none, nothing is.
        keep: share of the *original* visual tokens in (0, 1], or, above 1, their number: ``max(1, round(keep * N))``
            stay, ties going to the lower position. One for all layers, or a tuple with one for each.
        execution: "compact" takes tokens out of hidden states, masks and KV caches; "masked" leaves them there and
            hides them from every later query (the slow reference).
        score_at: "previous": layer l drops by the scores of layer l - 1's attention, before its own; "same": by its
            own, after it. Where scores need no attention, only where tokens go differs.
        budget: count ``keep`` over all images of a "sample", or over each "image".
        positions: rotary positions of what is left: "original", or "compacted" (gaps closed).
        allow_none: allow ``keep=0``, which drops every visual token.
    """

    layers: tuple[int, ...] = ()
    keep: Keep | tuple[Keep, ...] = 0.25
    execution: Execution = "compact"
    score_at: Literal["previous", "same"] = "previous"
    budget: Budget = "sample"
    positions: Literal["original", "compacted"] = "original"
    allow_none: bool = False

    #: Whether it scores by an attention call. If not, it is asked just before tokens go, which may be before layer 0.
    uses_attention: ClassVar[bool] = True
    #: What it reads of the vision tower, through ``scoring.tower``: "features", "attention", or both.
    tower: ClassVar[tuple[Literal["features", "attention"], ...]] = ()

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            chosen = getattr(self, name)
            if chosen not in known:
                raise CapaProbeError(f'{name}={chosen!r} was given; give "{known[0]}" or "{known[1]}".')
        given: Any = self.layers
        layers = tuple(given) if isinstance(given, Iterable) else (given,)
        if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
            raise CapaProbeError(f"layers={self.layers!r} was given; give whole numbers, such as (5,).")
        if list(layers) != sorted(set(layers)):
            raise CapaProbeError(f"layers={layers} was given; give different layers in rising order.")
        object.__setattr__(self, "layers", layers)
        keep_given: Any = self.keep
        if isinstance(keep_given, list):
            object.__setattr__(self, "keep", tuple(keep_given))
        if isinstance(self.keep, tuple) and len(self.keep) != len(layers):
            raise CapaProbeError(
                f"keep={self.keep} holds {len(self.keep)} values for the pruning layers {layers}; give one for all, "
                "or one for each."
            )
        keeps = [*self.keeps.values()] if layers else [self.keep] if not isinstance(self.keep, tuple) else []
        for keep in keeps:
            check_keep(keep, self.allow_none)
        for before, after in pairwise(keeps):
            if _is_share(before) == _is_share(after) and after > before:
                raise CapaProbeError(
                    f"keep={self.keep} was given, which rises from layer to layer; both count the original visual "
                    "tokens, and dropped ones do not come back, so give values that do not rise."
                )

    @property
    def keeps(self) -> dict[int, Keep]:
        """Budget of every pruning layer."""
        keep = self.keep if isinstance(self.keep, tuple) else (self.keep,) * len(self.layers)
        return dict(zip(self.layers, keep, strict=True))

    @property
    def scored_by(self) -> str | tuple[str, ...] | None:
        """What :mod:`capa_probe.flops` counts as the cost of its scores; None if it cannot count them."""
        return None

    @property
    def every_step(self) -> bool:
        """Whether tokens are ranked anew at every decode step, instead of dropped once at prefill."""
        return False

    @property
    def uses_residual(self) -> bool:
        """Whether it is given the residual stream that enters the scored layer."""
        return False

    @abstractmethod
    def score_tokens(self, scoring: Scoring) -> Tensor:
        """How much each token is worth keeping: (batch, key), higher is kept; read at ``scoring.visual`` only."""

    def protected(self, scoring: Scoring) -> Tensor | None:
        """Visual tokens that stay whatever the budget: bool (batch, key), or None."""
        return None

    def choose(
        self, scores: Tensor, image: Tensor, alive: Tensor, keep: Keep, protected: Tensor | None
    ) -> Tensor:
        """From scores to the tokens that stay: those of :func:`capa_probe.pruning.keep.select` unless overridden.

        Args:
            scores: (batch, position), higher is kept first; read at living visual tokens only.
            image: (batch, position) image index of each original visual token, -1 elsewhere.
            alive: bool (batch, position), tokens that are still there.
            keep: share of the original visual tokens, or their number.
            protected: bool (batch, position), visual tokens that stay in any case; None for none.

        Returns:
            bool (batch, position), part of ``alive``: text, and the visual tokens that stay.
        """
        return select(scores, image, alive, keep, self.budget, protected)

    def alongside(
        self, lvlm: HookedLVLM, visual_rows: VisualRows, trace: Trace
    ) -> AbstractContextManager[Any]:
        """What else runs while the pruner is attached, such as another FFN."""
        return nullcontext()

    @contextmanager
    def attach(self, lvlm: HookedLVLM) -> Iterator[Trace]:
        """Prune every forward and generation of the model, for a ``with`` block.

        Tokens are scored and dropped when the KV cache is empty (prefill); decode steps and later turns on that cache
        see what was kept. Images that come in a later turn stay whole, with a warning, and so does a prompt without an
        image. Logits at positions that were dropped do not exist: they are NaN, in both executions; so are, when
        compact, those at padding. ``output_hidden_states`` returns every layer at its own length.

        Yields:
            The record of the latest prefill, filled as the model runs.

        Raises:
            CapaProbeError: a layer is out of range, a pruner or an FFN approximation is attached already, or (when the
                model runs) the way of generating is not supported.
        """
        if not isinstance(lvlm, HookedLVLM):
            raise CapaProbeError(
                f"{type(self).__name__} was to be attached to a {type(lvlm).__name__}; give a HookedLVLM, which wraps "
                "the model."
            )
        name, shortens = type(self).__name__, self.execution == "compact" and not self.every_step
        with pruning(lvlm.model, name, shortens and bool(self.layers)):
            if is_bypassed(lvlm):
                raise CapaProbeError(
                    f"{name} was to be attached to a model on which an FFN approximation is attached already; leave "
                    "its with block first (CAPA takes one as ffn)."
                )
            self._check(lvlm)
            engine = Engine(self, lvlm)
            with engine.attached(), self.alongside(lvlm, engine.visual_rows, engine.trace):
                yield engine.trace

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # The decorator of a data class writes a __repr__ with every field where it finds none.
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = Pruner.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return describe_pruner(self)

    def _repr_html_(self) -> str:
        return pruner_html(self)

    def _check(self, lvlm: HookedLVLM) -> None:
        refuse_compiled(lvlm.model)
        check_backend(lvlm.family.text_model(lvlm.model))
        text = lvlm.model.config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ())
        if not kinds and getattr(text, "sliding_window", None) is not None:  # Mistral
            kinds = {"sliding_attention"}
        if self.layers and kinds - {"full_attention"}:
            raise CapaProbeError(
                f"The model has layers of {min(kinds - {'full_attention'})}, whose window counts dropped tokens too; "
                "set use_sliding_window=False (Mistral: sliding_window=None) in its config, or use a model with full "
                "attention only."
            )
        first = 1 if self.uses_attention and self.score_at == "previous" else 0
        last = lvlm.n_layers - (2 if self.score_at == "same" else 1)
        for layer in self.layers:
            if not first <= layer <= last:
                raise CapaProbeError(
                    f"layers={self.layers} was given for a model of {lvlm.n_layers} layers; with "
                    f'score_at="{self.score_at}" give layers from {first} to {last}.'
                )


def _is_share(keep: Keep) -> bool:
    return not (isinstance(keep, int) and keep > 1)

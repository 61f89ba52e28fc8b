"""Which pruner is on a model at present, so that what cannot run beside it is refused before the model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from capa_probe.errors import CapaProbeError

#: Model to the pruner's name, and whether it takes tokens out of the hidden states.
_PRUNERS: WeakKeyDictionary[PreTrainedModel, tuple[str, bool]] = WeakKeyDictionary()


@contextmanager
def pruning(model: PreTrainedModel, name: str, shortens: bool) -> Iterator[None]:
    """Note a pruner for a ``with`` block.

    Args:
        model: the model that it is on.
        name: of its class.
        shortens: whether hidden states lose positions.

    Raises:
        CapaProbeError: there is one already.
    """
    refuse_pruner(model, name)
    _PRUNERS[model] = (name, shortens)
    try:
        yield
    finally:
        del _PRUNERS[model]


def refuse_pruner(model: PreTrainedModel, name: str) -> None:
    """Refuse to attach something to a model that has a pruner.

    Raises:
        CapaProbeError: it has.
    """
    if model in _PRUNERS:
        raise CapaProbeError(
            f"{name} was to be attached to a model on which {_PRUNERS[model][0]} is attached already; leave that one's "
            "with block first."
        )


def refuse_shortened(model: PreTrainedModel, what: str) -> None:
    """Refuse what needs every token of the prompt in every layer.

    Args:
        model: the model that it would run.
        what: was asked for, such as "A profile".

    Raises:
        CapaProbeError: a pruner takes tokens out.
    """
    name, shortens = _PRUNERS.get(model, ("", False))
    if shortens:
        raise CapaProbeError(
            f"{what} was asked for while {name} takes tokens out of the model; leave its with block first, or attach "
            'it with execution="masked".'
        )

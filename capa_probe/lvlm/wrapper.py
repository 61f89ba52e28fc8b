"""A module with hook points around a model that is none of its submodules, and yet moves and saves as that model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformers import PreTrainedModel


class Wrapper(HookedRootModule):
    """What a ``torch.nn.Module`` does to its parameters, done to the wrapped model's.

    Attributes:
        model: the wrapped model.
    """

    model: PreTrainedModel

    def wrap(self, model: PreTrainedModel) -> None:
        """Take a model."""
        # Kept out of the module tree: TransformerLens writes a name on every submodule, and the model is not ours.
        object.__setattr__(self, "model", model)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the wrapped model, as ``torch.nn.Module.to``."""
        self.model.to(*args, **kwargs)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.model._apply(fn, recurse)  # what .cuda(), .half(), .double() and the like do
        return self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The wrapped model's parameters, by its own names; so ``parameters()`` and ``requires_grad_()`` as well."""
        yield from self.model.named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The wrapped model's state."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the wrapped model."""
        return self.model.load_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Set the wrapped model's training mode."""
        self.model.train(mode)
        self.training = mode
        return self

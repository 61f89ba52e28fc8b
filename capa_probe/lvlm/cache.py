"""What ``run_with_cache`` returns: a dict of activations that knows which model they are of."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from capa_probe.lvlm.hooked import HookedLVLM


class HookedCache(dict[str, Tensor]):
    """Activations by the name of their hook point.

    Attributes:
        lvlm: the model that they are of; kept alive as long as the cache is.
        has_batch_dim: whether their first axis is the batch.
    """

    def __init__(self, activations: dict[str, Tensor], lvlm: HookedLVLM, has_batch_dim: bool = True) -> None:
        super().__init__(activations)
        self.lvlm, self.has_batch_dim = lvlm, has_batch_dim

    def __reduce__(self) -> tuple[type[OrderedDict[str, Tensor]], tuple[list[tuple[str, Tensor]]]]:
        # Copied or saved, it is a dict of tensors and takes no model along; an ordered one, because torch.load reads
        # that with weights_only=True.
        return OrderedDict, (list(self.items()),)

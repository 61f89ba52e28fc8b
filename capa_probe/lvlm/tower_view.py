"""What the vision tower made of a prompt's images, one entry per visual token, in the order of the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.hooked import HookedLVLM
from capa_probe.lvlm.tap import AttentionCall, listen, unlisten

#: Attention probabilities that are in memory at a time.
_AT_ONCE = 2**24


@dataclass(frozen=True)
class TowerView:
    """The feature layer of the vision tower: the block whose output becomes the visual tokens.

    ``visual`` counts the visual tokens of all images of a forward; with ``patch``, the patches that are merged into
    one (1 in LLaVA, 4 in Qwen2.5-VL and InternVL), in the order in which the projector takes them.

    Attributes:
        features: (visual, patch, d_vision) output of the block, before any norm that follows.
        received: (visual, patch) attention that a patch gets from all patches, mean over heads, summed over them: 1 on
            average where there is no CLS token. float32; None where attention was not asked for.
        given: (visual, patch) attention that a patch gives to all patches: 1 less what goes to a CLS token.
    """

    features: Tensor
    received: Tensor | None = None
    given: Tensor | None = None


class TowerListener:
    """Watches the vision tower, on its own attention backend.

    Args:
        lvlm: the model.
        attention: whether to sum up attention as well, which costs one more softmax of the feature layer.

    Raises:
        CapaProbeError: the tower's feature layer or its backend is not supported.
    """

    def __init__(self, lvlm: HookedLVLM, attention: bool = False) -> None:
        tower = lvlm.family.tower
        if tower is None:
            raise CapaProbeError(
                f"The vision tower of {lvlm.family.name} models is not described, so that no method can read it; "
                "use another method, or give the family a tower."
            )
        self._lvlm, self._tower, self._with_attention = lvlm, tower, attention
        self._block = self._tower.feature_block(lvlm.model)
        self.forget()

    def forget(self) -> None:
        """Let go of what was seen."""
        self._given: dict[str, Any] = {}
        self._features: Tensor | None = None
        self._received: list[Tensor] = []
        self._sent: list[Tensor] = []

    @contextmanager
    def listening(self) -> Iterator[TowerListener]:
        """Watch every run of the tower for a ``with`` block; the latest one counts."""
        module = self._tower.module(self._lvlm.model)
        with ExitStack() as stack:
            stack.callback(self.forget)
            stack.callback(module.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            stack.callback(self._block.register_forward_hook(self._end_of_block).remove)
            if self._with_attention:
                attention = self._tower.attention(self._block)
                listen(module, attention, 0, self)
                stack.callback(unlisten, module, attention, self)
            yield self

    def view(self) -> TowerView | None:
        """What the tower's latest run gave; None if it did not run."""
        if self._features is None:
            return None
        features = self._features if self._features.ndim == 3 else self._features[None]
        rows, length, width = features.shape
        index = self._tower.patches(self._lvlm.model, rows, length, self._given).to(features.device)
        received = sent = None
        if self._received:
            # One call holds all rows, or a piece of the only one.
            received, sent = (
                torch.cat(parts, dim=1).flatten()[index] for parts in (self._received, self._sent)
            )
        return TowerView(features.reshape(-1, width)[index], received, sent)

    def on_call(self, call: AttentionCall) -> AttentionCall:
        """Sum up the attention of the feature layer."""
        with torch.no_grad():
            received, sent = patch_attention(call, self._tower.n_leading(self._lvlm.model))
        self._received.append(received)
        self._sent.append(sent)
        return call

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.forget()
        self._given = dict(kwargs)

    def _end_of_block(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._features = hidden.detach()


def patch_attention(call: AttentionCall, n_leading: int) -> tuple[Tensor, Tensor]:
    """Attention received and given among patches, each (batch, position), float32, mean over heads; 0 at a CLS token.

    Args:
        call: an attention call of a vision tower.
        n_leading: tokens before the patches, whose rows and columns are left out.
    """
    batch, heads, length = call.query.shape[:3]
    received = call.query.new_zeros((batch, length), dtype=torch.float32)
    sent = torch.zeros_like(received)
    step = max(1, _AT_ONCE // (batch * heads * length))
    for start in range(n_leading, length, step):
        stop = min(start + step, length)
        block = call.probabilities(start, stop).mean(dim=1)[..., n_leading:]
        received[:, n_leading:] += block.sum(dim=1)
        sent[:, start:stop] = block.sum(dim=2)
    return received, sent

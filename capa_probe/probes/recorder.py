"""Runs probes beside a forward: attaches them, hands them activations, keeps the small tensors they return."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import AttentionCall, HookedLVLM, TokenSpans
from capa_probe.probes.base import AttentionProbe, Probe, ResidualProbe, StepContext


def not_one_forward_per_step() -> CapaProbeError:
    """What to raise where the forwards that a recorder saw are not one prefill and one forward for each new token."""
    return CapaProbeError(
        "The model ran other forwards than one prefill and one for each generated token while it was measured; do not "
        "run it from within a hook, and turn prefill in chunks and assisted generation off in its generation_config."
    )


#: With fewer decode steps than that, keeping something from step to step costs more than it saves.
STEPS_TO_REMEMBER = 8
#: Decode steps whose residual stream is measured at once: a token's few numbers take longer to ask for than to compute,
#: all the more after a layer's weights have passed through the processor's caches.
STEPS_AT_ONCE = 16


class Recorder:
    """Collects the columns of one batch, over prefill and decode steps.

    Args:
        lvlm: the model to listen to.
        probes: what to measure.
        spans: spans of the batch.
        sink_dims: dimensions that sink strength is restricted to; None for all.
        steps: decode steps that are to follow prefill.
    """

    def __init__(
        self,
        lvlm: HookedLVLM,
        probes: Sequence[Probe],
        spans: TokenSpans,
        sink_dims: tuple[int, ...] | None = None,
        steps: int = 0,
    ) -> None:
        self.lvlm, self.spans, self.sink_dims = lvlm, spans, sink_dims
        self._attention = [probe for probe in probes if isinstance(probe, AttentionProbe)]
        self._residual = [probe for probe in probes if isinstance(probe, ResidualProbe)]
        self._points = sorted({point for probe in self._residual for point in probe.points})
        #: One entry per step: column to one (batch, key or query) tensor per layer.
        self.steps: list[dict[str, list[Tensor]]] = []
        #: (layer, point) to the activations, (batch, 1, d_model), of decode steps that are yet to be measured.
        self._waiting: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
        self._n_waiting = 0
        self._context: StepContext | None = None
        self._memory: dict[Hashable, Any] | None = None
        # A quantized cache hands out other values of a key at every step.
        if steps >= STEPS_TO_REMEMBER and lvlm.model.generation_config.cache_implementation != "quantized":
            self._memory = {}

    @contextmanager
    def attached(self) -> Iterator[Recorder]:
        """Listen for the length of a ``with`` block.

        Raises:
            CapaProbeError: the forwards in it are not one prefill and one for each new token.
        """
        with ExitStack() as stack:
            stack.enter_context(self.lvlm.hooks([("hook_embed", self._begin_step), *self._residual_hooks()]))
            if self._attention:
                stack.enter_context(self.lvlm.attention_calls(self._on_attention))
            yield self
        if not self._step_is_whole():
            raise not_one_forward_per_step()
        if self._context is not None:
            self._measure_waiting(self._context)
            for probe in self._attention:
                probe.finish(self._context)

    def column(self, step: int, name: str) -> Tensor | None:
        """A column of one step as (layer, batch, key or query) on the CPU; None if no probe fills it there."""
        layers = self.steps[step].get(name)
        if layers is None:
            return None
        device = layers[0].device  # with a device map, layers lie on several
        return torch.stack([x.to(device) for x in layers]).cpu()

    def _begin_step(self, x: Tensor, hook: object) -> None:
        step = len(self.steps)
        n_queries = self.spans.padding.shape[1] if step == 0 else 1
        if not self._step_is_whole() or x.shape[1] != n_queries:
            raise not_one_forward_per_step()
        if self._context is not None and self._n_waiting == STEPS_AT_ONCE:
            self._measure_waiting(self._context)
        self._n_waiting += step > 0
        query = self.spans.last if step == 0 else torch.zeros_like(self.spans.last)
        self._context = StepContext(step, query, self.spans, self.lvlm.norm_eps, self.sink_dims, self._memory)
        self.steps.append(defaultdict(list))

    def _step_is_whole(self) -> bool:
        """Whether the latest step has passed through every layer, once."""
        if not self.steps:
            return True
        places = self.lvlm.n_layers * len(self._points)
        kept = {len(layers) for layers in self.steps[-1].values()}
        at_once = bool(self._attention) or len(self.steps) == 1
        waiting = {len(x) for x in self._waiting.values()} if len(self._waiting) == places else set()
        return kept == ({self.lvlm.n_layers} if at_once else set()) and (
            self._n_waiting == 0 or not self._points or waiting == {self._n_waiting}
        )

    def _keep(self, columns: Mapping[str, Tensor], step: int = -1) -> None:
        for name, values in columns.items():
            self.steps[step][name].append(values.detach())

    def _on_attention(self, call: AttentionCall) -> None:
        assert self._context is not None
        row = call.row(self._context.query)
        for probe in self._attention:
            columns = probe.measure(call, row, self._context)
            self._keep({name: self._all_keys(name, x, call, probe.passed) for name, x in columns.items()})

    def _all_keys(self, name: str, values: Tensor, call: AttentionCall, passed: float | None) -> Tensor:
        """A column with a value for the keys, too, that a sliding window's cache has dropped: those on the left."""
        step = len(self.steps) - 1
        n_passed = self.spans.padding.shape[1] + step - call.key.shape[2]
        if n_passed <= 0:
            return values
        if passed is None:
            before = self.steps[step - 1][name][call.layer][:, :n_passed]
            return torch.cat([before, values], dim=1)
        return F.pad(values, (n_passed, 0), value=passed)

    def _residual_hooks(self) -> list[tuple[str, Callable[..., None]]]:
        held: dict[int, dict[str, Tensor]] = defaultdict(dict)

        def listener(layer: int, point: str) -> Callable[..., None]:
            def on_activation(x: Tensor, hook: object) -> None:
                assert self._context is not None
                if self._context.step:
                    # A copy: what comes later may write over it.
                    self._waiting[layer, point].append(x.detach().clone())
                    return
                activations = held[layer]
                activations[point] = x
                for probe in self._residual:
                    # Each probe is asked once, when the last activation that it needs arrives.
                    if point in probe.points and all(needed in activations for needed in probe.points):
                        self._keep(probe.measure(activations, self._context))
                if len(activations) == len(self._points):
                    del held[layer]

            return on_activation

        return [
            (f"blocks.{layer}.{point}", listener(layer, point))
            for layer in range(self.lvlm.n_layers)
            for point in self._points
        ]

    def _measure_waiting(self, context: StepContext) -> None:
        """Fill the columns that come from the residual stream of the latest decode steps."""
        n, first = self._n_waiting, len(self.steps) - self._n_waiting
        for layer in range(self.lvlm.n_layers) if self._waiting else ():
            activations = {point: torch.cat(self._waiting[layer, point], dim=1) for point in self._points}
            for probe in self._residual:
                columns = probe.measure(activations, context)
                for step in range(n):
                    self._keep({name: x[:, step : step + 1] for name, x in columns.items()}, first + step)
        self._waiting.clear()
        self._n_waiting = 0

"""What a probe is: it listens to hook points of one layer and returns a small number per token.

A probe keeps nothing and never sees a whole attention pattern unless it asks for some rows of it. To add one,
write a subclass in a file of its own and name it in ``capa_probe.schema.PROBE_COLUMNS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from capa_probe.lvlm.spans import TokenSpans
from capa_probe.lvlm.tap import AttentionCall


@dataclass(frozen=True)
class StepContext:
    """What a probe may know about the forward it listens to.

    Attributes:
        step: 0 for prefill, t for the forward of the t-th generated token.
        query: (batch,) index, in this forward's query axis, of the current query token: the last prompt token that
            is not padding at prefill, the generated token at a decode step.
        spans: kinds of the prompt's positions.
        norm_eps: epsilon of the model's RMSNorm.
        sink_dims: dimensions that sink strength is restricted to; None for all.
        memory: where a probe may keep tensors of a batch from one decode step to the next; None where too few steps
            follow for that to pay, or where the cache changes what it holds of earlier tokens.
    """

    step: int
    query: Tensor
    spans: TokenSpans
    norm_eps: float
    sink_dims: tuple[int, ...] | None = None
    memory: dict[Hashable, Any] | None = None


class Probe(ABC):
    """Turns activations of one layer into columns of the token table."""

    #: Name by which ``profile(probes=...)`` asks for it.
    name: ClassVar[str]
    #: Columns it fills, in the order of the token table.
    columns: ClassVar[tuple[str, ...]]
    #: Those of them that may be NaN at a token that they apply to; elsewhere a NaN stops the run.
    may_be_nan: ClassVar[tuple[str, ...]] = ()
    #: Whether it runs unless named.
    default: ClassVar[bool] = True


class AttentionProbe(Probe):
    """Reads one attention call per layer and fills a value for every key."""

    #: What a key is given at a decode step whose sliding window has passed it, so that the cache no longer holds it:
    #: a number, or None for its value at the step before.
    passed: ClassVar[float | None] = 0.0

    @abstractmethod
    def measure(self, call: AttentionCall, row: Tensor, context: StepContext) -> dict[str, Tensor]:
        """Columns of one layer.

        Args:
            call: the layer's attention call.
            row: (batch, head, key) attention probabilities of the current query token, float32.
            context: step, query and spans.

        Returns:
            Column name to (batch, key), NaN where the column does not apply.
        """

    def finish(self, context: StepContext) -> None:
        """Called after the last forward of a batch: fill, in place, columns that ``measure`` returned too early.

        A column of fewer keys than the prompt and the tokens so far have, since a sliding window's cache has dropped
        some, is copied when it is returned, and has to be filled by then.
        """
        return


class ResidualProbe(Probe):
    """Reads activations along the residual stream and fills a value for every query.

    The tokens of several decode steps come as the queries of one call.
    """

    #: Hook points of a layer that it needs, such as ``"hook_resid_mid"``.
    points: ClassVar[tuple[str, ...]]

    @abstractmethod
    def measure(self, activations: Mapping[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Columns of one layer.

        Args:
            activations: each of ``points`` to (batch, query, d_model).
            context: step (the last of those that come together), query and spans.

        Returns:
            Column name to (batch, query).
        """

"""Samples, in batches of model inputs: what everything that runs a model over data iterates over."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from torch import Tensor

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM
from capa_probe.lvlm.inputs import LVLMInputs
from capa_probe.samples import Sample, data_fingerprint


class Batches:
    """Iterates once over samples as ``(ids, inputs)``, inputs on the model's device.

    Args:
        lvlm: the model whose processor prepares the samples.
        samples: :class:`Sample` objects, or dicts of prepared tensors, whose rows are then samples with ids
            "0", "1", ... in order.
        batch_size: samples per batch; dicts of prepared tensors come as they are.
        limit: stop after this many samples; ids may then be fewer than rows of the last batch.

    Attributes:
        total: number of samples, or None where it cannot be known beforehand.
        seen: number of samples handed out so far.

    Raises:
        CapaProbeError: an object that is neither, a mixture, or two samples of one id.
    """

    def __init__(
        self,
        lvlm: HookedLVLM,
        samples: Iterable[Sample] | Iterable[Mapping[str, Any]],
        batch_size: int = 1,
        limit: int | None = None,
    ) -> None:
        self._lvlm, self._batch_size, self._limit = lvlm, batch_size, limit
        self.seen = 0
        self.total: int | None = None
        self._samples: list[Sample] | None = None
        self._hash = hashlib.sha256()
        if isinstance(samples, (str, Sample, Mapping)):
            raise CapaProbeError(
                f"A single {type(samples).__name__} was given as samples; give a list of samples "
                "(load_samples(folder) makes one) or of tensor dicts."
            )
        iterator = iter(samples)
        first = next(iterator, None)
        rest: Iterator[Any] = itertools.chain([] if first is None else [first], iterator)
        if isinstance(first, Mapping):
            self._source = rest
            if isinstance(samples, Sized) and limit is None:
                self.total = sum(
                    len(batch.get("input_ids", ())) for batch in samples if isinstance(batch, Mapping)
                )
        else:
            self._samples = list(itertools.islice(rest, limit))
            self._check(self._samples)
            self.total = len(self._samples)

    def __iter__(self) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
        return self._prepared() if self._samples is None else self._prepare(self._samples)

    def fingerprint(self) -> str:
        """SHA-256 over everything handed out: the same data gives the same fingerprint."""
        return self._hash.hexdigest() if self._samples is None else data_fingerprint(self._samples)

    def _prepare(self, samples: list[Sample]) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
        for start in range(0, len(samples), self._batch_size):
            batch = samples[start : start + self._batch_size]
            ids = [sample.id for sample in batch]
            images = [sample.open_images() for sample in batch]
            try:
                # On the left, so that decode steps can follow; what is measured does not depend on it.
                inputs = self._lvlm.prepare(
                    images, [sample.question for sample in batch], padding_side="left"
                )
            except CapaProbeError as error:
                raise CapaProbeError(f"Sample {', '.join(ids)}: {error}") from error
            self.seen += len(ids)
            yield ids, inputs

    def _prepared(self) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
        for batch in self._source:
            if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
                raise CapaProbeError(
                    f"A {type(batch).__name__} without input_ids was given among tensor dicts; give only dicts of "
                    "tensors as lvlm.prepare makes them."
                )
            # Labels would ask for a loss over logits that are not computed.
            inputs = LVLMInputs(
                {
                    name: value.to(self._lvlm.device) if isinstance(value, Tensor) else value
                    for name, value in batch.items()
                    if name != "labels"
                }
            )
            inputs.tilings = getattr(batch, "tilings", None)
            n_rows = len(inputs["input_ids"])
            kept = n_rows if self._limit is None else min(n_rows, self._limit - self.seen)
            ids = [str(self.seen + row) for row in range(kept)]
            for name, value in sorted(inputs.items()):
                if isinstance(value, Tensor):
                    self._hash.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                    self._hash.update(value.detach().cpu().float().numpy().tobytes())
            self.seen += kept
            yield ids, inputs
            if self.seen == self._limit:
                return  # before the source makes another one

    @staticmethod
    def _check(samples: list[Sample]) -> None:
        ids = set()
        for sample in samples:
            if not isinstance(sample, Sample):
                raise CapaProbeError(
                    f"A {type(sample).__name__} was given among samples; give cp.Sample objects, or only dicts of "
                    "prepared tensors."
                )
            if sample.id in ids:
                raise CapaProbeError(
                    f"Two samples have the id {sample.id!r}; give every sample an id of its own."
                )
            ids.add(sample.id)

"""Samples, in batches of model inputs: what everything that runs a model over data iterates over."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from PIL import Image
from torch import Tensor

from capa_probe.errors import BadImageError, CapaProbeError, OtherRunError
from capa_probe.lvlm import HookedLVLM
from capa_probe.lvlm.inputs import LVLMInputs
from capa_probe.samples import Fingerprint, Sample

logger = logging.getLogger(__name__)


class Batches:
    """Iterates once over samples as ``(ids, inputs)``, inputs on the model's device.

    Args:
        lvlm: the model whose processor prepares the samples.
        samples: :class:`Sample` objects, or dicts of prepared tensors, whose rows are then samples with ids
            "0", "1", ... in order.
        batch_size: samples per batch; dicts of prepared tensors come as they are.
        limit: stop after this many samples; ids may then be fewer than rows of the last batch.
        strict: raise at the first image that cannot be used, rather than leave its sample out.

    Attributes:
        total: number of samples, or None where it cannot be known beforehand.
        seen: number of samples so far, those left out included.
        skipped: samples left out so far, ``{"sample": id, "reason": sentence}`` each.

    Raises:
        CapaProbeError: an object that is neither, a mixture, or two samples of one id.
        BadImageError: with ``strict``, an image that is missing, corrupt or empty.
    """

    def __init__(
        self,
        lvlm: HookedLVLM,
        samples: Iterable[Sample] | Iterable[Mapping[str, Any]],
        batch_size: int = 1,
        limit: int | None = None,
        strict: bool = False,
    ) -> None:
        self._lvlm, self._batch_size, self._limit, self.strict = lvlm, batch_size, limit, strict
        self.seen = 0
        self.skipped: list[dict[str, str]] = []
        self.total: int | None = None
        self._ids: set[str] = set()
        self._described: dict[str, dict[str, Any]] = {}
        if isinstance(samples, (str, Sample, Mapping)):
            raise CapaProbeError(
                f"A single {type(samples).__name__} was given as samples; give a list of samples "
                "(load_samples(folder) makes one) or of tensor dicts."
            )
        iterator = iter(samples)
        first = next(iterator, None)
        source: Iterator[Any] = itertools.chain([] if first is None else [first], iterator)
        self._tensors = isinstance(first, Mapping)
        self._source = source if self._tensors else itertools.islice(source, limit)
        self._tensor_hash = hashlib.sha256()
        self._sample_hash = Fingerprint()
        if self._tensors:
            if isinstance(samples, Sized) and limit is None:
                self.total = sum(
                    len(batch.get("input_ids", ())) for batch in samples if isinstance(batch, Mapping)
                )
        elif isinstance(samples, Sized):
            self.total = len(samples) if limit is None else min(limit, len(samples))
            given: object = samples
            if isinstance(given, (list, tuple)):
                # Now, rather than after an hour of work.
                for sample in given[: self.total]:
                    self._check(sample)
                self._ids.clear()

    def __iter__(self) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
        return self._prepared() if self._tensors else self._prepare()

    def fingerprint(self) -> str:
        """SHA-256 over all samples so far: the same data gives the same fingerprint."""
        return (self._tensor_hash if self._tensors else self._sample_hash).hexdigest()

    def described(self) -> list[dict[str, Any]]:
        """The samples so far, without those left out, as rows of the samples table; tensors have none."""
        out = {entry["sample"] for entry in self.skipped}
        return [row for sample, row in self._described.items() if sample not in out]

    def progress(self) -> dict[str, Any]:
        """What :meth:`resume` needs to go on from here, as JSON values."""
        return {"seen": self.seen, "data_fingerprint": self.fingerprint(), "skipped": list(self.skipped)}

    def resume(self, progress: Mapping[str, Any], where: object) -> None:
        """Pass over the samples that an earlier run has dealt with.

        Args:
            progress: what :meth:`progress` returned then.
            where: the earlier run, to be named in the message.

        Raises:
            OtherRunError: the samples so far are not those of the earlier run.
        """
        self.pass_over(progress["seen"])
        if (self.seen, self.fingerprint()) != (progress["seen"], progress["data_fingerprint"]):
            raise OtherRunError(
                f"{where} was made on other data: data_fingerprint differs for the first {progress['seen']} samples; "
                "give the same data or another folder, or start anew with --overwrite (overwrite=True)."
            )
        self.skipped = list(progress["skipped"])

    def pass_over(self, n: int | None = None) -> None:
        """Take the next ``n`` samples, or all, without preparing them."""
        if not self._tensors:
            for sample in itertools.islice(self._source, n):
                self._take(sample)
            return
        while self.seen != (self._limit if n is None else n):
            batch = next(self._source, None)
            if batch is None:
                break
            self._take_tensors(self._checked(batch))

    def _prepare(self) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
        while chunk := list(itertools.islice(self._source, self._batch_size)):
            ids, questions, images = [], [], []
            for sample in chunk:
                self._take(sample)
                opened = self._open(sample)
                if opened is not None:
                    ids.append(sample.id)
                    questions.append(sample.question)
                    images.append(opened)
            if ids:
                yield ids, self._to_inputs(ids, images, questions)

    def _open(self, sample: Sample) -> list[Image.Image] | None:
        try:
            return sample.open_images()
        except BadImageError as error:
            if self.strict:
                raise
            logger.info("Sample %s is left out: %s", sample.id, error)
            self.skipped.append({"sample": sample.id, "reason": str(error)})
            return None

    def _to_inputs(
        self, ids: Sequence[str], images: Sequence[list[Image.Image]], questions: Sequence[str]
    ) -> LVLMInputs:
        try:
            # On the left, so that decode steps can follow; what is measured does not depend on it.
            return self._lvlm.prepare(images, questions, padding_side="left")
        except CapaProbeError as error:
            if len(ids) > 1:  # which of them?
                for number in range(len(ids)):
                    one = slice(number, number + 1)
                    self._to_inputs(ids[one], images[one], questions[one])
            raise CapaProbeError(f"Sample {', '.join(ids)}: {error}") from error

    def _prepared(self) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
        for batch in self._source:
            # Labels would ask for a loss over logits that are not computed.
            inputs = LVLMInputs(
                {
                    name: value.to(self._lvlm.device) if isinstance(value, Tensor) else value
                    for name, value in self._checked(batch).items()
                    if name != "labels"
                }
            )
            inputs.tilings = getattr(batch, "tilings", None)
            before = self.seen
            self._take_tensors(batch)
            yield [str(number) for number in range(before, self.seen)], inputs
            if self.seen == self._limit:
                return  # before the source makes another one

    def _take(self, sample: Sample) -> None:
        self._check(sample)
        images = self._sample_hash.add(sample)
        self._described[sample.id] = {
            "sample": sample.id,
            "task": sample.task,
            "n_images": len(sample.images),
            "images": images,
        }
        self.seen += 1

    def _take_tensors(self, batch: Mapping[str, Any]) -> None:
        for name, value in sorted(batch.items()):
            if isinstance(value, Tensor) and name != "labels":
                self._tensor_hash.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                self._tensor_hash.update(value.detach().cpu().float().numpy().tobytes())
        n_rows = len(batch["input_ids"])
        self.seen += n_rows if self._limit is None else min(n_rows, self._limit - self.seen)

    @staticmethod
    def _checked(batch: Any) -> Mapping[str, Any]:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise CapaProbeError(
                f"A {type(batch).__name__} without input_ids was given among tensor dicts; give only dicts of "
                "tensors as lvlm.prepare makes them."
            )
        return batch

    def _check(self, sample: object) -> None:
        if not isinstance(sample, Sample):
            raise CapaProbeError(
                f"A {type(sample).__name__} was given among samples; give cp.Sample objects, or only dicts of "
                "prepared tensors."
            )
        if sample.id in self._ids:
            raise CapaProbeError(
                f"Two samples have the id {sample.id!r}; give every sample an id of its own."
            )
        self._ids.add(sample.id)

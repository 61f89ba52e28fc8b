"""Which samples a confirmation is run on: as many of each task, with a calibration set apart from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from capa_probe.benchmark.setup import images_keys
from capa_probe.errors import BadImageError, CapaProbeError
from capa_probe.samples import Sample


def stratified(samples: Sequence[Sample], n: int | None, seed: int = 0) -> tuple[Sample, ...]:
    """``n`` samples drawn at random, as many of each task and of as many images as can be; in their own order.

    Tasks take turns; each takes the next of its samples, in random order, whose images have been drawn least.

    Args:
        samples: to draw from.
        n: how many; None, or more than there are, takes all.
        seed: of the draw.
    """
    if n is None or n >= len(samples):
        return tuple(samples)
    keys, used = images_keys(samples), Counter[str]()
    of_task: dict[str, list[int]] = {}
    for number in np.random.default_rng(seed).permutation(len(samples)).tolist():
        of_task.setdefault(samples[number].task or "", []).append(number)
    chosen: list[int] = []
    while len(chosen) < n:
        for task in sorted(of_task):
            if of_task[task] and len(chosen) < n:
                number = min(of_task[task], key=lambda number: used[keys[samples[number].id]])
                of_task[task].remove(number)
                used[keys[samples[number].id]] += 1
                chosen.append(number)
    return tuple(samples[number] for number in sorted(chosen))


def drawn(samples: Sequence[Sample], n: int | None, seed: int = 0) -> tuple[Sample, ...]:
    """``n`` samples drawn at random, in their own order, without a look at any other; None takes all."""
    if n is None or n >= len(samples):
        return tuple(samples)
    numbers = np.random.default_rng([seed, 2]).choice(len(samples), n, replace=False)
    return tuple(samples[number] for number in sorted(numbers.tolist()))


def usable(
    samples: Sequence[Sample], strict: bool = False
) -> tuple[tuple[Sample, ...], list[dict[str, str]]]:
    """The samples that show an image, all of whose images open, and the others with the reason.

    Raises:
        BadImageError: with ``strict``, at the first image that cannot be used.
        CapaProbeError: two samples have one id.
    """
    good, skipped, seen = [], list[dict[str, str]](), set[str]()
    for sample in samples:
        if sample.id in seen:
            raise CapaProbeError(
                f"Two samples have the id {sample.id!r}; give every sample an id of its own."
            )
        seen.add(sample.id)
        try:
            sample.open_images()
        except BadImageError as error:
            if strict:
                raise
            skipped.append({"sample": sample.id, "reason": str(error)})
            continue
        if sample.images:
            good.append(sample)
        else:
            skipped.append({"sample": sample.id, "reason": "it has no image"})
    return tuple(good), skipped


def apart(samples: Sequence[Sample], others: Sequence[Sample]) -> tuple[Sample, ...]:
    """Those of ``samples`` that share no image with ``others``."""
    theirs = {key for of in others for key in _each_image(of)}
    return tuple(sample for sample in samples if not theirs & _each_image(sample))


def split(
    samples: Sequence[Sample], share: float, seed: int = 0
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Samples to test on, and to calibrate on: no image is in both.

    Args:
        samples: all of them.
        share: of the sets of images, to calibrate on, rounded to a whole number of them.
        seed: of the draw.
    """
    keys = images_keys(samples)
    images = list(dict.fromkeys(keys[sample.id] for sample in samples))
    drawn = np.random.default_rng([seed, 1]).permutation(len(images))[: round(share * len(images))]
    chosen = {images[number] for number in drawn.tolist()}
    aside = [sample for sample in samples if keys[sample.id] in chosen]
    rest = [sample for sample in samples if keys[sample.id] not in chosen]
    return tuple(rest), apart(aside, rest)


def _each_image(sample: Sample) -> set[str]:
    """A key of each image of a sample by itself."""
    alone = [Sample(str(number), source, "?") for number, source in enumerate(sample.images)]
    return set(images_keys(alone).values())

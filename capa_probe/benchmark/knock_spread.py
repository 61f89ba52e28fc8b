"""A few samples of many, spread over tasks and images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from capa_probe.samples import Sample


def spread(samples: Sequence[Sample], images: Mapping[str, str], n: int) -> tuple[Sample, ...]:
    """Take samples from one task after the other, each time the one whose images were taken least often so far.

    Nothing is drawn: the same samples give the same choice, and a smaller choice is part of a larger one.

    Args:
        samples: in the order of the data.
        images: sample id to a key that samples of the same images share.
        n: how many to take; all if there are fewer.

    Returns:
        The chosen ones, in the order of the data.
    """
    left: dict[str | None, list[int]] = {}
    for number, sample in enumerate(samples):
        left.setdefault(sample.task, []).append(number)
    taken: Counter[str] = Counter()
    chosen: list[int] = []
    while len(chosen) < n and any(left.values()):
        for own in left.values():
            if own and len(chosen) < n:
                best = min(own, key=lambda number: (taken[images[samples[number].id]], number))
                own.remove(best)
                taken[images[samples[best].id]] += 1
                chosen.append(best)
    return tuple(samples[number] for number in sorted(chosen))


def digest(*ids: str) -> str:
    """Sample ids as part of a file's name."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]

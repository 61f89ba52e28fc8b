"""The samples table against what was given, image by image and pixel by pixel."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from PIL import Image

import capa_probe as cp
from capa_probe.schema import SAMPLE_SCHEMA
from tests import processors, tiny


def pixels(sample: cp.Sample) -> list[np.ndarray]:
    return [np.asarray(image.convert("RGB")) for image in sample.images]


def alike(one: cp.Sample, other: cp.Sample) -> bool:
    """Whether two samples show the same images in the same order."""
    a, b = pixels(one), pixels(other)
    return len(a) == len(b) and all(x.shape == y.shape and (x == y).all() for x, y in zip(a, b, strict=True))


def test_every_column() -> None:
    first, second, wide = processors.image(16, 16, 1), processors.image(16, 16, 2), processors.image(8, 32, 1)
    turned = Image.fromarray(np.asarray(first).transpose(1, 0, 2).copy())  # the same pixels at other places
    given = [
        cp.Sample("a", first, "what?", task="count"),
        cp.Sample("b", second, "what?"),
        cp.Sample("c", first, "why?", task="read"),
        cp.Sample("d", (first, second), "why?"),
        cp.Sample("e", (second, first), "why?", task="count"),
        cp.Sample("f", (), "hello"),
        cp.Sample("g", (), "why?", task="none"),
        cp.Sample("h", wide, "what?"),
        cp.Sample("i", (second, first), "where?"),
        cp.Sample("j", turned, "what?"),
    ]
    lvlm = cp.HookedLVLM(tiny.shared("llava"), processors.shared("llava"))
    table = cp.profile(lvlm, given, rows="none", batch_size=4, progress=False).samples
    assert list(table.columns) == SAMPLE_SCHEMA.names
    for row, sample in zip(table.to_dict("records"), given, strict=True):
        assert row["sample"] == sample.id
        assert row["n_images"] == len(pixels(sample))
        assert (
            row["task"] if isinstance(row["task"], str) else None
        ) == sample.task  # NaN where there is none
        assert (row["images"] == "") == (not sample.images)
    keys = dict(zip(table["sample"], table["images"], strict=True))
    for one, other in combinations(given, 2):
        assert (keys[one.id] == keys[other.id]) == alike(one, other), (one.id, other.id)

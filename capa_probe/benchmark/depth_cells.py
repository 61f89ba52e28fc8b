"""The cells of depth: answers with all, some, or certain visual tokens gone from some layer on.

Every function returns one row per condition, sample and draw; ``tokens`` says which visual tokens stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from capa_probe.benchmark.answers import prepare
from capa_probe.benchmark.cells import cell, vanilla_rows
from capa_probe.benchmark.regions import KeepTokens, others, region_tokens
from capa_probe.benchmark.setup import Setup, chunks
from capa_probe.benchmark.steps_forced import digest
from capa_probe.lvlm import HookedLVLM
from capa_probe.pruning import CAPA, Pruner, Random
from capa_probe.pruning.capa import Score
from capa_probe.samples import Sample

GONE, KEPT, REGIONS = "depth_gone", "depth_kept", "depth_regions"
#: The model itself, and the model without any visual token.
WHOLE, NONE = "all", "none"
RANDOM = "random"
#: Which tokens stay: all but those of the regions, all but as many others; those alone, as many others alone.
TOKENS = ("region_removed", "others_removed", "region_kept", "others_kept")
_PER_TOKENS = ["sample", "n_visual", "region"]


def part_of_depth(n_layers: int, part: int) -> int:
    """The layer that ``1 / part`` of the model's layers lie before, rounded up; at least 1."""
    return max(1, math.ceil(n_layers / part))


def reading_layers(n_layers: int) -> tuple[int, ...]:
    """Layers 2, L/4 and L/2 (rounded up), each once, as far as the model has them."""
    wanted = {2, part_of_depth(n_layers, 4), part_of_depth(n_layers, 2)}
    return tuple(sorted(layer for layer in wanted if layer < n_layers))


def gone(setup: Setup) -> pd.DataFrame:
    """All visual tokens gone before each layer; before layer 0 the decoder never sees the image."""
    found = []
    for layer in setup.bar(range(setup.lvlm.n_layers), "all gone"):
        pruner = Random(layers=(layer,), keep=0, allow_none=True)
        found.append(cell(setup, GONE, {"layer": layer}, pruner).assign(tokens=NONE))
    return pd.concat(found, ignore_index=True)


def kept(setup: Setup, layers: Sequence[int], scores: Sequence[str] = ()) -> pd.DataFrame:
    """A share of the visual tokens kept from each layer on: at random, several times, and by scores if asked for."""
    settings = setup.settings
    cells = [
        (layer, keep, score, draw)
        for layer in layers
        for keep in settings.keeps
        for score in (RANDOM, *scores)
        for draw in range(settings.draws if score == RANDOM else 1)
    ]
    found = []
    for layer, keep, score, draw in setup.bar(cells, "some kept"):
        condition = {"layer": layer, "keep": keep, "score": score, "draw": draw}
        options: dict[str, Any] = {"layers": (layer,), "keep": keep}
        if score == RANDOM:
            pruner: Pruner = Random(**options, seed=settings.seed + draw)
        else:
            pruner = CAPA(**options, score=cast("Score", score))
        found.append(cell(setup, KEPT, condition, pruner))
    return pd.concat(found, ignore_index=True)


def tokens_of_regions(setup: Setup, samples: Sequence[Sample]) -> pd.DataFrame:
    """The visual tokens that belong to the regions of each sample: columns sample, n_visual, region (a list)."""

    def make() -> pd.DataFrame:
        rows = [
            row
            for batch in chunks(samples, setup.settings.batch_size)
            for row in _tokens_of_regions(setup.lvlm, batch)
        ]
        return pd.DataFrame(rows, columns=_PER_TOKENS)

    return setup.store.part(REGIONS, f"tokens,samples={_digest(samples)}", make)


def regions(setup: Setup, layers: Sequence[int]) -> pd.DataFrame:
    """The tokens of the regions, or as many others, removed, or kept alone, from each layer on.

    Run on the samples in which the regions hold some visual tokens and others are left; empty if there is none. Others
    are drawn ``settings.draws`` times.
    """
    given = [sample for sample in setup.samples if any(sample.regions or ())]
    if not given:
        return pd.DataFrame()
    table = tokens_of_regions(setup, given).set_index("sample")
    size, n_visual = table["region"].map(len), table["n_visual"]
    usable = set(table.index[(size > 0) & (size < n_visual)])
    samples = [sample for sample in given if sample.id in usable]
    draws = setup.settings.draws
    cells = [
        (layer, tokens, draw, batch)
        for layer in layers
        for tokens in TOKENS
        for draw in range(draws if tokens.startswith("others") else 1)
        for batch in chunks(samples, setup.settings.batch_size)
    ]
    found = []
    for layer, tokens, draw, batch in setup.bar(cells, "regions"):
        chosen = [_kept(table.loc[sample.id], tokens, _rng(setup, sample, draw)) for sample in batch]
        condition = {"layer": layer, "tokens": tokens, "draw": draw, "samples": _digest(batch)}
        pruner = KeepTokens(layers=(layer,), tokens=tuple(chosen))
        found.append(cell(setup, REGIONS, condition, pruner, samples=batch).drop(columns="samples"))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def whole(setup: Setup, rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The model's own rows beside every condition of other rows, on the samples that were run under these."""
    own = vanilla_rows(setup)
    own = own[own["sample"].isin(rows["sample"])]
    conditions = rows[list(by)].drop_duplicates()
    return conditions.merge(own, how="cross")


def _tokens_of_regions(lvlm: HookedLVLM, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    spans = lvlm.spans(prepare(lvlm, samples))
    found = []
    for row, sample in enumerate(samples):
        sizes = [(image.height, image.width) for image in sample.open_images()]
        own = [span for span in spans.images if span.sample == row]
        tokens = region_tokens(lvlm, own, sizes, sample.regions or ())
        found.append({"sample": sample.id, "n_visual": int(spans.visual[row].sum()), "region": tokens})
    return found


def _kept(row: Any, tokens: str, rng: np.random.Generator) -> tuple[int, ...]:
    """Which visual tokens stay."""
    chosen, n_visual = [int(token) for token in row["region"]], int(row["n_visual"])
    if tokens.startswith("others"):
        chosen = others(chosen, n_visual, rng)
    if tokens.endswith("kept"):
        return tuple(chosen)
    return tuple(np.setdiff1d(np.arange(n_visual), chosen).tolist())


def _rng(setup: Setup, sample: Sample, draw: int) -> np.random.Generator:
    return np.random.default_rng([setup.settings.seed + draw, int(digest(sample.id), 16)])


def _digest(samples: Sequence[Sample]) -> str:
    """As part of a key: the fingerprint of the data does not count regions."""
    return digest(*(f"{sample.id} {sample.regions}" for sample in samples))

"""Hand-made token tables with known sinks and known cosines: what the analyses are tested against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from capa_probe.schema import MEASURES, SINK_COLUMNS, TOKEN_SCHEMA
from capa_probe.tables import LayerProfile
from capa_probe.writing import ProfileWriter

D_MODEL = 1024
TAU = 10.0  # reachable: sqrt(1024) = 32


@dataclass(frozen=True)
class Planted:
    """One sink: where it is, the dimension it stands out in, and whether its contribution is high."""

    sample: str
    layer: int
    position: int
    dim: int
    phi: float = 25.0
    high: bool = False


@dataclass(frozen=True)
class World:
    """Sizes of a made-up profile. Each sample is BOS, ``side * side`` visual tokens, and text."""

    samples: tuple[str, ...] = ("a", "b", "c")
    n_layers: int = 5
    side: int = 4
    n_text: int = 5
    steps: int = 0
    seed: int = 0
    sinks: tuple[Planted, ...] = ()
    #: Layer to mean FFN cosine of (visual, text) tokens.
    cosines: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def n_visual(self) -> int:
        return self.side * self.side


def tokens(world: World) -> pd.DataFrame:
    """Token rows in the layout that ``cp.profile`` writes."""
    rng = np.random.default_rng(world.seed)
    frames = [
        _rows(world, rng, sample, step, layer)
        for sample in world.samples
        for step in range(world.steps + 1)
        for layer in range(world.n_layers)
    ]
    return pd.concat(frames, ignore_index=True)


def profile(
    world: World,
    rows: str = "all",
    batches: Iterable[tuple[str, ...]] | None = None,
    **manifest: Any,
) -> LayerProfile:
    """A profile in memory, one part per batch (by default one per sample)."""
    table = tokens(world)
    writer = ProfileWriter(None, rows_per_part=1)
    for batch in batches or [(sample,) for sample in world.samples]:
        writer.add(table[table["sample"].isin(batch)], rows)
    return writer.finish(facts(world, **manifest))


def profile_of(
    table: pd.DataFrame, world: World, path: Path | None = None, rows: str = "all", **manifest: Any
) -> LayerProfile:
    """A profile, one part per sample, of token rows of a world that a test has changed."""
    writer = ProfileWriter(path, rows_per_part=1)
    for sample in table["sample"].unique():
        writer.add(table[table["sample"] == sample], rows)
    return writer.finish(facts(world, **manifest))


def facts(world: World, **manifest: Any) -> dict[str, Any]:
    """A manifest, as far as the analyses look at it."""
    known = {
        "model": "made-up",
        "family": "llava",
        "n_layers": world.n_layers,
        "d_model": D_MODEL,
        "n_samples": len(world.samples),
        "published_sink_dims": None,
        "sink_dims": None,
        "settings": {"steps": world.steps},
    }
    return known | manifest


def _rows(world: World, rng: np.random.Generator, sample: str, step: int, layer: int) -> pd.DataFrame:
    n = 1 + world.n_visual + world.n_text + step
    visual = (np.arange(n) >= 1) & (np.arange(n) <= world.n_visual)
    place = np.arange(n) - 1
    frame = pd.DataFrame(
        {
            "sample": sample,
            "step": step,
            "layer": layer,
            "position": np.arange(n),
            "kind": np.where(visual, "visual", "text"),
            "image": np.where(visual, 0, -1),
            "tile": np.where(visual, 0, -1),
            "row": np.where(visual, place // world.side, -1),
            "col": np.where(visual, place % world.side, -1),
        }
    )
    for measure in MEASURES:
        frame[measure] = rng.lognormal(size=n)
    frame["removal_effect"] = np.nan
    frame["attention"] /= frame["attention"].sum()
    if layer in world.cosines:
        spread = rng.uniform(-0.005, 0.005, size=n)
        frame["ffn_cosine"] = np.where(visual, *world.cosines[layer]) + spread
    # Ordinary tokens: four dimensions of no great strength, different ones for each token.
    strengths = -np.sort(-rng.uniform(1.0, 6.0, size=(n, len(SINK_COLUMNS))), axis=1)
    dims = rng.integers(100, D_MODEL, size=(n, len(SINK_COLUMNS)))
    for sink in world.sinks:
        if (sink.sample, sink.layer) == (sample, layer):
            strengths[sink.position] = [sink.phi, *strengths[sink.position, :-1]]
            dims[sink.position] = [sink.dim, *dims[sink.position, :-1]]
            order = np.argsort(-strengths[sink.position], kind="stable")
            strengths[sink.position] = strengths[sink.position, order]
            dims[sink.position] = dims[sink.position, order]
            # Far outside what the other tokens reach.
            frame.loc[sink.position, "contribution"] = 1e3 if sink.high else 1e-3
    for rank, (strength, dim) in enumerate(SINK_COLUMNS):
        frame[strength], frame[dim] = strengths[:, rank], dims[:, rank]
    if step:
        only_query = [name for name in TOKEN_SCHEMA.names if name in MEASURES[5:] or name.startswith("sink_")]
        frame.loc[: n - 2, [name for name in only_query if name in MEASURES]] = np.nan
        frame.loc[: n - 2, [name for name in only_query if name not in MEASURES]] = -1
        frame["attention_text"] = np.nan
    return frame[TOKEN_SCHEMA.names]

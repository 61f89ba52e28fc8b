"""Made-up runs on disk, with examples: what the report is tested on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from tests import synthetic
from tests.synthetic import Planted, World

#: Layers 2 and 3 are redundant, layer 3 for visual tokens only.
COSINES = {0: (0.5, 0.8), 1: (0.9, 0.9), 2: (0.99, 0.98), 3: (0.98, 0.9), 4: (0.9, 0.99)}
SINKS = (Planted("a", 2, 3, 17), Planted("b", 2, 5, 17, high=True), Planted("b", 4, 5, 17, high=True))
WORLD = World(sinks=SINKS, cosines=COSINES)
#: The 16 visual tokens of a sample, as 2 rows of 8.
GRID = (2, 8)


def tokens(world: World = WORLD, grid: tuple[int, int] = GRID) -> pd.DataFrame:
    """Token rows whose visual tokens lie in a grid of that shape."""
    table = synthetic.tokens(world)
    place = np.where(table["kind"] == "visual", table["position"] - 1, 0)
    visual = table["kind"] == "visual"
    table["row"] = np.where(visual, place // grid[1], -1).astype(np.int32)
    table["col"] = np.where(visual, place % grid[1], -1).astype(np.int32)
    table["attn_cosine"] = 1 / (1 + table["attn_cosine"])  # at most 1, as cosines are
    return table


def write(
    path: Path, table: pd.DataFrame | None = None, world: World = WORLD, rows: str = "all", **manifest: Any
) -> Path:
    """A finished profile in a folder."""
    synthetic.profile_of(tokens(world) if table is None else table, world, path, rows, **manifest)
    return path


def add_examples(
    path: Path, images: Mapping[str, Image.Image], /, grid: tuple[int, int] = GRID, **fields: Any
) -> Path:
    """One example per sample id and image."""
    folder = path / "examples"
    folder.mkdir()
    lines = []
    for number, (sample, image) in enumerate(images.items()):
        image.save(folder / f"{number}-0.png")
        record = {
            "id": sample,
            "task": "colour",
            "question": f"what is {sample}?",
            "prompt": f"USER: <image>\nwhat is {sample}? ASSISTANT:",
            "answers": ["red", "Crimson"],
            "generated": "crimson.",
            "images": [{"file": f"{number}-0.png", "grid": list(grid), "tile_grid": [1, 1]}],
        }
        lines.append(json.dumps(record | fields))
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")
    return path


def picture(width: int = 160, height: int = 40, seed: int = 0) -> Image.Image:
    """Soft blobs of colour, so that JPEG and PNG both do well."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)

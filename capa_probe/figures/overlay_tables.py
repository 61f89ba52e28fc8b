"""The small tables behind overlays: one image of one example, and what was measured of its visual tokens."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from capa_probe.errors import CapaProbeError
from capa_probe.examples import EXAMPLES, Example, read_examples
from capa_probe.figures.entry import Source
from capa_probe.patches import PLACE, layouts
from capa_probe.tables import LayerProfile

#: What can be laid over an image.
QUANTITIES = ("attention", "contribution", "removal_effect")
N_LAYERS = 4
#: Longest side of a kept picture, in pixels: it is drawn a few inches wide.
_SIDE = 320


def overlay_layers(n_layers: int, sinks: pd.DataFrame | None = None, n: int = N_LAYERS) -> list[int]:
    """Layers to draw: ``n`` over the whole depth, first and last among them; one of them is that with most sinks."""
    chosen = np.linspace(0, n_layers - 1, min(n, n_layers)).round().astype(int).tolist()
    if sinks is not None and len(sinks):
        most = int(np.bincount(sinks["layer"].to_numpy(np.int64)).argmax())
        if most not in chosen:
            inner = chosen[1:-1] or chosen
            chosen[chosen.index(min(inner, key=lambda layer: abs(layer - most)))] = most
    return sorted({int(layer) for layer in chosen})


def overlays_tables(source: Source) -> dict[str, pd.DataFrame]:
    """What :func:`capa_probe.figures.overlays.overlays` draws, from a profile whose folder keeps examples.

    Of the examples, the one with most sinks in the layers shown is taken, the first of them where none has any.

    Raises:
        CapaProbeError: the run is no profile in a folder, keeps no examples or visual rows, or it is not known where
            the tokens of its examples lie.
    """
    if source.prof is None or source.folder is None:
        raise CapaProbeError(
            "Overlays were asked for of a run that is no profile in a folder; give such a profile."
        )
    if source.prof.rows == "none":
        raise CapaProbeError(
            'This profile holds no token rows to draw over images (rows="none"); profile again with rows="visual".'
        )
    examples = [example for example in read_examples(source.folder) if example.images]
    if not examples:
        raise CapaProbeError(
            "This profile keeps no examples to draw over; profile a data folder with capa-probe profile, which keeps "
            "some."
        )
    sinks = source.tables.get("sinks")
    layers = overlay_layers(int(source.prof.manifest["n_layers"]), sinks)
    chosen = examples[0]
    if sinks is not None:
        shown = sinks[sinks["layer"].isin(layers)]["sample"].value_counts()
        chosen = max(examples, key=lambda example: int(shown.get(example.id, 0)))
    return overlay_tables(source.prof, chosen, source.folder / EXAMPLES, sinks, layers)


def overlay_tables(
    prof: LayerProfile,
    example: Example,
    folder: Any,
    sinks: pd.DataFrame | None = None,
    layers: Sequence[int] | None = None,
    image: int = 0,
) -> dict[str, pd.DataFrame]:
    """The small tables behind :func:`capa_probe.figures.overlays.overlays`, of one image of one example.

    Args:
        prof: a profile with its visual rows.
        example: one that :func:`capa_probe.examples.read_examples` read.
        folder: where its images lie.
        sinks: what ``classify_sinks(prof)`` returned; None where that is not known.
        layers: layers to draw; by default as :func:`overlay_layers`.
        image: index of the image.

    Returns:
        ``tokens`` (``layer``, place, the quantities that were measured, and ``role``: "" for no sink), ``picture``
        (one row: the image as PNG in ``png``, and the facts about it).

    Raises:
        CapaProbeError: the image cannot be read, or it is not known where its tokens lie.
    """
    shown = overlay_layers(int(prof.manifest["n_layers"]), sinks) if layers is None else list(layers)
    where = [
        ("sample", "==", example.id),
        ("step", "==", 0),
        ("kind", "==", "visual"),
        ("layer", "in", shown),
    ]
    tokens = prof.select(["layer", *PLACE, *QUANTITIES], where)
    tokens = tokens[tokens["image"] == image].reset_index(drop=True)
    own = example.images[image]
    layouts(tokens[tokens["layer"] == shown[0]], image, own.grid, own.tile_grid)  # refuses what has no place
    tokens = tokens.drop(columns=[name for name in QUANTITIES if tokens[name].isna().all()])
    tokens["role"] = ""
    if sinks is not None:
        here = sinks[sinks["sample"] == example.id]
        roles = {
            (int(layer), int(position)): str(role)
            for layer, position, role in zip(here["layer"], here["position"], here["role"], strict=True)
        }
        at = zip(tokens["layer"].astype(int), tokens["position"].astype(int), strict=True)
        tokens["role"] = [roles.get(place, "") for place in at]
    assert own.grid is not None
    assert own.tile_grid is not None
    facts = {
        "sample": example.id,
        "image": image,
        "n_images": len(example.images),
        "question": example.question,
        "answer": example.generated,
        "grid_rows": own.grid[0],
        "grid_cols": own.grid[1],
        "tile_rows": own.tile_grid[0],
        "tile_cols": own.tile_grid[1],
        "sinks_known": sinks is not None,
        "tau": np.nan if sinks is None else sinks.attrs.get("tau", np.nan),
        "png": _png(folder / own.file),
    }
    return {"tokens": tokens, "picture": pd.DataFrame([facts])}


def _png(file: Any) -> bytes:
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError):  # Pillow says of a broken PNG that its syntax is wrong
        raise CapaProbeError(f"The image {file.name} of the example is missing or cannot be read.") from None
    picture.thumbnail((_SIDE, _SIDE))
    png = io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    return png.getvalue()

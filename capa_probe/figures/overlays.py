"""Attention, contribution, removal effect and sink role of every visual token, drawn over the image it comes from."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from capa_probe.analysis.reading import FIRST_LAYER
from capa_probe.errors import CapaProbeError
from capa_probe.examples import EXAMPLES, Example, read_examples
from capa_probe.figures.entry import ModelTables, Source, Tables
from capa_probe.figures.style import (
    INK,
    ROLE_NAMES,
    ROLES,
    NotebookFigure,
    count,
    headline,
    styled,
)
from capa_probe.patches import PLACE, Layout, layouts
from capa_probe.tables import LayerProfile

#: Column to its title and unit.
QUANTITIES = {
    "attention": "Attention (probability)",
    "contribution": "Contribution (L2 norm)",
    "removal_effect": "Removal effect (L2 norm)",
}
N_LAYERS = 4
#: Longest side of a kept picture, in pixels: it is drawn a few inches wide.
_SIDE = 320
_HEAT = colormaps["inferno"]
_TITLE = "Where in the image attention, contribution and sinks lie"
_FACTS = (
    "sample",
    "image",
    "n_images",
    "question",
    "answer",
    "grid_rows",
    "grid_cols",
    "tile_rows",
    "tile_cols",
)


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
    """What :func:`overlays` draws, from a profile whose folder keeps examples.

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
    """The small tables behind :func:`overlays`, of one image of one example.

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


@styled
def overlays(tables: Tables) -> Figure:
    """One image with what its visual tokens get and give laid over it: a row per layer, a column per quantity.

    Colours go with the square root of the value, from 0 to the panel's largest one, which stands in its corner, since
    scales differ from layer to layer. Where the model tiles, the tiles and the thumbnail have rows of their own.

    Args:
        tables: what :func:`overlay_tables` returned.

    Raises:
        CapaProbeError: a table or a column is missing, or places and grid do not match.
    """
    for table, needed in (
        ("tokens", ("layer", *PLACE, "role")),
        ("picture", (*_FACTS, "png", "sinks_known")),
    ):
        missing = [column for column in needed if column not in tables.get(table, pd.DataFrame())]
        if missing:
            raise CapaProbeError(
                f"The table {table} lacks the columns {', '.join(missing)}; give what overlay_tables returned."
            )
    tokens, facts = tables["tokens"], tables["picture"].iloc[0]
    picture = Image.open(io.BytesIO(facts["png"])).convert("RGB")
    shown = [name for name in QUANTITIES if name in tokens]
    grid = (int(facts["grid_rows"]), int(facts["grid_cols"]))
    tile_grid = (int(facts["tile_rows"]), int(facts["tile_cols"]))
    rows: list[tuple[int, Layout, pd.DataFrame]] = []
    for layer, own in tokens.groupby("layer"):
        rows += [(int(str(layer)), at, own) for at in layouts(own, int(facts["image"]), grid, tile_grid)]
    columns = [*shown, "role"]
    ratio = picture.height / picture.width
    side = min(2.55, 2.1 / ratio)  # width of a panel, in inches
    left, gap, below = (0.95 if tile_grid != (1, 1) else 0.75), 0.1, 0.42
    width = max(left + (len(columns) + 1) * (side + gap) + 0.1, 7.8)
    subtitle = _subtitle(tokens, facts, shown)
    figure = NotebookFigure(figsize=(width, 10))
    headline(figure, _TITLE, subtitle)
    top = headline(figure, _TITLE, subtitle) + 0.32
    for text in list(figure.texts):
        text.remove()
    height = top + len(rows) * (side * ratio + gap) + below
    figure.set_size_inches(width, height)
    headline(figure, _TITLE, subtitle)
    panel = (side / width, side * ratio / height)
    for number, (layer, layout, own) in enumerate(rows):
        bottom = 1 - (top + (number + 1) * (side * ratio + gap)) / height
        for column, name in enumerate(("image", *columns)):
            axes = figure.add_axes((left / width + column * (side + gap) / width, bottom, *panel))
            _picture(axes, picture, name != "image")
            if name == "role":
                _roles(axes, picture, layout, own)
            elif name != "image":
                _heat(axes, picture, layout.spread(own[name].to_numpy(np.float64)))
            elif number:
                axes.set_visible(False)
            if number == 0:
                axes.set_title(
                    {"image": "Image", "role": "Sinks"}.get(name) or QUANTITIES[name], loc="left", fontsize=9
                )
        figure.text(
            0.12 / width, bottom + panel[1] / 2, f"Layer {layer}" + (f"\n{layout.label}" if layout.label else ""),
            fontweight="bold", va="center", ha="left", fontsize=8.5,
        )  # fmt: skip
    found = [role for role in ROLES if (tokens["role"] == role).any()]
    handles = [
        Line2D(
            [], [], linestyle="", marker="s", mfc="none", mec=ROLES[role][0], mew=2, label=ROLE_NAMES[role]
        )
        for role in found
    ]
    if handles:
        figure.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0.12 / width, 0.06 / height), ncols=3,
            borderaxespad=0,
        )  # fmt: skip
    return figure


def _picture(axes: Any, picture: Image.Image, dimmed: bool) -> None:
    pixels = np.asarray(picture.convert("L") if dimmed else picture)
    if dimmed:
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255 / 0.55, aspect="auto")
    else:
        axes.imshow(pixels, aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _heat(axes: Any, picture: Image.Image, values: NDArray[np.float64]) -> None:
    largest = float(np.nanmax(values)) if np.isfinite(values).any() else np.nan
    share = np.sqrt(np.clip(np.nan_to_num(values) / (largest if largest > 0 else 1.0), 0, 1))
    colours = np.array(_HEAT(share))
    colours[..., 3] = np.where(np.isnan(values), 0.0, 0.3 + 0.48 * share)
    axes.imshow(
        colours, extent=(-0.5, picture.width - 0.5, picture.height - 0.5, -0.5), interpolation="nearest", aspect="auto"
    )  # fmt: skip
    axes.annotate(
        "not measured" if np.isnan(largest) else f"max {largest:.2g}", (1, 0), (-2, 2), "axes fraction",
        "offset points", ha="right", va="bottom", fontsize=7.5, color="white",
        bbox={"boxstyle": "square,pad=0.15", "facecolor": INK, "alpha": 0.65, "linewidth": 0},
    )  # fmt: skip


def _roles(axes: Any, picture: Image.Image, layout: Layout, tokens: pd.DataFrame) -> None:
    width, height = picture.width / layout.shape[1], picture.height / layout.shape[0]
    roles = tokens["role"].to_numpy(object)[layout.tokens]
    for row, col, role in zip(layout.row.tolist(), layout.col.tolist(), roles, strict=True):
        if role:
            colour = ROLES[role][0]
            axes.add_patch(
                Rectangle(
                    (col * width - 0.5, row * height - 0.5), width, height, facecolor=(*_rgb(colour), 0.35),
                    edgecolor=colour, linewidth=1.6,
                )
            )  # fmt: skip
    n = int((roles != "").sum())
    layer = int(tokens["layer"].iloc[0])
    said = count(n, "sink") if n else "no sinks" if layer >= FIRST_LAYER else f"from layer {FIRST_LAYER} on"
    axes.annotate(
        said, (1, 0), (-2, 2), "axes fraction", "offset points", ha="right", va="bottom", fontsize=7.5,
        color="white", bbox={"boxstyle": "square,pad=0.15", "facecolor": INK, "alpha": 0.65, "linewidth": 0},
    )  # fmt: skip


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))  # type: ignore[return-value]


def _subtitle(tokens: pd.DataFrame, facts: pd.Series[Any], shown: Sequence[str]) -> str:
    which = f", image {int(facts['image']) + 1} of {int(facts['n_images'])}" if facts["n_images"] > 1 else ""
    # A question may hold the model's own line breaks.
    question = " ".join(str(facts["question"]).split())
    question = question if len(question) <= 90 else f"{question[:89]}…"
    n = int((tokens["layer"] == tokens["layer"].iloc[0]).sum())
    n_sinks = int((tokens["role"] != "").sum())
    if not facts["sinks_known"]:
        sinks = "sinks were not classified"
    else:
        tau = "" if np.isnan(facts["tau"]) else f" at τ = {facts['tau']:g}"
        sinks = f"{count(n_sinks, 'sink')}{tau}" if n_sinks else f"no sinks{tau} in the layers shown"
    lines = [
        f"Sample {facts['sample']}{which}: “{question}” — the model answers “{facts['answer']}”",
        f"{count(n, 'visual token')} per layer; {sinks}; colour: square root of the value, 0 to the panel's largest",
    ]
    if "removal_effect" not in shown:
        lines.append("Removal effect: not in this profile (it is measured with --probes all)")
    return "\n".join(lines)


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


def overlays_of_model(models: ModelTables) -> Figure:
    """:func:`overlays` of one model.

    Raises:
        CapaProbeError: there is not exactly one, or as :func:`overlays`.
    """
    if len(models) != 1:
        raise CapaProbeError(f"{len(models)} models were given; overlays show one model at a time.")
    (tables,) = models.values()
    return overlays(tables)

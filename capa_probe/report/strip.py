"""The strip of layers at the top: of each layer, whether its FFN is redundant, and its sinks by role."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from capa_probe.findings import Findings
from capa_probe.report.words import percent

#: Height of the highest bar, in units of its drawing.
BAR_HEIGHT = 44.0


@dataclass(frozen=True)
class Bar:
    """Part of a layer's bar in the strip: a role, and where it is drawn."""

    role: str
    top: float
    height: float


@dataclass(frozen=True)
class Cell:
    """One layer in the strip.

    Attributes:
        layer: from 0.
        ffn: "only" (redundant for visual tokens only), "both" (for text too), "no", or "" where not known.
        sinks: how many; None where not known.
        bars: its sinks by role, one upon the other.
        title: the numbers in words.
    """

    layer: int
    ffn: str
    sinks: int | None
    bars: tuple[Bar, ...]
    title: str


def strip(manifest: Mapping[str, Any], findings: Findings | None) -> list[Cell]:
    """One cell per layer; none where nothing is known."""
    if findings is None or (findings.layers is None and findings.by_layer is None):
        return []
    ffn = _by_layer(findings.layers)
    sinks = _by_layer(findings.by_layer)
    most = max((int(row["n_sinks"]) for row in sinks.values()), default=0)
    cells = []
    for layer in range(int(manifest["n_layers"])):
        state, number, said = "", None, [f"layer {layer}"]
        counts: dict[str, int] = {}
        if layer in ffn:
            row = ffn[layer]
            state = "only" if row["visual_only"] else "both" if row["redundant"] else "no"
            if row["redundant"] and not row["n_text"]:
                state = ""
            text = f"{row['text_cosine']:.4f} text" if row["n_text"] else "no text tokens"
            said.append(f"FFN cosine {row['visual_cosine']:.4f} visual, {text}")
        if layer in sinks:
            row = sinks[layer]
            number = int(row["n_sinks"])
            said.append(f"{number:,} sink{'' if number == 1 else 's'}")
            counts = {role: int(row[f"n_{role}"]) for role in ("dump", "anchor", "undetermined")}
        cells.append(Cell(layer, state, number, tuple(_stacked(counts, most)), "; ".join(said)))
    return cells


def height_note(findings: Findings | None) -> str:
    """What the highest bar stands for; "" where there are no sinks."""
    table = None if findings is None else findings.by_layer
    if table is None or not table["n_sinks"].any():
        return ""
    top = table.sort_values("n_sinks", ascending=False, kind="stable").iloc[0]
    share = percent(top["n_sinks"] / top["n_visual"])
    return (
        f"bars: sinks of all samples; the highest, {int(top['n_sinks']):,} in layer {int(top['layer'])}, is {share} "
        "of the layer's visual tokens"
    )


def _stacked(counts: Mapping[str, int], most: int) -> Iterator[Bar]:
    top = BAR_HEIGHT
    for role, number in counts.items():
        if number:
            height = BAR_HEIGHT * number / most
            top -= height
            yield Bar(role, top, height)


def _by_layer(table: pd.DataFrame | None) -> dict[int, Mapping[Any, Any]]:
    return {} if table is None else {int(row["layer"]): row for row in table.to_dict("records")}

"""The data of the layer explorer: every number of every visual token of the examples, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from capa_probe.errors import CapaProbeError
from capa_probe.examples import EXAMPLES, Example, read_examples
from capa_probe.patches import PLACE
from capa_probe.report import words
from capa_probe.report.encoding import FLOAT_CHARACTERS, INDEX_CHARACTERS, float24, script_json, uint16
from capa_probe.report.pictures import pictures
from capa_probe.report.pruned import kept_tokens
from capa_probe.report.runs import ShownRun
from capa_probe.schema import MEASURES, SINK_COLUMNS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantity:
    """A measured column of the token table.

    Attributes:
        name: of the column.
        label: in words.
        unit: its unit.
        scale: how its colour goes with it: "sqrt" (square root, from 0 to the largest value), "linear" (the same
            without the root) or "cosine" (logarithmic in 1 - x, from the least to the largest value).
        main: whether it is kept where there is no room for all.
        inverse: whether it is written as 1 - x.
    """

    name: str
    label: str
    unit: str
    scale: str = "linear"
    main: bool = False
    inverse: bool = False


#: In the order in which they are offered.
QUANTITIES = (
    Quantity("attention", "Attention", "probability, from the last prompt token", "sqrt", main=True),
    Quantity(
        "contribution", "Attention contribution", "L2 norm, to the last prompt token", "sqrt", main=True
    ),
    Quantity("removal_effect", "Removal effect", "L2 norm, on the last prompt token", "sqrt", main=True),
    Quantity("value_norm", "Value norm", "L2 norm, mean over KV heads", main=True),
    Quantity("ffn_cosine", "FFN cosine", "cos(x, x + FFN(x))", "cosine", main=True, inverse=True),
    Quantity("sink_strength", "Sink strength", "φ over all dimensions", main=True),
    Quantity("attention_text", "Attention from text", "probability, mean over text queries", "sqrt"),
    Quantity("attn_cosine", "Attention cosine", "cos(x, x + attention(x))", "cosine", inverse=True),
    Quantity("resid_pre_norm", "Residual stream", "L2 norm, before the layer"),
    Quantity("resid_mid_norm", "Residual stream, middle", "L2 norm, before the FFN"),
    Quantity("attn_update_norm", "Attention update", "L2 norm"),
    Quantity("ffn_update_norm", "FFN update", "L2 norm"),
    *(
        Quantity(name, f"Sink strength, {which}", f"φ at the {which} dimension")
        for name, which in (
            ("sink_strength_2", "second"),
            ("sink_strength_3", "third"),
            ("sink_strength_4", "fourth"),
        )
    ),
)
assert {quantity.name for quantity in QUANTITIES} == set(MEASURES)
#: Share of an example's room that all its quantities may take before only the main ones are kept.
_MOST_NUMBERS = 0.75
#: Characters that an example takes beside its arrays and pictures, and each of its tokens beside its numbers.
_WORDS, _TOKEN = 4000, 24
#: Columns of dimension numbers.
DIMS = tuple(dim for _, dim in SINK_COLUMNS)


def examples(run: ShownRun, n: int, room: float) -> tuple[list[dict[str, Any]], str]:
    """The examples of a run as the page's script reads them, and, where there are none, why.

    Args:
        run: the run.
        n: how many, at most.
        room: characters that they may take together; what is over it is left out, which is said.
    """
    try:
        chosen = read_examples(run.folder)[:n]
    except CapaProbeError as error:
        return [], str(error)
    if not chosen:
        why = "This run keeps no examples: its samples came without images."
        return [], "None were asked for." if n == 0 else why
    tokens = None
    if run.prof.rows != "none":
        tokens = _tokens(run, chosen)
    found: list[dict[str, Any]] = []
    size = 0
    for example in chosen:
        own = None if tokens is None else tokens[tokens["sample"] == example.id]
        made = _example(run, example, own, room / len(chosen), room)
        size += len(script_json(made))
        if found and size > room:
            n_more = len(chosen) - len(found)
            more = "1 more example is" if n_more == 1 else f"{n_more} more examples are"
            return found, f"{more} left out, to keep the report small."
        found.append(made)
    return found, ""


def _tokens(run: ShownRun, chosen: Sequence[Example]) -> pd.DataFrame:
    where = [
        ("sample", "in", [example.id for example in chosen]),
        ("step", "==", 0),
        ("kind", "==", "visual"),
    ]
    columns = ["sample", "layer", *PLACE, *(quantity.name for quantity in QUANTITIES), *DIMS]
    return run.prof.select(columns, where)


def _example(
    run: ShownRun, example: Example, tokens: pd.DataFrame | None, room: float, most: float
) -> dict[str, Any]:
    """One example; ``room``: characters that it should take, ``most``: that it may take if no other is shown."""
    missing = []
    if tokens is None:
        missing.append('Nothing is drawn over the images: rows="none" kept no token rows.')
    grid = None if tokens is None else _by_layer(tokens, run.n_layers)
    table, first = (None, None) if grid is None else grid
    arrays, n_characters, left_out = _arrays(table, room, most)
    if left_out:
        missing.append(f"To keep the report small, these are left out: {', '.join(left_out)}.")
    room -= n_characters + _WORDS + _TOKEN * (0 if first is None else len(first))
    shown, said = pictures(
        example.images, run.folder / EXAMPLES, None if tokens is None else _first(first), room
    )
    missing += said
    for why in missing:
        logger.info("example %s: %s", example.id, why)
    positions = [] if first is None else first["position"].tolist()
    return {
        "id": example.id,
        "task": example.task,
        "question": example.question,
        "prompt": example.prompt,
        "answers": list(example.answers),
        "generated": example.generated,
        "right": words.is_right(example),
        "missing": missing,
        "pictures": [vars(picture) for picture in shown],
        "positions": positions,
        "places": [] if first is None else _places(first),
        "sinks": _sinks(run, example.id, positions),
        "pruned": kept_tokens(run, example, positions),
        **arrays,
    }


def _first(first: pd.DataFrame | None) -> pd.DataFrame:
    return pd.DataFrame(columns=list(PLACE)) if first is None else first


def _by_layer(tokens: pd.DataFrame, n_layers: int) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Rows sorted by layer and position, and those of one layer; None where a layer lacks some of them."""
    table = tokens.sort_values(["layer", "position"], kind="stable")
    if table.empty or len(table) % n_layers:
        return None
    n = len(table) // n_layers
    first = table.iloc[:n]
    expected = np.tile(first["position"].to_numpy(), n_layers)
    if (table["layer"].to_numpy() != np.repeat(np.arange(n_layers), n)).any() or (
        table["position"].to_numpy() != expected
    ).any():
        return None
    return table, first


def _arrays(table: pd.DataFrame | None, room: float, most: float) -> tuple[dict[str, Any], float, list[str]]:
    """Encoded columns of (layer, token), the characters that they take, and labels of those left out."""
    if table is None:
        return {"values": {}, "dims": {}}, 0.0, []
    measured = [quantity for quantity in QUANTITIES if table[quantity.name].notna().any()]
    kept = measured
    if FLOAT_CHARACTERS * len(table) * len(measured) > _MOST_NUMBERS * room:
        kept = [quantity for quantity in measured if quantity.main] or measured
        while len(kept) > 1 and FLOAT_CHARACTERS * len(table) * len(kept) > _MOST_NUMBERS * most:
            kept = kept[:-1]
    values = {}
    for quantity in kept:
        column = table[quantity.name].to_numpy(np.float64)
        values[quantity.name] = float24(1 - column if quantity.inverse else column)
    dims = {}
    for strength, dim in SINK_COLUMNS:
        if strength in values:
            dims[dim] = uint16(table[dim].to_numpy())
    size = len(table) * (FLOAT_CHARACTERS * len(values) + INDEX_CHARACTERS * len(dims))
    return (
        {"values": values, "dims": dims},
        size,
        [quantity.label for quantity in measured if quantity not in kept],
    )


def _places(first: pd.DataFrame) -> list[list[int]]:
    """Of each token: image, tile, row and column."""
    found: list[list[int]] = first[["image", "tile", "row", "col"]].to_numpy(int).tolist()
    return found


def _sinks(run: ShownRun, sample: str, positions: list[int]) -> list[list[Any]]:
    """Layer, token and role of each sink of a sample."""
    table = None if run.findings is None else run.findings.sinks
    if table is None:
        return []
    index = {position: number for number, position in enumerate(positions)}
    own = table[(table["sample"] == sample) & table["position"].isin(positions)]
    return [
        [int(layer), index[int(position)], str(role)]
        for layer, position, role in zip(own["layer"], own["position"], own["role"], strict=True)
    ]

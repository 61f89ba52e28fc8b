"""Experiment 4: FFNs in full, as a Hadamard product, and skipped, for visual tokens of redundant and of other layers.

Which layers are redundant, and the factors of the Hadamard product, come from the calibration samples, whose images are
not among those that are tested. Groups of layers, each approximated as a whole, with no token pruned:

- "redundant": all with an FFN cosine of visual tokens above eta;
- "as many redundant" and "as many others": the same number of both, as far as there are: the redundant layers of
  largest cosine, and of the others those of smallest;
- "nearest others": as many of the others, those of largest cosine, where that is another choice.

Layers differ in depth as well as in cosine, and no group corrects for that.
"""

from __future__ import annotations

import pandas as pd

from capa_probe.benchmark.cells import COLUMNS, MEASURES, cell, vanilla_rows
from capa_probe.benchmark.redundancy import cosines, hadamard
from capa_probe.benchmark.setup import Setup
from capa_probe.benchmark.summary import compare, notes, over_draws, summarise
from capa_probe.pruning import CAPA
from capa_probe.pruning.ffn import HadamardFFN, SkipFFN

NAME = "ffn_redundancy"
ALL_REDUNDANT, SOME_REDUNDANT, OTHERS, NEAREST = (
    "redundant",
    "as many redundant",
    "as many others",
    "nearest others",
)
_BY = ("group", "layers", "ffn")
_EMPTY = pd.DataFrame(columns=[*_BY, *COLUMNS])


def run(setup: Setup) -> dict[str, pd.DataFrame]:
    """Run the experiment.

    Returns:
        ``ffn_redundancy``: per group of layers and kind of FFN ("full", "hadamard", "skip"), and per task, means with
        intervals. ``ffn_redundancy_tests``: the three kinds within each group. ``ffn_redundancy_groups``: the Hadamard
        product in as many redundant layers against others. ``ffn_redundancy_layers``: cosines per layer.
        ``ffn_redundancy_rows``: per sample. ``ffn_redundancy_notes``.
    """
    if not setup.calibration:
        return _tables(setup, _EMPTY, pd.DataFrame(), ["There are no calibration samples."])
    layers = cosines(setup)
    chosen, remarks = groups(layers), list[str]()
    if ALL_REDUNDANT not in chosen:
        remarks.append(f"No layer has an FFN cosine above {setup.settings.eta}.")
    elif OTHERS not in chosen:
        remarks.append("Every layer is redundant: there are no others to compare with.")
    fitted = hadamard(setup) if chosen else None
    found = []
    for group, kind in setup.bar([(group, kind) for group in chosen for kind in ("hadamard", "skip")], "FFN"):
        assert fitted is not None
        found.append(_cell(setup, fitted, group, chosen[group], kind))
    for group, own in chosen.items():
        whole = vanilla_rows(setup)
        columns = {"group": group, "layers": _name(own), "ffn": "full"}
        found.append(pd.concat([pd.DataFrame([columns] * len(whole)), whole], axis=1))
    return _tables(setup, pd.concat(found, ignore_index=True) if found else _EMPTY, layers, remarks)


def groups(layers: pd.DataFrame) -> dict[str, tuple[int, ...]]:
    """The groups of layers that there are (see this module's docstring).

    Args:
        layers: one row per layer, with ``layer``, ``visual_cosine`` and ``redundant``.
    """
    ordered = layers.sort_values(["visual_cosine", "layer"], ascending=False)
    redundant = ordered.loc[ordered["redundant"], "layer"].tolist()
    others = ordered.loc[~ordered["redundant"], "layer"].tolist()
    n = min(len(redundant), len(others))
    found = {ALL_REDUNDANT: redundant}
    if n:
        found |= {SOME_REDUNDANT: redundant[:n], OTHERS: others[len(others) - n :]}
    if n and n < len(others):
        found[NEAREST] = others[:n]
    return {name: tuple(sorted(map(int, own))) for name, own in found.items() if own}


def _cell(setup: Setup, fitted: HadamardFFN, group: str, layers: tuple[int, ...], kind: str) -> pd.DataFrame:
    ffn = fitted.only(layers) if kind == "hadamard" else SkipFFN(layers)
    # The same layers may be a group twice; they are run once.
    rows = cell(setup, NAME, {"layers": _name(layers), "ffn": kind}, CAPA(layers=(), ffn=ffn))
    rows.insert(0, "group", group)
    return rows


def _name(layers: tuple[int, ...]) -> str:
    return "+".join(map(str, layers))


def _tables(
    setup: Setup, table: pd.DataFrame, layers: pd.DataFrame, remarks: list[str]
) -> dict[str, pd.DataFrame]:
    seed = setup.settings.seed
    rows = over_draws(table, _BY)
    pairs = (("hadamard", "skip"), ("hadamard", "full"), ("skip", "full"))
    between = rows[rows["group"].isin([SOME_REDUNDANT, OTHERS, NEAREST]) & (rows["ffn"] != "full")]
    return {
        NAME: summarise(rows, _BY, seed),
        f"{NAME}_tests": compare(rows, _BY[:2], "ffn", pairs, MEASURES, seed),
        f"{NAME}_groups": compare(
            between,
            ["ffn"],
            "group",
            [
                (SOME_REDUNDANT, OTHERS),
                *([(SOME_REDUNDANT, NEAREST)] if NEAREST in set(between["group"]) else []),
            ],
            MEASURES,
            seed,
        ),
        f"{NAME}_layers": layers,
        f"{NAME}_rows": table,
        f"{NAME}_notes": notes(*remarks),
    }

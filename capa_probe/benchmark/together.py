"""Experiment 5: CAPA with everything on: tokens pruned by contribution, and Hadamard layers for those that stay.

For each stage, beside the model itself: CAPA in full, and pruning without the Hadamard layers; and the Hadamard layers
alone. These are the paper's for its own models, and for others the redundant ones of the calibration samples.

Time is measured apart from the answers, one prompt at a time, the model and CAPA turn by turn, each prompt several
times (:func:`capa_probe.benchmark.timing.time_interleaved`); the ratio is one of medians over repeats, averaged over
prompts as a geometric mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from capa_probe.benchmark.answers import prepare
from capa_probe.benchmark.cells import COLUMNS, MEASURES, cell, vanilla_rows
from capa_probe.benchmark.redundancy import hadamard, hadamard_layers
from capa_probe.benchmark.setup import Setup, images_keys
from capa_probe.benchmark.statistics import mean_interval
from capa_probe.benchmark.summary import compare, notes, over_draws, summarise
from capa_probe.benchmark.timing import time_interleaved
from capa_probe.flops import CAPA as AS_THE_PAPER
from capa_probe.flops import Shape, prefill_cost
from capa_probe.pruning import CAPA

NAME = "together"
VANILLA = "vanilla"
_BY = ("method", "stage", "layer")
#: Prompts that are timed, and how often each.
TIMED, REPEATS = 16, 3


def run(setup: Setup) -> dict[str, pd.DataFrame]:
    """Run the experiment.

    Returns:
        ``together``: per method ("vanilla", "capa", "pruning", "hadamard") and stage, and per task, means with
        intervals, and of FLOPs the share of vanilla's: ``flops_share`` of the whole forward, and
        ``flops_share_as_published`` as the CAPA paper counts. ``together_tests``: each against vanilla.
        ``together_time``: prefill and decode step of CAPA over those of vanilla. ``together_rows``: per sample.
        ``together_notes``.
    """
    keep, remarks = setup.settings.capa_keep, list[str]()
    layers = hadamard_layers(setup) if setup.calibration else ()
    ffn = hadamard(setup).only(layers) if layers else None
    if ffn is None:
        remarks.append(
            "There is no redundant layer, or there are no calibration samples: no Hadamard layers are on."
        )
    cells: dict[tuple[str, str, int], CAPA] = {}
    for stage, layer in setup.stages().items():
        cells["capa", stage, layer] = CAPA(layers=(layer,), keep=keep, ffn=ffn)
        if ffn is not None:
            cells["pruning", stage, layer] = CAPA(layers=(layer,), keep=keep)
    if ffn is not None:
        cells["hadamard", "", -1] = CAPA(layers=(), ffn=ffn)
    found = [_condition(vanilla_rows(setup), VANILLA, "", -1)]
    for (method, stage, layer), pruner in setup.bar(list(cells.items()), "all together"):
        rows = cell(setup, NAME, {"method": method, "layer": layer, "hadamard": len(layers)}, pruner)
        found.append(_condition(rows[list(COLUMNS)], method, stage, layer))
    table = pd.concat(found, ignore_index=True)
    rows = over_draws(table, _BY)
    summary = _with_flops(setup, summarise(rows, _BY, setup.settings.seed), layers)
    return {
        NAME: summary,
        f"{NAME}_tests": _tests(rows, setup.settings.seed),
        f"{NAME}_time": _time(setup, {stage: of for (kind, stage, _), of in cells.items() if kind == "capa"}),
        f"{NAME}_rows": table,
        f"{NAME}_notes": notes(*remarks),
    }


def _condition(rows: pd.DataFrame, method: str, stage: str, layer: int) -> pd.DataFrame:
    rows = rows.copy()
    rows.insert(0, "method", method)
    rows.insert(1, "stage", stage)
    rows.insert(2, "layer", layer)
    return rows


def _tests(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Every method and stage against vanilla."""
    named = rows.assign(which=rows["method"] + np.where(rows["stage"] != "", " " + rows["stage"], ""))
    pairs = [(name, VANILLA) for name in named["which"].unique() if name != VANILLA]
    return compare(named, (), "which", pairs, MEASURES, seed)


def _with_flops(setup: Setup, summary: pd.DataFrame, layers: tuple[int, ...]) -> pd.DataFrame:
    """The summary with FLOPs as shares of vanilla's, of the same task."""
    whole = summary[summary["method"] == VANILLA].set_index("task")["flops"]
    summary["flops_share"] = summary["flops"] / summary["task"].map(whole)
    shape = Shape.of(setup.lvlm.model.config)

    def published(row: pd.Series) -> float:
        n, left = round(row["n_visual"]), round(row["n_kept"])
        kept = {int(row["layer"]): left} if row["layer"] >= 0 and left < n else None
        on = layers if row["method"] in ("capa", "hadamard") else ()
        cost = prefill_cost(shape, visual=n, text=0, kept=kept, hadamard=on, convention=AS_THE_PAPER)
        return cost.ratio(prefill_cost(shape, visual=n, text=0, convention=AS_THE_PAPER))

    summary["flops_share_as_published"] = summary.apply(published, axis=1).astype(float)
    return summary


def _time(setup: Setup, methods: Mapping[str, CAPA]) -> pd.DataFrame:
    """Per stage and phase ("prefill", "decode step"): seconds, and the ratio to vanilla with its interval."""
    keys = images_keys(setup.samples)
    stride = max(1, len(setup.samples) // TIMED)
    chosen = setup.samples[::stride][:TIMED]

    def make() -> pd.DataFrame:
        found = []
        attached = (partial(of.attach, setup.lvlm) for of in methods.values())
        ways: list[Callable[[], AbstractContextManager[Any]]] = [nullcontext, *attached]
        for sample in setup.bar(chosen, "time"):
            inputs = prepare(setup.lvlm, [sample])
            times = time_interleaved(setup.lvlm, inputs, ways, steps=4, repeats=REPEATS)
            for name, of in zip((VANILLA, *methods), times, strict=True):
                seconds = {"prefill": median(of.prefill), "decode step": median(of.step)}
                found += [
                    {"sample": sample.id, "stage": name, "phase": phase, "seconds": value}
                    for phase, value in seconds.items()
                ]
        return pd.DataFrame(found, columns=["sample", "stage", "phase", "seconds"])

    seconds = (
        setup.store.part(NAME, "time", make).set_index(["stage", "phase", "sample"])["seconds"].sort_index()
    )
    table = []
    for stage in methods:
        for phase in ("prefill", "decode step"):
            own, before = seconds.loc[stage, phase], seconds.loc[VANILLA, phase]
            clusters = [keys[sample] for sample in own.index]
            of = mean_interval(np.log(own / before), clusters, setup.settings.seed, proportion=False)
            ratio, low, high = np.exp([of.mean, of.low, of.high])
            mean = {"seconds": own.mean(), "seconds_vanilla": before.mean()}
            ends = {"ratio": ratio, "ratio_low": low, "ratio_high": high}
            table.append(
                {"stage": stage, "phase": phase, "n": of.n, "n_images": of.n_clusters, **mean, **ends}
            )
    return pd.DataFrame(table)

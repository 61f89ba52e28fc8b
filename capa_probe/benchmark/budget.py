"""Experiment 3: accuracy against the share of visual tokens that stays, by score and by layer.

Every score ranks the visual tokens by the last prompt token's attention in the layer before; the best stay, and the
others are gone from the pruning layer on. Random choices are repeated, and averaged per sample before any statistic.
"""

from __future__ import annotations

import pandas as pd

from capa_probe.benchmark.cells import MEASURES, cell, vanilla_rows
from capa_probe.benchmark.setup import Setup
from capa_probe.benchmark.summary import compare, over_draws, summarise
from capa_probe.pruning import CAPA
from capa_probe.pruning.capa import Score

NAME = "budget"
SCORES: tuple[Score, ...] = ("contribution", "attention", "value_norm", "removal_effect", "random")
_BY = ("stage", "layer", "keep", "score")
OTHERS = tuple(("contribution", other) for other in SCORES[1:])


def run(setup: Setup) -> dict[str, pd.DataFrame]:
    """Run the experiment.

    Returns:
        ``budget``: per stage, layer, keep and score, and per task, means with intervals; keep 1 is the model itself.
        ``budget_tests``: contribution against every other score, at each stage and budget, and (stage "all", keep NaN)
        per sample averaged over all of them. ``budget_rows``: per sample.
    """
    settings, seed = setup.settings, setup.settings.seed
    cells = [
        (stage, layer, keep, score, draw)
        for stage, layer in setup.stages().items()
        for keep in settings.keeps
        if keep < 1
        for score in SCORES
        for draw in range(settings.draws if score == "random" else 1)
    ]
    found = []
    for stage, layer, keep, score, draw in setup.bar(cells, "accuracy against budget"):
        pruner = CAPA(layers=(layer,), keep=keep, score=score, seed=seed + draw)
        condition = {"layer": layer, "keep": keep, "score": score, "draw": draw}
        rows = cell(setup, NAME, condition, pruner)
        rows.insert(0, "stage", stage)
        found.append(rows)
    if 1 in settings.keeps:
        whole = vanilla_rows(setup)
        for stage, layer in setup.stages().items():
            for score in SCORES:
                columns = {"stage": stage, "layer": layer, "keep": 1.0, "score": score, "draw": 0}
                found.append(pd.concat([pd.DataFrame([columns] * len(whole)), whole], axis=1))
    table = pd.concat(found, ignore_index=True)
    rows = over_draws(table, _BY)
    pruned = rows[rows["keep"] < 1]
    each = compare(pruned, _BY[:3], "score", OTHERS, MEASURES, seed)
    together = (
        pruned.groupby(["score", "sample", "task", "image"], sort=False)[list(MEASURES)].mean().reset_index()
    )
    overall = compare(together, (), "score", OTHERS, MEASURES, seed)
    # Its own family of tests: what the claims are judged by.
    overall.insert(0, "stage", "all")
    overall.insert(1, "layer", -1)
    overall.insert(2, "keep", float("nan"))
    tests = pd.concat([overall, each], ignore_index=True)
    return {NAME: summarise(rows, _BY, seed), f"{NAME}_tests": tests, f"{NAME}_rows": table}

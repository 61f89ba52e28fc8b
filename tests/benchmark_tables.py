"""Made-up tables of a confirmation, with the columns and the order of real ones, and numbers that are all different."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from capa_probe.benchmark.store import Store

STAGES = {"early": 1, "transition": 3, "late": 4}
SCORES = ("contribution", "attention", "value_norm", "removal_effect", "random")
KEEPS = (0.5, 0.25, 1.0)
MEASURES = ("correct", "agrees", "hellinger")
GROUPS = {"redundant": "1+2+3", "as many redundant": "1+2", "as many others": "0+4"}


def _with_numbers(
    conditions: Iterable[Mapping[str, Any]], measures: Iterable[str], seed: int
) -> pd.DataFrame:
    """A row per condition for all tasks together, and one for a task that no figure of all tasks may show."""
    rng = np.random.default_rng(seed)
    rows = []
    for condition in conditions:
        for task, n in (("all", 40), ("color", 3)):
            row: dict[str, Any] = {**condition, "task": task, "n": n, "n_images": n - 1}
            for measure in measures:
                middle = rng.uniform(0.2, 0.8)
                row |= {
                    measure: middle,
                    f"{measure}_low": middle - rng.uniform(0.01, 0.1),
                    f"{measure}_high": middle + rng.uniform(0.01, 0.1),
                }
            row |= {"flops": rng.uniform(1e8, 1e9), "seconds": rng.uniform(0.01, 0.05)}
            rows.append(row)
    return pd.DataFrame(rows)


def tables(seed: int = 0) -> dict[str, pd.DataFrame]:
    """All tables that figures are drawn from."""
    staged = [{"stage": stage, "layer": layer} for stage, layer in STAGES.items()]
    budget = [{**of, "keep": keep, "score": score} for of in staged for keep in KEEPS for score in SCORES]
    ffn = [
        {"group": group, "layers": layers, "ffn": kind}
        for group, layers in GROUPS.items()
        for kind in ("hadamard", "skip", "full")
    ]
    sinks = [
        {"layer": layer, "role": role, "removed": removed}
        for layer in (3, 4)
        for role in ("dump", "anchor")
        for removed in ("role", "non_sinks", "visual")
    ]
    steps = [
        {"method": method, **of, "step": step}
        for of in staged
        for method in ("contribution", "attention", "random", "every_step")
        for step in range(4)
    ]
    maps = [
        {"layer": layer, "against": against, "step": step}
        for layer in range(5)
        for against in ("previous", "prefill")
        for step in range(1, 4)
    ]
    plain = {"stage": "", "layer": -1}
    methods = [
        {"method": "vanilla", **plain},
        *({"method": m, **of} for of in staged for m in ("capa", "pruning")),
    ]
    knockout = [
        {"layer": layer, "scored_at": at, "effect": effect, "score": score}
        for layer in STAGES.values()
        for at in ("previous", "same")
        for effect in ("kl", "hellinger")
        for score in SCORES
    ]
    time = [
        {"stage": stage, "phase": phase, "n": 16, "n_images": 16, "ratio": 0.5 + 0.1 * number + 0.01 * part,
         "ratio_low": 0.48 + 0.1 * number, "ratio_high": 0.53 + 0.1 * number}
        for number, stage in enumerate(STAGES)
        for part, phase in enumerate(("prefill", "decode step"))
    ]  # fmt: skip
    counts = {"layer": [3, 4], "n_dump": [12, 9], "n_anchor": [5, 4]}
    notes = pd.DataFrame({"note": pd.Series([], dtype=object)})
    return {
        "budget": _with_numbers(budget, MEASURES, seed),
        "ffn_redundancy": _with_numbers(ffn, MEASURES, seed + 1),
        "ffn_redundancy_notes": notes,
        "dumps_anchors": _with_numbers(sinks, MEASURES, seed + 2),
        "dumps_anchors_counts": pd.DataFrame(counts),
        "dumps_anchors_notes": notes,
        "over_steps": _with_numbers(steps, ("hellinger",), seed + 3),
        "over_steps_maps": _with_numbers(maps, ("hellinger",), seed + 4),
        "together": _with_numbers([*methods, {"method": "hadamard", **plain}], MEASURES, seed + 5),
        "together_time": pd.DataFrame(time),
        "knockout": _with_numbers(knockout, ("spearman",), seed + 6),
    }


def log() -> list[dict[str, Any]]:
    """Lines of a training's log; a stage was stopped at step 50 and went on from step 25."""
    rng = np.random.default_rng(0)
    steps = [("tower", s) for s in (25, 50)] + [("symbols", s) for s in (25, 50, 50, 75, 100)]
    steps += [("projector", 25), ("joint", 25), ("joint", 50)]
    lines = []
    for number, (stage, step) in enumerate(steps):
        tasks = {"tower": ("shape", "row"), "projector": ()}.get(stage, ("color", "chain", "list"))
        lines.append(
            {
                "stage": stage, "step": step, "seconds": 1.5 * step + number, "loss": float(rng.uniform(0.1, 3)),
                "accuracy": {task: round(float(rng.uniform()), 4) for task in tasks},
            }
        )  # fmt: skip
    return lines


def evaluation() -> pd.DataFrame:
    """What the model answers in the end."""
    return pd.DataFrame(
        [
            {"task": "color", "n": 120, "accuracy": 0.9, "low": 0.85, "high": 0.94, "blank": 0.1, "majority": 0.2},
            {"task": "chain", "n": 120, "accuracy": 0.3, "low": 0.21, "high": 0.41, "blank": 0.08, "majority": 0.15},
        ]
    )  # fmt: skip


def write_run(folder: Path, of: Mapping[str, pd.DataFrame], model: str = "small", **facts: Any) -> Path:
    """A finished run of ``capa-probe confirm`` with these tables."""
    known = {
        "model": model,
        "family": "llava",
        "weights_hash": f"hash of {model}",
        "n_layers": 5,
        "d_model": 64,
        "data_fingerprint": "data",
    }
    with Store.open(folder, known | facts) as store:
        for name, table in of.items():
            store.write(name, table)
        store.finish()
    return folder

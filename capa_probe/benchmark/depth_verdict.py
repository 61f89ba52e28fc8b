"""The verdict on depth: one row per task, from the tables of its cells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from capa_probe.benchmark.depth_cells import GONE, KEPT, NONE, RANDOM, WHOLE, part_of_depth
from capa_probe.benchmark.summary import ALL

#: The layer before which tokens vanish, and the share that is kept, in the columns on cost.
EARLY, SCARCE = 2, 0.25
NEVER = -1
COLUMNS = (
    "task",
    "measure",
    "n",
    "n_images",
    "whole",
    "whole_low",
    "whole_high",
    "blank",
    "last_layer",
    "gone_2",
    "gone_2_low",
    "gone_2_high",
    "gone_2_p",
    "third",
    "gone_third",
    "gone_third_low",
    "gone_third_high",
    "gone_third_p",
    "random_25",
    "random_25_low",
    "random_25_high",
    "random_25_p",
    "best_score",
    "best_25",
    "best_25_low",
    "best_25_high",
)


def verdict(tables: Mapping[str, pd.DataFrame], n_layers: int, measure: str) -> pd.DataFrame:
    """When a model stops looking, and how much of the image it can spare.

    Args:
        tables: summaries and tests of :mod:`capa_probe.benchmark.depth`.
        n_layers: of the model.
        measure: "correct", or "agrees" where no answers are known.

    Returns:
        One row per task, "all" first. ``whole``: mean of the measure unpruned, with its interval; ``blank``: with all
        visual tokens gone before layer 0. ``last_layer``: the last layer before which removing all visual tokens costs
        something (the interval of the paired difference lies above 0); -1 where that is never so. ``gone_2`` and
        ``gone_third``: what it costs before layer 2, and before layer L/3 (rounded up, ``third``): mean of whole less
        pruned, interval, p-value. ``random_25``: what it costs to keep a random 25 % from layer 2 on; ``best_25``:
        likewise by the score that costs least there, of those that were asked for. NaN, or an empty string, where the
        model is too shallow or no such cell was run.
    """
    summary, gone, kept = tables[GONE], tables[f"{GONE}_tests"], tables[f"{KEPT}_tests"]
    gone = gone[(gone["measure"] == measure) & (gone["second"] == NONE)]
    kept = kept[(kept["measure"] == measure) & (kept["first"] == WHOLE)]
    kept = kept[(kept["layer"] == EARLY) & (kept["keep"] == SCARCE)]
    third, found = part_of_depth(n_layers, 3), []
    for task in summary["task"].unique():
        own, lost = summary[summary["task"] == task].set_index("layer"), gone[gone["task"] == task]
        scarce = kept[kept["task"] == task].set_index("second")
        whole, costly = own.loc[n_layers], lost.loc[lost["low"] > 0, "layer"]
        by_layer = lost.set_index("layer")
        row: dict[str, Any] = {
            "task": task,
            "measure": measure,
            "n": whole["n"],
            "n_images": whole["n_images"],
        }
        row |= {"whole": whole[measure], "whole_low": whole[f"{measure}_low"]}
        row |= {"whole_high": whole[f"{measure}_high"], "blank": own.loc[0, measure]}
        row |= {"last_layer": int(costly.max()) if len(costly) else NEVER, "third": third}
        row |= _cost("gone_2", by_layer, EARLY) | _cost("gone_third", by_layer, third)
        row |= _cost("random_25", scarce, RANDOM)
        scores = scarce.drop(index=RANDOM, errors="ignore")["difference"]
        best = str(scores.idxmin()) if len(scores) else ""
        row |= {"best_score": best} | _cost("best_25", scarce, best)
        found.append(row)
    return pd.DataFrame(found, columns=list(COLUMNS))


def sentences(table: pd.DataFrame, n_layers: int) -> list[str]:
    """The row over all tasks in words."""
    (row,) = table[table["task"] == ALL].to_dict("records")
    what = "accuracy" if row["measure"] == "correct" else "agreement with the model's own answers"
    size = f"{row['n']:,} samples of {row['n_images']:,} images"
    blank = f"{row['blank']:.3f} without the image (all visual tokens gone before layer 0)"
    found = [f"Over {size}, {what} is {row['whole']:.3f}, and {blank}."]
    last = row["last_layer"]
    if last == NEVER:
        found.append("Removing all visual tokens costs nothing before any layer.")
    elif last == n_layers - 1:
        found.append(f"Removing all visual tokens costs something before every layer up to the last, {last}.")
    else:
        found.append(f"The last layer before which removing all visual tokens costs something is {last}.")
    for name, what_is_done in (
        ("gone_2", "All gone before layer 2"),
        ("gone_third", f"All gone before layer {row['third']} (a third of the depth)"),
        ("random_25", "A random 25 % kept from layer 2 on"),
        ("best_25", f"The best 25 % by {row['best_score']} kept from layer 2 on"),
    ):
        if not math.isnan(row[name]):
            found.append(
                f"{what_is_done}: costs {row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]."
            )
    return found


def _cost(name: str, tests: pd.DataFrame, key: Any) -> dict[str, float]:
    columns = {"": "difference", "_low": "low", "_high": "high", "_p": "p"}
    if key not in tests.index:
        return {f"{name}{end}": math.nan for end in columns}
    return {f"{name}{end}": float(tests.loc[key, column]) for end, column in columns.items()}

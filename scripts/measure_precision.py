"""Measures what bfloat16 costs in exactness, and writes it into docs/precision.md: a table and a figure.

python scripts/measure_precision.py            # measure (3 minutes on one core), then write
python scripts/measure_precision.py --show     # write the page and the figure again from what was measured
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from precision_runs import COLUMNS, WAYS, compare, quantiles, relative_error

from capa_probe.figures.save import save
from capa_probe.figures.style import INK, QUIET, TEXT, VISUAL, styled
from capa_probe.files import replace, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "precision.json"
PAGE, FIGURE = ROOT / "docs" / "precision.md", ROOT / "docs" / "images" / "precision.png"
START, END = "<!-- results: start -->", "<!-- results: end -->"
OFFSETS, SEEDS = (0, 10, 30, 100, 300), (0, 1, 2)
#: Offset of the table and of the left part of the figure.
SHOWN = 30
LOOKS = {
    "capa_probe": (VISUAL, "o", "capa_probe, bf16 model"),
    "rounding": (INK, "|", "fp32 model, activations rounded to bf16"),
    "eager": (TEXT, "s", "bf16 eager attention, computed in bf16"),
}


def measure(
    offsets: tuple[int, ...] = OFFSETS, seeds: tuple[int, ...] = SEEDS, **sizes: Any
) -> dict[str, Any]:
    """Relative errors of every column, pooled over layers, positions and seeds."""
    rows = []
    for offset in offsets:
        runs = [compare(offset, seed=seed, **sizes) for seed in seeds]
        for column in COLUMNS:
            for way in WAYS:
                against = (
                    {"error": "reference"}
                    if way == "rounding"
                    else {"error": "reference", "own": f"exact of {way}"}
                )
                row: dict[str, Any] = {"offset": offset, "column": column, "way": way}
                for name, truth in against.items():
                    errors = torch.cat(
                        [relative_error(run[way], run[truth], column).flatten() for run in runs]
                    )
                    row |= {f"{name}_{key}": value for key, value in quantiles(errors).items()}
                rows.append(row)
    packages = {name: version(name) for name in ("torch", "transformers", "capa-probe")}
    return {"machine": {"processor": platform.machine(), "device": "cpu"}, "versions": packages, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """Median and 95th percentile of the error per column, and of computing alone, in Markdown."""
    rows = pd.DataFrame(results["rows"])
    rows = rows[rows["offset"] == SHOWN].set_index(["column", "way"])
    heads = ("column", "unavoidable", "capa_probe", "bf16 eager", "capa_probe, computing alone")
    lines = [
        f"| {' | '.join(heads)} | bf16 eager, computing alone |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for column in COLUMNS:
        cells = [_pair(rows.loc[(column, way)], "error") for way in ("rounding", "capa_probe", "eager")]
        cells += [_pair(rows.loc[(column, way)], "own") for way in ("capa_probe", "eager")]
        lines.append(f"| `{column}` | {' | '.join(cells)} |")
    packages = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return f"CPU ({results['machine']['processor']}); {packages}.\n\n" + "\n".join(lines)


def _pair(row: pd.Series, name: str) -> str:
    return f"{row[f'{name}_median']:.1e} ({row[f'{name}_p95']:.1e})"


@styled
def draw(results: dict[str, Any]) -> Figure:
    """Errors against the float32 model: of every column, and of two of them over the offset of the logits."""
    rows = pd.DataFrame(results["rows"])
    figure = Figure(figsize=(9.2, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    shown = rows[rows["offset"] == SHOWN]
    for way, (color, marker, label) in LOOKS.items():
        own = shown[shown["way"] == way].set_index("column")["error_median"].loc[list(COLUMNS)]
        size = 150 if marker == "|" else 34
        left.scatter(own, range(len(COLUMNS)), s=size, c=color, marker=marker, label=label, zorder=3)
    left.set(xscale="log", xlabel="median relative error against the fp32 model")
    left.set_title(f"All columns, attention logits around {SHOWN}", loc="left")
    left.set_yticks(range(len(COLUMNS)), COLUMNS)
    left.invert_yaxis()
    styles = {"attention": "-", "contribution": "--"}
    for way in ("eager", "rounding", "capa_probe"):
        color, marker, _ = LOOKS[way]
        for column, style in styles.items():
            own = rows[(rows["way"] == way) & (rows["column"] == column)]
            right.plot(own["offset"], own["error_median"], style, color=color, marker=marker, markersize=5)
            if way == "rounding":  # lies under what is labelled
                continue
            right.annotate(
                column,
                (own["offset"].iloc[-1], own["error_median"].iloc[-1]),
                xytext=(6, -3),
                fontsize=8,
                textcoords="offset points",
                color=QUIET,
            )
    right.set_xscale("symlog", linthresh=10)
    right.set_xticks(OFFSETS, [str(offset) for offset in OFFSETS])
    right.set_xlim(-1, 1500)
    right.xaxis.minorticks_off()
    right.set(yscale="log", xlabel="offset that all attention logits share", ylabel="median relative error")
    right.set_title("Two columns, over the offset", loc="left")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def write(results: dict[str, Any]) -> None:
    """Put the table into the page, and draw the figure."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    new = f"{before}{START}\n\n{table(results)}\n\n{END}{after}"
    replace(PAGE, lambda temporary: temporary.write_text(new, encoding="utf-8"))
    save(draw(results), FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--show", action="store_true", help="measure nothing")
    if not parser.parse_args().show:
        write_json(RESULTS, measure())
    write(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()

"""Writes what a confirmation found into docs/confirmation.md, between its two markers.

    python scripts/write_confirmation.py RUN

RUN is the folder of ``capa-probe confirm``. What stands outside the markers is left as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from capa_probe.benchmark.experiments import EXPERIMENTS
from capa_probe.benchmark.store import read_tables

PAGE = Path(__file__).parents[1] / "docs" / "confirmation.md"
START, END = "<!-- results: start -->", "<!-- results: end -->"


def results(run: Path) -> str:
    """Tables in Markdown: time, claims, accuracy against budget, FFNs, all together."""
    tables = read_tables(run)
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    parts = [header(manifest), claims(tables["claims"])]
    if "budget" in tables:
        parts.append(budget(tables["budget"]))
    if len(tables.get("ffn_redundancy", ())):
        parts.append(ffn(tables["ffn_redundancy"]))
    if "together" in tables:
        parts.append(together(tables["together"], tables["together_time"]))
    return "\n\n".join(parts)


def header(manifest: dict) -> str:
    seconds = manifest["seconds"]
    each = ", ".join(
        f"{experiment.number}: {seconds[experiment.name]['cpu'] / 60:.1f}"
        for experiment in EXPERIMENTS
        if experiment.name in seconds
    )
    whole = sum(own["cpu"] for own in seconds.values()) / 60
    stages = ", ".join(f"{stage} {layer}" for stage, layer in manifest["stages"].items())
    return (
        f"{manifest['n_samples']} questions, {manifest['n_calibration']} for calibration; pruning layers {stages}; "
        f"weights {manifest['weights_hash'][:12]}. CPU minutes by experiment: {each}; {whole:.0f} in all."
    )


def claims(table: pd.DataFrame) -> str:
    rows = [
        f"| {row.experiment} | {row.claim} | {row.where} | **{row.verdict}** | {row.numbers} |"
        for row in table.itertuples()
    ]
    return "\n".join(["| | claim | where | verdict | numbers |", "|---|---|---|---|---|", *rows])


def budget(table: pd.DataFrame) -> str:
    """Accuracy and Hellinger distance, one line per stage and budget."""
    own = table[(table["task"] == "all") & (table["keep"] < 1)]
    scores = list(own["score"].unique())
    lines = [
        "Accuracy in percent, and Hellinger distance x 1000, against the share that stays:",
        "",
        f"| stage (layer) | kept | {' | '.join(score.replace('_', ' ') for score in scores)} |",
        f"|---|---|{'---|' * len(scores)}",
    ]
    for (stage, layer, keep), rows in own.groupby(["stage", "layer", "keep"], sort=False):
        by = rows.set_index("score")
        cells = [f"{100 * by['correct'][score]:.1f}, {1000 * by['hellinger'][score]:.1f}" for score in scores]
        lines.append(f"| {stage} ({layer}) | {keep:.0%} | {' | '.join(cells)} |")
    whole = table[(table["task"] == "all") & (table["keep"] == 1)]["correct"]
    if len(whole):
        lines += ["", f"The model itself: {100 * whole.iloc[0]:.1f} %."]
    return "\n".join(lines)


def ffn(table: pd.DataFrame) -> str:
    lines = [
        "FFN of visual tokens, with no token pruned:",
        "",
        "| layers | FFN | accuracy | Hellinger x 1000 | interval |",
        "|---|---|---|---|---|",
    ]
    own = table[(table["task"] == "all") & (table["ffn"] != "full")]
    for row in own.itertuples():
        ends = f"{1000 * row.hellinger_low:.2f} to {1000 * row.hellinger_high:.2f}"
        lines.append(
            f"| {row.group} ({row.layers.replace('+', ', ')}) | {row.ffn} | {row.correct:.3f} | "
            f"{1000 * row.hellinger:.2f} | {ends} |"
        )
    return "\n".join(lines)


def together(table: pd.DataFrame, times: pd.DataFrame) -> str:
    lines = [
        "All together:",
        "",
        "| method | accuracy | Hellinger x 1000 | FLOPs, whole forward | as the paper counts | prefill time |",
        "|---|---|---|---|---|---|",
    ]
    ratio = times[times["phase"] == "prefill"].set_index("stage")
    for row in table[table["task"] == "all"].itertuples():
        measured = "-"
        if row.method == "capa":
            of = ratio.loc[row.stage]
            measured = f"{of['ratio']:.3f} ({of['ratio_low']:.3f} to {of['ratio_high']:.3f})"
        lines.append(
            f"| {row.method} {row.stage} | {row.correct:.3f} | {1000 * row.hellinger:.1f} | {row.flops_share:.1%} | "
            f"{row.flops_share_as_published:.1%} | {measured} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{START}\n\n{results(run)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

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
    """Tables in Markdown: time, claims, and a table or two for each experiment that was run."""
    tables = read_tables(run)
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    parts = [header(manifest), claims(tables["claims"])]
    if "knockout" in tables:
        parts.append(knockout(tables["knockout"], tables["knockout_tests"], tables["knockout_tokens"]))
    if "budget" in tables:
        parts.append(budget(tables["budget"]))
        if tables["budget"]["task"].nunique() > 1:
            parts.append(budget_tasks(tables["budget"]))
    if len(tables.get("ffn_redundancy", ())):
        parts.append(ffn(tables["ffn_redundancy"]))
    if "together" in tables:
        parts.append(together(tables["together"], tables["together_time"]))
    if "over_steps" in tables:
        parts += [over_steps(tables["over_steps_rows"]), maps(tables["over_steps_maps_rows"])]
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


def budget_tasks(table: pd.DataFrame) -> str:
    """Accuracy by task at the first stage, with about a tenth kept."""
    keep = min(table["keep"], key=lambda share: abs(share - 0.1))
    own = table[
        (table["stage"] == table["stage"].iloc[0]) & (table["keep"] == keep) & (table["task"] != "all")
    ]
    scores = list(own["score"].unique())
    lines = [
        f"Accuracy in percent by task, {table['stage'].iloc[0]}, {keep:.0%} kept:",
        "",
        f"| task | {' | '.join(score.replace('_', ' ') for score in scores)} |",
        f"|---|{'---|' * len(scores)}",
    ]
    for task, rows in own.groupby("task"):
        by = rows.set_index("score")["correct"]
        lines.append(f"| {task} | {' | '.join(f'{100 * by[score]:.1f}' for score in scores)} |")
    return "\n".join(lines)


def knockout(table: pd.DataFrame, tests: pd.DataFrame, tokens: pd.DataFrame) -> str:
    """Rank correlation of scores and effects; what the effects are like."""
    own = table[(table["task"] == "all") & table["effect"].isin(["hellinger", "answer_drop"])]
    scores = list(own["score"].unique())
    each = tokens[tokens["scored_at"] == tokens["scored_at"].iloc[0]]
    title = (
        f"Knock-outs: Spearman's rho of scores with the effects of {len(each):,} tokens of {each['sample'].nunique()} "
        f"samples, mean and 95 % interval. Their median Hellinger distance is {each['hellinger'].median():.1e}, the "
        f"largest {each['hellinger'].max():.1e}; without {(each['answer_drop'] < 0).mean():.0%} of them the answer "
        "becomes more likely."
    )
    lines = [
        title,
        "",
        f"| effect | scored at | layer | {' | '.join(score.replace('_', ' ') for score in scores)} |",
        f"|---|---|---|{'---|' * len(scores)}",
    ]
    for (effect, scored_at, layer), rows in own.groupby(["effect", "scored_at", "layer"], sort=False):
        by = rows.set_index("score")
        cells = [
            f"{by['spearman'][score]:.2f} [{by['spearman_low'][score]:.2f}, {by['spearman_high'][score]:.2f}]"
            for score in scores
        ]
        lines.append(f"| {effect} | {scored_at} | {layer} | {' | '.join(cells)} |")
    lead = (
        "Contribution's lead in rho over another score, with the Hellinger distance, scored at the layer of the "
        "knock-out (corrected p):"
    )
    lines += [
        "",
        lead,
        "",
    ]
    own = tests[
        (tests["task"] == "all")
        & (tests["effect"] == "hellinger")
        & (tests["scored_at"] == "same")
        & (tests["measure"] == "spearman")
    ]
    others = list(own["second"].unique())
    lines += [
        f"| layer | {' | '.join(other.replace('_', ' ') for other in others)} |",
        f"|---|{'---|' * len(others)}",
    ]
    for layer, rows in own.groupby("layer"):
        by = rows.set_index("second")
        cells = [f"{by['difference'][other]:+.2f} ({by['p_holm'][other]:.3f})" for other in others]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def over_steps(rows: pd.DataFrame) -> str:
    """Distance over a sample's steps, of questions and descriptions apart; and step by step."""
    rows = rows.assign(
        prompts=rows["task"].map(lambda task: "descriptions" if task == "describe" else "questions")
    )
    methods, at = list(rows["method"].unique()), ["prompts", "stage", "layer"]
    head = " | ".join(method.replace("_", " ") for method in methods)
    title = (
        "Over generation steps: Hellinger distance x 1000 to the model's own next-token distribution, mean over a "
        "sample's steps and then over samples:"
    )
    lines = [
        title,
        "",
        f"| prompts | stage (layer) | samples | steps | {head} |",
        f"|---|---|---|---|{'---|' * len(methods)}",
    ]
    for (prompts, stage, layer), own in rows.groupby(at, sort=False):
        by = own.groupby(["method", "sample"])["hellinger"].mean().groupby("method").mean()
        steps = own.groupby("sample")["n_steps"].first()
        cells = " | ".join(f"{1000 * by[method]:.1f}" for method in methods)
        span = f"{steps.min()} to {steps.max()}"
        lines.append(f"| {prompts} | {stage} ({layer}) | {len(steps)} | {span} | {cells} |")
    first = rows[rows["stage"] == rows["stage"].iloc[0]]
    lines += [
        "",
        f"The same step by step, {first['stage'].iloc[0]}, all prompts that reach the step:",
        "",
        f"| step | samples | {head} |",
        f"|---|---|{'---|' * len(methods)}",
    ]
    for step, own in first.groupby("step"):
        by = own.groupby("method")["hellinger"].mean()
        cells = " | ".join(f"{1000 * by[method]:.1f}" for method in methods)
        lines.append(f"| {step} | {own['sample'].nunique()} | {cells} |")
    return "\n".join(lines)


def maps(rows: pd.DataFrame) -> str:
    """How far contribution maps are apart, layer by layer."""
    title = (
        "Contribution maps of a step against those of the step before and of the prompt: Hellinger distance, and share "
        "of the top quarter that both have in common (0.25 by chance):"
    )
    lines = [
        title,
        "",
        "| layer | step before | prompt |",
        "|---|---|---|",
    ]
    # Each sample counts once, however long its answer is.
    of = rows.groupby(["layer", "against", "sample"])[["hellinger", "overlap"]].mean()
    by = of.groupby(["layer", "against"]).mean()
    for layer in sorted(rows["layer"].unique()):
        cells = [
            f"{by['hellinger'][layer, against]:.2f}, {by['overlap'][layer, against]:.2f}"
            for against in ("previous", "prefill")
        ]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
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

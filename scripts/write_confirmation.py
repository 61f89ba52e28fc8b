"""Writes what a confirmation found into docs/confirmation.md, between its two markers.

    python scripts/write_confirmation.py RUN

RUN is the folder of ``capa-probe confirm``. What stands outside the markers is left as it is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

import pandas as pd

from capa_probe.benchmark.claims import Verdict
from capa_probe.benchmark.experiments import EXPERIMENTS
from capa_probe.benchmark.store import read_tables

PAGE = Path(__file__).parents[1] / "docs" / "confirmation.md"
VERDICTS = get_args(Verdict)
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


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _named(scores: Iterable[str]) -> list[str]:
    return [score.replace("_", " ") for score in scores]


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
    """How often each experiment says what, and every claim."""
    counts = table.groupby(["experiment", "verdict"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=VERDICTS, fill_value=0)
    summary = _table(
        ["experiment", *VERDICTS],
        [
            [f"{number}: {experiment.replace('_', ' ')}", *(str(counts.loc[number, v]) for v in VERDICTS)]
            for number, experiment in ((e.number, e.name) for e in EXPERIMENTS)
            if number in counts.index
        ],
    )
    each = _table(
        ["", "claim", "where", "verdict", "numbers"],
        [
            [str(row.experiment), row.claim, row.where, f"**{row.verdict}**", row.numbers]
            for row in table.itertuples()
        ],
    )
    return f"Claims by experiment, each stage or layer counted on its own:\n\n{summary}\n\n{each}"


def budget(table: pd.DataFrame) -> str:
    """Accuracy, and Hellinger distance, one line per stage and budget."""
    own = table[(table["task"] == "all") & (table["keep"] < 1)]
    scores = list(own["score"].unique())
    whole = table[(table["task"] == "all") & (table["keep"] == 1)]["correct"]
    itself = f" (the model itself: {100 * whole.iloc[0]:.1f})" if len(whole) else ""
    parts = []
    for title, column, factor in (
        (f"Accuracy in percent against the share that stays{itself}:", "correct", 100),
        ("Hellinger distance x 1000 against the share that stays:", "hellinger", 1000),
    ):
        rows = [
            [
                f"{stage} ({layer})",
                f"{keep:.0%}",
                *(f"{factor * of.set_index('score')[column][s]:.1f}" for s in scores),
            ]
            for (stage, layer, keep), of in own.groupby(["stage", "layer", "keep"], sort=False)
        ]
        parts.append(f"{title}\n\n{_table(['stage (layer)', 'kept', *_named(scores)], rows)}")
    return "\n\n".join(parts)


def budget_tasks(table: pd.DataFrame) -> str:
    """Accuracy by task at the first stage, with about a quarter kept."""
    keep = min(table["keep"], key=lambda share: abs(share - 0.25))
    first = table["stage"].iloc[0]
    own = table[(table["stage"] == first) & (table["keep"] == keep) & (table["task"] != "all")]
    scores = list(own["score"].unique())
    rows = [
        [task, *(f"{100 * of.set_index('score')['correct'][score]:.1f}" for score in scores)]
        for task, of in own.groupby("task")
    ]
    return (
        f"Accuracy in percent by task, {first}, {keep:.0%} kept:\n\n{_table(['task', *_named(scores)], rows)}"
    )


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
    rows = []
    for (effect, scored_at, layer), of in own.groupby(["effect", "scored_at", "layer"], sort=False):
        by = of.set_index("score")
        cells = (
            f"{by['spearman'][score]:.2f} [{by['spearman_low'][score]:.2f}, {by['spearman_high'][score]:.2f}]"
            for score in scores
        )
        rows.append([effect, scored_at, str(layer), *cells])
    lead = (
        "Contribution's lead in rho over another score, with the Hellinger distance, scored at the layer of the "
        "knock-out (corrected p):"
    )
    own = tests[
        (tests["task"] == "all")
        & (tests["effect"] == "hellinger")
        & (tests["scored_at"] == "same")
        & (tests["measure"] == "spearman")
    ]
    others = list(own["second"].unique())
    leads = []
    for layer, of in own.groupby("layer"):
        by = of.set_index("second")
        cells = (f"{by['difference'][other]:+.2f} ({by['p_holm'][other]:.3f})" for other in others)
        leads.append([str(layer), *cells])
    correlations = _table(["effect", "scored at", "layer", *_named(scores)], rows)
    return f"{title}\n\n{correlations}\n\n{lead}\n\n{_table(['layer', *_named(others)], leads)}"


def over_steps(rows: pd.DataFrame) -> str:
    """Distance over a sample's steps, of questions and descriptions apart; and step by step."""
    rows = rows.assign(
        prompts=rows["task"].map(lambda task: "descriptions" if task == "describe" else "questions")
    )
    methods, at = list(rows["method"].unique()), ["prompts", "stage", "layer"]
    title = (
        "Over generation steps: Hellinger distance x 1000 to the model's own next-token distribution, mean over a "
        "sample's steps and then over samples:"
    )
    lines = []
    for (prompts, stage, layer), own in rows.groupby(at, sort=False):
        by = own.groupby(["method", "sample"])["hellinger"].mean().groupby("method").mean()
        steps = own.groupby("sample")["n_steps"].first()
        cells = (f"{1000 * by[method]:.1f}" for method in methods)
        span = f"{steps.min()} to {steps.max()}"
        lines.append([prompts, f"{stage} ({layer})", str(len(steps)), span, *cells])
    whole = _table(["prompts", "stage (layer)", "samples", "steps", *_named(methods)], lines)
    first = rows[rows["stage"] == rows["stage"].iloc[0]]
    lines = []
    for step, own in first.groupby("step"):
        by = own.groupby("method")["hellinger"].mean()
        cells = (f"{1000 * by[method]:.1f}" for method in methods)
        lines.append([str(step), str(own["sample"].nunique()), *cells])
    each = _table(["step", "samples", *_named(methods)], lines)
    subtitle = f"The same step by step, {first['stage'].iloc[0]}, all prompts that reach the step:"
    return f"{title}\n\n{whole}\n\n{subtitle}\n\n{each}"


def maps(rows: pd.DataFrame) -> str:
    """How far contribution maps are apart, layer by layer."""
    title = (
        "Contribution maps of a step against those of the step before and of the prompt: Hellinger distance, and share "
        "of the top quarter that both have in common (0.25 by chance):"
    )
    # Each sample counts once, however long its answer is.
    of = rows.groupby(["layer", "against", "sample"])[["hellinger", "overlap"]].mean()
    by = of.groupby(["layer", "against"]).mean()
    against = {"previous": "step before", "prefill": "prompt"}
    lines = [
        [
            str(layer),
            *(f"{by[column][layer, name]:.2f}" for column in ("hellinger", "overlap") for name in against),
        ]
        for layer in sorted(rows["layer"].unique())
    ]
    columns = (f"{what}, {name}" for what in ("distance", "in common") for name in against.values())
    return f"{title}\n\n{_table(['layer', *columns], lines)}"


def ffn(table: pd.DataFrame) -> str:
    """Accuracy and distance for each group of layers and what stands for their FFN."""
    own = table[(table["task"] == "all") & (table["ffn"] != "full")]
    rows = [
        [
            f"{row.group} ({row.layers.replace('+', ', ')})",
            row.ffn,
            f"{row.correct:.3f}",
            f"{1000 * row.hellinger:.2f}",
            f"{1000 * row.hellinger_low:.2f} to {1000 * row.hellinger_high:.2f}",
        ]
        for row in own.itertuples()
    ]
    head = ["layers", "FFN", "accuracy", "Hellinger x 1000", "interval"]
    return f"FFN of visual tokens, with no token pruned:\n\n{_table(head, rows)}"


def together(table: pd.DataFrame, times: pd.DataFrame) -> str:
    """CAPA and its parts: accuracy, distance, FLOPs and measured time."""
    ratio = times[times["phase"] == "prefill"].set_index("stage")
    rows = []
    for row in table[table["task"] == "all"].itertuples():
        measured = "-"
        if row.method == "capa":
            of = ratio.loc[row.stage]
            measured = f"{of['ratio']:.3f} ({of['ratio_low']:.3f} to {of['ratio_high']:.3f})"
        rows.append(
            [
                f"{row.method} {row.stage}".strip(),
                f"{row.correct:.3f}",
                f"{1000 * row.hellinger:.1f}",
                f"{row.flops_share:.1%}",
                f"{row.flops_share_as_published:.1%}",
                measured,
            ]
        )
    head = [
        "method",
        "accuracy",
        "Hellinger x 1000",
        "FLOPs, whole forward",
        "as the paper counts",
        "prefill time",
    ]
    return f"All together:\n\n{_table(head, rows)}"


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

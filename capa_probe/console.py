"""What the command line shows: a spinner, the summary table, and no chatter of other packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from capa_probe.benchmark.claims import FAILS, HOLDS, UNKNOWN, shortened
from capa_probe.benchmark.experiments import EXPERIMENTS

if TYPE_CHECKING:
    from capa_probe.findings import Findings
    from capa_probe.tables import LayerProfile

_HEADINGS = {
    "layer": "layer",
    "visual_cosine": "visual\ncosine",
    "text_cosine": "text\ncosine",
    "redundant": "redundant\nFFN",
    "n_sinks": "sinks",
    "n_dump": "dumps",
    "n_anchor": "anchors",
    "n_undetermined": "undeter-\nmined",
    "attention_share": "attention\nto sinks",
    "contribution_share": "contrib.\nof sinks",
}
#: Verdicts, in the order in which they are counted, and the colours that they are shown in.
VERDICTS = {HOLDS: "green", FAILS: "red", UNKNOWN: ""}


def show(
    prof: LayerProfile, findings: Findings | None, files: list[Path], out: Path, reused: bool = False
) -> None:
    """Print the summary table, the findings in words, remarks, and where everything lies; ``reused``: no model ran."""
    console = Console(highlight=False, soft_wrap=True)
    if findings is None:
        console.print("Nothing to analyse: the profile has neither ffn_cosine nor all that sinks need.")
    else:
        console.print(summary_table(prof, findings))
        for sentence in findings.sentences():
            console.print(sentence, markup=False)
    if reused:
        console.print("The profile was there already, and no model ran; --overwrite runs it again.")
    console.print(
        f"\nProfile in {out}: tokens/, layers.parquet, samples.parquet, manifest.json", markup=False
    )
    for file in files:
        console.print(f"  {file}", markup=False)


def summary_table(prof: LayerProfile, findings: Findings) -> Table:
    """The summary as a rich table, one row per layer."""
    facts, summary = prof.manifest, findings.summary()
    n = facts["n_samples"]
    name = Path(facts["model"]).name if Path(facts["model"]).is_dir() else facts["model"]
    title = (
        f"{escape(name)}, {n:,} sample{'' if n == 1 else 's'}, tau = {findings.tau:g}, eta = {findings.eta:g}"
    )
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_edge=False,
        title_justify="left",
        title_style="bold",
    )
    # 80 characters have room for one of these two.
    hidden = "contribution_share" if summary.get("n_undetermined", pd.Series([0])).any() else "n_undetermined"
    shown = [column for column in map(str, summary) if column != hidden]
    for column in shown:
        table.add_column(
            _HEADINGS[column], justify="left" if column == "redundant" else "right", no_wrap=True
        )
    for record in summary.to_dict("records"):
        redundant = record.get("redundant", "no") != "no"
        table.add_row(
            *(_cell(column, record[column]) for column in shown), style="bold" if redundant else None
        )
    return table


def claims_lines(claims: pd.DataFrame, width: int | None = None) -> Iterator[Text]:
    """The paper's claims with their verdicts: how many hold, then each claim with a line for every place.

    Args:
        claims: as :func:`capa_probe.benchmark.claims.judge` returns them.
        width: characters in a line; a place whose line is longer has its numbers on a line of their own. None: no
            limit, as in a file.
    """
    counts = claims["verdict"].value_counts()
    yield Text(", ".join(f"{verdict} {counts.get(verdict, 0)}" for verdict in VERDICTS), style="bold")
    titles = {experiment.number: experiment.title for experiment in EXPERIMENTS}
    for number, own in claims.groupby("experiment", sort=False):
        yield Text()
        yield Text(f"Experiment {number}: {titles[int(str(number))]}", style="bold")
        before = None
        for claim, rows in own.groupby("claim", sort=False):
            measure, _ = shortened(rows["numbers"].iloc[0])
            yield Text(str(claim)).append(f" (difference in {measure})" if measure else "", style="dim")
            pads = [max(map(len, rows[column])) for column in ("where", "verdict")]
            for row in rows.to_dict("records"):
                measure, numbers = shortened(row["numbers"])
                if row["numbers"] == before and not measure:
                    numbers = "see above"  # several claims that cannot be judged, for one reason
                before = row["numbers"]
                line = Text(f"  {row['where']:<{pads[0]}}  ").append(
                    row["verdict"], style=VERDICTS[row["verdict"]]
                )
                column = 2 + pads[0] + 2 + pads[1] + 2
                fits = width is None or column + len(numbers) <= width
                gap = " " * (column - len(line)) if fits else "\n    "
                yield line.append(f"{gap}{numbers}", style="dim")


def depth_table(verdict: pd.DataFrame) -> Table:
    """What is lost without visual tokens, one row per task; a cost whose interval excludes 0 has a star."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    row = verdict.iloc[0]
    columns = {"gone_2": "gone\nfrom 2", "gone_third": f"gone\nfrom {row['third']}"}
    columns |= {"random_25": "25 %,\nrandom", "best_25": "25 %,\nscore"}
    shown = {name: heading for name, heading in columns.items() if verdict[name].notna().any()}
    table.add_column("task", overflow="fold")
    headings = ["n", "unpruned", "no\nimage", "last\nlayer", *(f"cost:\n{of}" for of in shown.values())]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for record in verdict.to_dict("records"):
        costs = [f"{record[of]:.3f}{'*' if record[f'{of}_low'] > 0 else ' '}" for of in shown]
        last = "none" if record["last_layer"] < 0 else str(record["last_layer"])
        values = (f"{record['whole']:.3f}", f"{record['blank']:.3f}")
        table.add_row(escape(record["task"] or "no task"), f"{record['n']:,}", *values, last, *costs)
    return table


def _cell(column: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if column.endswith("cosine"):
        return f"{value:.4f}"
    if column.endswith("share"):
        return "-" if value != value else f"{value:.1%}"  # NaN: not known
    return f"{int(value):,}"


@contextmanager
def status(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    with Console(stderr=True).status(escape(what)):
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Only errors from transformers, and no bar for weights that are already on disk; downloads keep theirs."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    set_downloads = disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_downloads()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        set_downloads()

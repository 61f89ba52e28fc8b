"""The tables of ``capa_speed.py``, from its results alone: medians of ratios, and their quartiles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from _machine import machine_line

#: Between these, a page shows the tables.
MARKS = ("<!-- results -->", "<!-- end of results -->")


def tables(results: dict[str, Any]) -> str:
    """All of them, in Markdown, machine by machine."""
    parts = []
    for ran_on, group in groupby(results["comparisons"], key=lambda each: each["machine"]):
        of_machine = {**results, "comparisons": list(group)}
        parts.append(machine_line(ran_on))
        parts += [table(of_machine) for table in (prefill_table, decode_table, scoring_table)]
    return "\n\n".join(parts)


def put(page: Path, shown: str) -> None:
    """Put the tables between a page's marks, in place of those that are there."""
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n\n{shown}\n\n{MARKS[1]}{after}", encoding="utf-8")


def prefill_table(results: dict[str, Any]) -> str:
    """Speed-up of the prefill, beside the one that FLOPs predict."""
    head = [
        "model",
        "visual tokens",
        "kept",
        "vanilla",
        "pruned",
        "rounds",
        "speed-up",
        "predicted",
        "share of it",
        "on the clock",
    ]
    rows = []
    for each, vanilla, row in pruned_rows(results):
        clock = clock_of(each)
        ratios = per_round(vanilla, row, "prefill", clock)
        quiet = quiet_ratios(vanilla, row, "prefill")
        rows.append(
            [
                label(each),
                f"{each['visual']:,}",
                f"{row['keep']:.0%}",
                f"{median_of(vanilla['prefill'], clock):.3g} s",
                f"{median_of(row['prefill'], clock):.3g} s",
                str(len(ratios)),
                spread(ratios),
                f"{row['predicted']:.2f}",
                f"{median(ratios) / row['predicted']:.0%}",
                f"{spread(quiet)}, {len(quiet)} rounds" if quiet else "none undisturbed",
            ]
        )
    return markdown(head, rows)


def decode_table(results: dict[str, Any]) -> str:
    """KV cache after prefill, and time per generated token."""
    head = [
        "model",
        "visual tokens",
        "kept",
        "KV cache",
        "pruned",
        "time per token",
        "pruned",
        "speed-up",
        "by bytes read",
    ]
    rows = []
    for each, vanilla, row in pruned_rows(results):
        clock = clock_of(each)
        ms = 1000 / each["steps"]
        rows.append(
            [
                label(each),
                f"{each['visual']:,}",
                f"{row['keep']:.0%}",
                f"{vanilla['cache_bytes'] / 2**20:.3g} MiB",
                f"{row['cache_bytes'] / 2**20:.3g} MiB",
                f"{ms * median_of(vanilla['decode'], clock):.3g} ms",
                f"{ms * median_of(row['decode'], clock):.3g} ms",
                spread(per_round(vanilla, row, "decode", clock)),
                f"{vanilla['decode_bytes'] / row['decode_bytes']:.2f}",
            ]
        )
    return markdown(head, rows)


def scoring_table(results: dict[str, Any]) -> str:
    """What one scoring costs, by score."""
    head = ["model", "visual tokens", "score", "time", "share of vanilla", "share by FLOPs"]
    rows = []
    for each in results["comparisons"]:
        vanilla, clock = each["rows"][0], clock_of(each)
        whole = median_of(vanilla["prefill"], clock)
        for score, found in each["scoring"].items():
            seconds = median_of(found["seconds"], clock)
            share = f"{seconds / whole:.2%}"
            by_flops = f"{found['flops'] / vanilla['flops']:.2%}"
            rows.append(
                [label(each), f"{each['visual']:,}", score, f"{1000 * seconds:.3g} ms", share, by_flops]
            )
    return markdown(head, rows)


def pruned_rows(results: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """(comparison, its vanilla row, pruned row) for every pruned row."""
    return [(each, each["rows"][0], row) for each in results["comparisons"] for row in each["rows"][1:]]


def clock_of(each: dict[str, Any]) -> str:
    """CPU time on a processor, which others on the machine hardly change; on a GPU the clock."""
    return "wall" if each["machine"]["gpu"] else "cpu"


def per_round(vanilla: dict[str, Any], row: dict[str, Any], what: str, clock: str) -> list[float]:
    """Speed-up in each round."""
    return [before[clock] / after[clock] for before, after in zip(vanilla[what], row[what], strict=True)]


def quiet_ratios(vanilla: dict[str, Any], row: dict[str, Any], what: str) -> list[float]:
    """Speed-up on the clock, in the rounds in which neither was disturbed."""
    disturbed = zip(vanilla["disturbed"], row["disturbed"], strict=True)
    ratios = per_round(vanilla, row, what, "wall")
    return [ratio for ratio, held_up in zip(ratios, disturbed, strict=True) if not any(held_up)]


def median_of(seconds: Sequence[dict[str, float]], clock: str) -> float:
    """Median over rounds."""
    return median(each[clock] for each in seconds)


def spread(ratios: Sequence[float]) -> str:
    """Median and quartiles."""
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}"
    first, middle, third = quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} ({first:.2f}-{third:.2f})"


def label(each: dict[str, Any]) -> str:
    """Model and layers."""
    return f"{each['model']}, {each['n_layers']} layers"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

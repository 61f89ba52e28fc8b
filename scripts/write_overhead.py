"""Writes what the overhead benchmarks measured into docs/overhead.md, between its two markers, and draws its figure.

    python scripts/write_overhead.py

The numbers come from benchmarks/results/probe_*.json alone. What stands outside the markers is left as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from _machine import machine_line  # noqa: E402
from _overhead_rounds import quartiles, ratios, spread  # noqa: E402
from _overhead_variants import TITLES  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from probe_throughput import ends  # noqa: E402

from capa_probe.figures.save import save  # noqa: E402
from capa_probe.figures.style import QUIET, TEXT, VISUAL, styled  # noqa: E402

START, END = "<!-- results: start -->", "<!-- results: end -->"
_IMAGE = "![Time over the plain forward and memory beyond it](images/overhead.png)"
#: Short names for the figure.
_SHORT = {
    "profile": "cp.profile",
    "profile_all": "with removal_effect",
    "eager": "HF eager",
    "transformerlens": "TransformerLens, all",
    "transformerlens_filtered": "TransformerLens, filtered",
    "nnsight": "nnsight",
}

Entries = list[dict[str, Any]]


def load(folder: Path) -> dict[str, Entries]:
    """Benchmark, without ``probe_``, to its entries."""
    return {
        file.stem.removeprefix("probe_"): json.loads(file.read_text(encoding="utf-8"))["entries"]
        for file in sorted(folder.glob("probe_*.json"))
    }


def results(found: dict[str, Entries]) -> str:
    """The figure and all tables in Markdown; empty without results."""
    tables = {
        "overhead": time_table,
        "memory": memory_table,
        "decode": decode_table,
        "7b": whole_table,
        "throughput": throughput_table,
    }
    parts = [table(found[name]) for name, table in tables.items() if found.get(name)]
    return "\n\n".join([_IMAGE, *parts]) if parts else ""


def time_table(entries: Entries) -> str:
    rows = []
    for entry in entries:
        at = entry["settings"]
        for name in entry["rounds"]:
            seconds = [each["wall"] / at["samples"] for each in entry["rounds"][name]]
            on_clock, on_cpu = (spread(ratios(entry, name, clock), 3) for clock in ("wall", "cpu"))
            n = str(len(seconds))
            rows.append([f"{at['tokens']:,}", TITLES[name], f"{median(seconds):.3f} s", on_clock, on_cpu, n])
    head = ["tokens", "what ran", "time of a prompt", "over plain, on the clock", "of CPU time", "rounds"]
    return _section("### Time", entries, head, rows)


def memory_table(entries: Entries) -> str:
    lengths = sorted({entry["settings"]["tokens"] for entry in entries})
    names = [name for name in TITLES if any(entry["settings"]["variant"] == name for entry in entries)]
    rows = []
    for name in names:
        cells = []
        for tokens in lengths:
            extra = _extra(entries, name, tokens)
            cells.append(extra if isinstance(extra, str) else f"{extra / 1e6:,.1f} MB")
        rows.append([TITLES[name], *cells])
    head = ["beyond the plain forward", *(f"{tokens:,} tokens" for tokens in lengths)]
    return _section("### Memory", entries, head, rows)


def decode_table(entries: Entries) -> str:
    titles = {"plain": "plain `generate`", "profile": TITLES["profile"], "profile_all": TITLES["profile_all"]}
    rows = []
    for entry in entries:
        at = entry["settings"]
        for name, rounds in entry["rounds"].items():
            on_clock, on_cpu = (spread(ratios(entry, name, clock), 3) for clock in ("wall", "cpu"))
            seconds = f"{median(each['wall'] for each in rounds):.3f} s"
            rows.append(
                [
                    f"{at['tokens']:,}",
                    str(at["steps"]),
                    titles[name],
                    seconds,
                    on_clock,
                    on_cpu,
                    str(len(rounds)),
                ]
            )
    head = ["tokens", "steps", "what ran", "time", "over plain, on the clock", "of CPU time", "rounds"]
    return _section("### Decode steps", entries, head, rows)


def whole_table(entries: Entries) -> str:
    rows = []
    for entry in entries:
        at = entry["settings"]
        for name, rounds in entry["rounds"].items():
            highest = max(each["peak"] for each in rounds) / 2**30
            rows.append(
                [
                    f"{at['model']}, {at['layers']} layers, {at['tokens']} tokens, batch {at['batch']}",
                    TITLES[name],
                    f"{spread([each['wall'] for each in rounds])} s",
                    spread(ratios(entry, name, "wall"), 3),
                    f"{highest:.1f} GiB",
                    str(len(rounds)),
                ]
            )
    head = ["model", "what ran", "time", "over plain", "memory of the process at most", "rounds"]
    return _section("### A whole 7B model", entries, head, rows)


def throughput_table(entries: Entries) -> str:
    rows = []
    for entry in entries:
        for found in entry["rounds"]["profile"]:
            (first, last), (before, after) = ends(found["cpu"]), ends(found["resident"])
            rows.append(
                [
                    str(len(found["cpu"])),
                    f"{1000 * first:.1f} ms",
                    f"{1000 * last:.1f} ms",
                    f"{last / first:.3f}",
                    f"{before / 1e6:.1f} MB",
                    f"{after / 1e6:.1f} MB",
                ]
            )
    head = [
        "samples",
        "CPU time of one, first quarter",
        "last quarter",
        "last over first",
        "memory, first quarter",
        "last quarter",
    ]
    return _section("### A long run", entries, head, rows)


def _section(heading: str, entries: Entries, head: list[str], rows: list[list[str]]) -> str:
    machines = list(dict.fromkeys(machine_line(entry["settings"]["machine"]) for entry in entries))
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([heading, " ".join(machines), table])


def _extra(entries: Entries, name: str, tokens: int) -> float | str:
    """Median bytes beyond the plain forward, or why there are none."""
    for entry in entries:
        if (entry["settings"]["variant"], entry["settings"]["tokens"]) == (name, tokens):
            rounds = entry["rounds"][name]
            failed = next((each["failed"] for each in rounds if each["failed"]), None)
            return failed or float(median(each["extra"] for each in rounds))
    return "not measured"


@styled
def figure(found: dict[str, Entries]) -> Figure:
    """Time over the plain forward, and memory beyond it by length of the prompt."""
    drawn = Figure(figsize=(9.2, 3.9), layout="constrained")
    left, right = drawn.subplots(1, 2)
    entries = found.get("overhead", [])
    names = [name for name in _SHORT if any(name in entry["rounds"] for entry in entries)]
    for number, tokens in enumerate(sorted({entry["settings"]["tokens"] for entry in entries})):
        colour, label = (VISUAL, TEXT, QUIET)[number % 3], f"{tokens:,} tokens"
        for entry in (entry for entry in entries if entry["settings"]["tokens"] == tokens):
            for name in (name for name in names if name in entry["rounds"]):
                first, middle, third = quartiles(ratios(entry, name, "wall"))
                at = names.index(name) + 0.22 * number
                left.plot([first, third], [at, at], color=colour, linewidth=1.5)
                left.plot(middle, at, "o", color=colour, markersize=4.5, label=label)
                label = None
    left.axvline(1, color=QUIET, linewidth=0.8)
    left.axvline(1.1, color=QUIET, linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(names)), [_SHORT[name] for name in names])
    left.invert_yaxis()
    left.set_xlabel("time over the plain forward (median, quartiles)")
    if names:
        left.legend(loc="lower right")
    memory = found.get("memory", [])
    lengths = sorted({entry["settings"]["tokens"] for entry in memory})
    for number, name in enumerate(_SHORT):
        points = [(tokens, _extra(memory, name, tokens)) for tokens in lengths]
        known = [(tokens, max(extra, 1e5) / 1e6) for tokens, extra in points if not isinstance(extra, str)]
        if known:
            own = name.startswith("profile")
            right.plot(
                *zip(*known, strict=True),
                marker="os^vDx"[number],
                markersize=4.5,
                color=VISUAL if own else TEXT if name == "eager" else QUIET,
                linestyle="-" if name in ("profile", "eager", "transformerlens") else "--",
                label=_SHORT[name],
            )
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
    right.set_xlabel("tokens")
    right.set_ylabel("memory beyond the plain forward (MB)")
    if lengths:
        right.legend(loc="center right", fontsize="small")
    return drawn


def put(page: Path, shown: str) -> None:
    """Put the tables between a page's markers."""
    before, rest = page.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    page.write_text(f"{before}{START}\n\n{shown}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "overhead.md")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "images" / "overhead.png")
    arguments = parser.parse_args()
    found = load(arguments.results)
    put(arguments.page, results(found))
    save(figure(found), arguments.figure)


if __name__ == "__main__":
    main()

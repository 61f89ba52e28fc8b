"""All figures of the set, in their order."""

from __future__ import annotations

from collections.abc import Sequence

from capa_probe.errors import CapaProbeError
from capa_probe.figures.entry import Entry, Kind
from capa_probe.figures.of_benchmark import BENCHMARK_ENTRIES
from capa_probe.figures.of_profile import PROFILE_ENTRIES

#: By number.
ENTRIES: tuple[Entry, ...] = tuple(
    sorted((*PROFILE_ENTRIES, *BENCHMARK_ENTRIES), key=lambda entry: entry.number)
)
#: How a run of each kind is made.
COMMANDS: dict[Kind, str] = {
    "profile": "capa-probe profile MODEL DATA --out RUN",
    "confirm": "capa-probe confirm MODEL DATA --out RUN",
    "depth": "capa-probe depth MODEL DATA --out RUN",
    "training": "python scripts/train_demo_lvlm.py --family FAMILY --out RUN",
}


def entries_named(names: str) -> tuple[Entry, ...]:
    """Figures by their names, with commas between; all for "".

    Raises:
        CapaProbeError: there is no figure of a name.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in {entry.name for entry in ENTRIES}:
            known = ", ".join(entry.name for entry in ENTRIES)
            raise CapaProbeError(f"--only {name} was given; give some of {known}.")
    return tuple(entry for entry in ENTRIES if not wanted or entry.name in wanted)


def markdown(entries: Sequence[Entry] = ENTRIES) -> str:
    """A table in Markdown: figure, the paper's claim, how it is drawn, the tables used and the run that has them."""
    rows = [["", "figure", "claim", "command", "tables", "from"], ["---"] * 6]
    for entry in entries:
        runs = " ".join("RUN" if entry.fewest == 1 else f"RUN{number + 1}" for number in range(entry.fewest))
        rows.append(
            [
                str(entry.number),
                f"`{entry.name}`",
                entry.claim,
                f"`capa-probe figures {runs} --only {entry.name}`",
                ", ".join(f"`{table}`" for table in entry.tables),
                f"`{COMMANDS[entry.kind]}`",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

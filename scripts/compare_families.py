"""Make every run of every demo model, put them side by side, and write the tables into pages.

    python scripts/compare_families.py

profiles each demo model on its own test questions, measures its depth, tests the paper's claims on it, and compares
(`capa-probe demo`, `depth`, `confirm`, `compare`). The table goes into docs/families.md and a short one into the
README, between the two markers of each; what stands outside them is left as it is. All numbers, with their intervals,
go into docs/data/comparison.csv. Runs that are there are used, and one that was stopped goes on: half an hour a model.
Models can run at the same time, each by a command of its own, and be compared afterwards:

    python scripts/compare_families.py --families internvl --runs-only
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from marked import Marked

from capa_probe.cli import app
from capa_probe.cli.compare import NAME
from capa_probe.cli.one_line import one_line_errors
from capa_probe.demo import DEMO_MODELS, demo_data_path, demo_model_path
from capa_probe.files import replace

ROOT = Path(__file__).resolve().parents[1]
TABLE = Marked("comparison")


def commands(families: Sequence[str], out: Path, limit: int) -> Iterator[list[str]]:
    """The runs that it takes, as arguments of ``capa-probe``."""
    for family in families:
        model, data = demo_model_path(family), demo_data_path("test", DEMO_MODELS[family].world)
        for what, more in (("depth", ["--score", "all"]), ("confirm", [])):
            folder = str(out / f"{family}-{what}")
            yield [what, str(model), str(data), "--out", folder, "--limit", str(limit), *more]
        yield ["demo", "--model", family, "--out", str(out / f"{family}-demo")]


def _do(command: list[str]) -> None:
    """A command of ``capa-probe``; ends where it fails."""
    if status := app(command, standalone_mode=False):
        raise SystemExit(status)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=tuple(DEMO_MODELS), default=list(DEMO_MODELS))
    parser.add_argument("--out", type=Path, default=Path("runs/families"), help="folder for the runs")
    parser.add_argument("--limit", type=int, default=210, help="questions for depth and confirm")
    parser.add_argument("--runs-only", action="store_true", help="make the runs, and compare nothing")
    parser.add_argument(
        "--page", type=Path, default=ROOT / "docs" / "families.md", help="where the table goes"
    )
    parser.add_argument(
        "--short-page", type=Path, default=ROOT / "README.md", help="where the short one goes"
    )
    parser.add_argument(
        "--csv", type=Path, default=ROOT / "docs" / "data" / f"{NAME}.csv", help="where all numbers go"
    )
    arguments = parser.parse_args(argv)
    with one_line_errors():
        if not arguments.runs_only:  # before half an hour a model
            for page in (arguments.page, arguments.short_page):
                TABLE.written(page.read_text(encoding="utf-8"), "")
        runs = list(commands(arguments.families, arguments.out, arguments.limit))
        for run in runs:
            _do(run)
        if arguments.runs_only:
            return
        folders = [run[run.index("--out") + 1] for run in runs]
        made = arguments.out / NAME
        _do(["compare", *folders, "--out", str(made)])
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        numbers = (made / f"{NAME}.csv").read_bytes()
        replace(arguments.csv, lambda file: file.write_bytes(numbers))
        for page, name, what, target in (
            (arguments.page, NAME, "All numbers, with their intervals", arguments.csv),
            (arguments.short_page, f"{NAME}-short", "Every number, with what it rests on", arguments.page),
        ):
            link = Path(os.path.relpath(target, page.parent)).as_posix()
            table = (made / f"{name}.md").read_text(encoding="utf-8")
            TABLE.put(page, f"{table}\n[{what}]({link}).\n")


if __name__ == "__main__":
    main()

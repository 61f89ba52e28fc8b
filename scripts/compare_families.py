"""Make every run of every demo model, put them side by side, and write the table into a page.

    python scripts/compare_families.py

profiles each demo model on its own test questions, measures its depth, tests the paper's claims on it, and compares
(`capa-probe demo`, `depth`, `confirm`, `compare`). The table goes into the README, between its two markers; what stands
outside them is left as it is. Runs that are there are used, and one that was stopped goes on: half an hour a model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from capa_probe.cli import app
from capa_probe.comparison import compare, page, read_runs
from capa_probe.demo import DEMO_MODELS, demo_data_path, demo_model_path

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- comparison: start -->", "<!-- comparison: end -->"


def commands(families: Sequence[str], out: Path, limit: int) -> Iterator[list[str]]:
    """The runs that it takes, as arguments of ``capa-probe``."""
    for family in families:
        model, data = demo_model_path(family), demo_data_path("test", DEMO_MODELS[family].world)
        for what, more in (("depth", ["--score", "all"]), ("confirm", [])):
            folder = str(out / f"{family}-{what}")
            yield [what, str(model), str(data), "--out", folder, "--limit", str(limit), *more]
        yield ["demo", "--model", family, "--out", str(out / f"{family}-demo")]


def written(text: str, table: str) -> str:
    """A page with the table between its markers."""
    if START not in text or END not in text:
        raise SystemExit(f"The page has no lines {START} and {END}; put them where the table belongs.")
    return f"{text.split(START, maxsplit=1)[0]}{START}\n\n{table}\n{END}{text.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=tuple(DEMO_MODELS), default=list(DEMO_MODELS))
    parser.add_argument("--out", type=Path, default=Path("runs/families"), help="folder for the runs")
    parser.add_argument("--limit", type=int, default=210, help="questions for depth and confirm")
    parser.add_argument("--page", type=Path, default=README, help="where the table goes")
    arguments = parser.parse_args(argv)
    folders = []
    for command in commands(arguments.families, arguments.out, arguments.limit):
        app(command, standalone_mode=False)
        folders.append(command[command.index("--out") + 1])
    text = arguments.page.read_text(encoding="utf-8")
    arguments.page.write_text(written(text, page(compare(read_runs(folders)))), encoding="utf-8")


if __name__ == "__main__":
    main()

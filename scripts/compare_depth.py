"""Draw the depth of several models side by side.

    python scripts/compare_depth.py "first=docs/data/depth-first" "second=runs/depth"

Each argument is a name and the folder of a run of ``capa-probe depth``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from capa_probe.benchmark.store import read_tables
from capa_probe.figures import save
from capa_probe.figures.depth_compared import depth_compared


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--layer", type=int, default=2, help="from which on tokens stay or go")
    parser.add_argument("--out", type=Path, default=Path("docs/images/depth-compared.png"))
    arguments = parser.parse_args(argv)
    for run in arguments.runs:
        if "=" not in run:
            parser.error(f"{run!r} was given; give a name and the folder of a run, as in NAME=RUN.")
    runs = dict(run.split("=", 1) for run in arguments.runs)
    figure = depth_compared(
        {name: read_tables(Path(folder)) for name, folder in runs.items()}, arguments.layer
    )
    save(figure, arguments.out)


if __name__ == "__main__":
    main()

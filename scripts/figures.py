"""Draw the set of figures in figures/ anew, and keep the small tables that it is drawn from.

    python scripts/figures.py                        # from the tables in figures/data, without a model: a minute
    python scripts/figures.py --runs runs/families   # take the tables of the demo models' runs first
    python scripts/figures.py runs/demo runs/confirm runs/depth data/demo-lvlm   # or those of the runs named
    python scripts/figures.py runs/mine --only overlays   # take and draw some figures
    python scripts/figures.py --check                # say what is not up to date, and change nothing

``--runs`` looks for what ``scripts/compare_families.py`` makes (FAMILY-demo, FAMILY-confirm and FAMILY-depth, of every
demo model that is there), and for the logs of the trainings in the models' folders. Tables of models and figures that
no run is given of stay as they are. The table in docs/figures.md is written anew, between its two markers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from marked import Marked

from capa_probe.cli.one_line import one_line_errors
from capa_probe.demo import DEMO_MODELS, demo_model_path
from capa_probe.errors import CapaProbeError
from capa_probe.figure_set import collect, keep_tables, kept_tables, stale, strays, write_set
from capa_probe.figure_set.collect import TRAINING_FILE
from capa_probe.figures.registry import entries_named, markdown

ROOT = Path(__file__).resolve().parents[1]
FIGURES, PAGE = ROOT / "figures", ROOT / "docs" / "figures.md"
TABLE = Marked("table")
#: Of the models in figures that show several.
ORDER = tuple(model.folder for model in DEMO_MODELS.values())


def runs_of_families(folder: Path) -> Iterator[Path]:
    """The runs of demo models in a folder, and the models whose training is on record.

    Raises:
        CapaProbeError: there is no such run.
    """
    places = {
        family: [folder / f"{family}-{kind}" for kind in ("demo", "confirm", "depth")]
        for family in DEMO_MODELS
    }
    if not any(run.is_dir() for runs in places.values() for run in runs):
        raise CapaProbeError(
            f"{folder} holds no run of a demo model; make them with python scripts/compare_families.py."
        )
    for family, runs in places.items():
        yield from (run for run in runs if run.is_dir())
        try:
            model = demo_model_path(family)
        except CapaProbeError:  # not trained yet
            continue
        if (model / TRAINING_FILE).is_file():
            yield model


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs_given", nargs="*", type=Path, metavar="RUN", help="runs to take tables of")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="folder with the runs of all demo models")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder of the set")
    parser.add_argument("--only", default="", metavar="NAMES", help="only these figures, with commas between")
    parser.add_argument("--check", action="store_true", help="only say what is not up to date")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        if arguments.check:
            found = list(stale(arguments.out, ORDER))
            print("\n".join(found) or "up to date")
            raise SystemExit(1 if found else 0)
        entries = entries_named(arguments.only)
        runs = [*arguments.runs_given, *(runs_of_families(arguments.runs) if arguments.runs else ())]
        if runs:
            collected = collect(runs, entries)
            for sentence in collected.left_out:
                print(sentence)
            keep_tables(collected.models, arguments.out)
        kept = kept_tables(arguments.out, ORDER)
        for file in write_set(kept, arguments.out, entries, folders=True, small=True):
            print(file)
        for file in strays(arguments.out, ORDER):
            print(f"{file} belongs to no figure of the set; remove it if nobody needs it.")
        if arguments.out.resolve() == FIGURES:
            TABLE.put(PAGE, f"{markdown()}\n")


if __name__ == "__main__":
    main()

"""The tables that a set of figures keeps beside it, and whether the two agree.

data/MODEL/FIGURE.TABLE.parquet   what a figure shows of a model
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from capa_probe.errors import CapaProbeError
from capa_probe.figure_set.writing import Drawing, drawings
from capa_probe.figures.entry import Entry, Tables
from capa_probe.figures.registry import ENTRIES
from capa_probe.figures.save import saved_data
from capa_probe.files import replace

DATA = "data"
_SUFFIXES = (".png", ".svg")


def keep_tables(models: Mapping[str, Mapping[str, Tables]], folder: Path) -> list[Path]:
    """Write the tables of models into a set's folder, in place of earlier ones of the same models and figures.

    Returns:
        The files written.
    """
    written = []
    for model, figures in models.items():
        own = folder / DATA / model
        own.mkdir(parents=True, exist_ok=True)
        for figure, tables in figures.items():
            new = []
            for name, table in tables.items():
                write = partial(table.to_parquet, index=False, compression="zstd")
                new.append(replace(own / f"{figure}.{name}.parquet", write))
            for file in set(own.glob(f"{figure}.*.parquet")).difference(new):
                file.unlink()
            written += new
    return written


def kept_tables(folder: Path, order: Sequence[str] = ()) -> dict[str, dict[str, dict[str, pd.DataFrame]]]:
    """Read them back.

    Args:
        folder: of the set.
        order: of the models; those that are not named come last, by name.

    Returns:
        Model -> name of a figure -> its tables by name.

    Raises:
        CapaProbeError: there are none, or one cannot be read.
    """
    names = sorted(path.name for path in (folder / DATA).glob("*") if path.is_dir())
    names = [*(name for name in order if name in names), *(name for name in names if name not in order)]
    found: dict[str, dict[str, dict[str, pd.DataFrame]]] = {}
    for model in names:
        for file in sorted((folder / DATA / model).glob("*.parquet")):
            figure, _, table = file.name.removesuffix(".parquet").partition(".")
            try:
                read = pd.read_parquet(file)
            except (OSError, ValueError) as error:
                raise CapaProbeError(
                    f"{file} cannot be read ({str(error).splitlines()[0]}); make it again."
                ) from None
            found.setdefault(model, {}).setdefault(figure, {})[table] = read
    if not found:
        raise CapaProbeError(f"{folder / DATA} holds no tables of figures; make them from runs first.")
    return found


def stale(folder: Path, order: Sequence[str] = (), entries: Sequence[Entry] = ENTRIES) -> Iterator[str]:
    """What is not up to date in a set of figures: a sentence for each file that its tables do not stand behind.

    Args:
        folder: of the set, with its tables.
        order: of the models.
        entries: which figures it should have.
    """
    for drawing in drawings(kept_tables(folder, order), entries, folders=True):
        for file in _files(folder, drawing):
            if not file.is_file():
                yield f"{file} is missing."
            elif saved_data(file) != drawing.data:
                yield f"{file} was not drawn from the tables that lie in {folder / DATA}."
    for file in strays(folder, order, entries):
        yield f"{file} belongs to no figure of the set."


def strays(folder: Path, order: Sequence[str] = (), entries: Sequence[Entry] = ENTRIES) -> list[Path]:
    """Pictures and tables in a set's folder that belong to no figure of it."""
    models = kept_tables(folder, order)
    expected = {
        file for drawing in drawings(models, entries, folders=True) for file in _files(folder, drawing)
    }
    pictures = [file for file in sorted(folder.rglob("*")) if file.suffix in _SUFFIXES]
    known = {entry.data for entry in entries}
    tables = sorted((folder / DATA).glob("*/*.parquet"))
    return [
        *(file for file in pictures if file not in expected),
        *(file for file in tables if file.name.partition(".")[0] not in known),
    ]


def _files(folder: Path, drawing: Drawing) -> list[Path]:
    suffixes = _SUFFIXES[:1] if drawing.entry.pixels else _SUFFIXES
    return [folder / f"{drawing.file}{suffix}" for suffix in suffixes]

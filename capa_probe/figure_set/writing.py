"""Draws the figures of a set into a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from capa_probe.errors import CapaProbeError
from capa_probe.figure_set.hashing import tables_hash
from capa_probe.figures.entry import Entry, ModelTables, Tables
from capa_probe.figures.registry import ENTRIES
from capa_probe.figures.save import DPI, save

#: Of figures made of pictures, in a set that is kept.
PIXELS_DPI = 90


@dataclass(frozen=True)
class Drawing:
    """One figure that can be drawn.

    Attributes:
        entry: which.
        file: its path below the folder, without a suffix.
        models: whose it is: name -> tables.
    """

    entry: Entry
    file: str
    models: ModelTables

    @property
    def data(self) -> str:
        """Hash of its tables."""
        return tables_hash(self.models)


def drawings(
    models: Mapping[str, Mapping[str, Tables]], entries: Sequence[Entry] = ENTRIES, folders: bool = False
) -> Iterator[Drawing]:
    """The figures that tables allow, in the order of the registry.

    Args:
        models: model -> name of a figure -> its tables (see :func:`capa_probe.figure_set.collect`).
        entries: which figures.
        folders: put a figure of one model into a folder of its name even where there is only one model.
    """
    for entry in entries:
        own = {name: figures[entry.data] for name, figures in models.items() if entry.data in figures}
        if len(own) < max(entry.fewest, 1):
            continue
        if entry.together:
            yield Drawing(entry, entry.name, own)
        else:
            for name, tables in own.items():
                inside = folders or len(models) > 1
                yield Drawing(entry, f"{name}/{entry.name}" if inside else entry.name, {name: tables})


def write_set(
    models: Mapping[str, Mapping[str, Tables]],
    out: Path,
    entries: Sequence[Entry] = ENTRIES,
    folders: bool = False,
    pdf: bool = False,
    small: bool = False,
    left_out: list[str] | None = None,
) -> Iterator[Path]:
    """Draw figures as PNG and SVG, with the hash of their tables in the metadata, one after the other.

    Args:
        models: as for :func:`drawings`.
        out: folder, made if missing.
        entries: which figures.
        folders: as for :func:`drawings`.
        pdf: also write PDF files.
        small: PNG files of 256 colours, and what is made of pictures as a smaller PNG alone.
        left_out: takes a sentence for each figure that cannot be drawn; None raises instead.

    Raises:
        CapaProbeError: a figure cannot be drawn, as of runs that cannot be shown side by side.
        OSError: the folder cannot be written to.
    """
    for drawing in drawings(models, entries, folders):
        try:
            figure = drawing.entry.draw(drawing.models)
        except CapaProbeError as error:
            if left_out is None:
                raise
            left_out.append(f"{drawing.file} is left out: {error}")
            continue
        file, pixels = out / drawing.file, small and drawing.entry.pixels
        dpi = PIXELS_DPI if pixels else DPI
        yield from save(figure, file, pdf=pdf, svg=not pixels, data=drawing.data, small=small, dpi=dpi)

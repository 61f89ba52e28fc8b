"""The folder of a benchmark run: its finished parts, its tables and its manifest.

``benchmark.json`` says what the run was begun with and stays; ``parts/`` holds what has been evaluated so far, one file
for each unit of work, so that a stopped run goes on after its last finished part; ``tables/`` holds the results, and
``manifest.json`` comes last. The same call on a finished run reuses its parts, and adds what is asked for beyond them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from capa_probe.errors import CapaProbeError
from capa_probe.files import replace, write_json
from capa_probe.run_folder import check_folder, locked, refuse_other
from capa_probe.schema import FORMAT_VERSION, MANIFEST_FILE
from capa_probe.tables import BENCHMARK_FILE, check_format

#: What a run was begun with.
FACTS_FILE = BENCHMARK_FILE
PARTS_FOLDER, TABLES_FOLDER = "parts", "tables"
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]{0,199}")


class Store:
    """Where a benchmark run keeps what it has done; :meth:`open` makes one.

    Args:
        folder: the run's folder; None keeps everything in memory.
        facts: what the results depend on, as JSON values: model, versions, data and settings.

    Attributes:
        folder: the same.
        facts: the same.
        reused: parts that were there already and have been asked for.
        made: parts that were made.
    """

    def __init__(self, folder: Path | None, facts: Mapping[str, Any]) -> None:
        self.folder, self.facts = folder, dict(facts)
        self.reused = self.made = 0
        self._parts: dict[tuple[str, str], pd.DataFrame] = {}
        self._tensors: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._tables: dict[str, pd.DataFrame] = {}

    @classmethod
    @contextmanager
    def open(
        cls, out: str | os.PathLike[str] | None, facts: Mapping[str, Any], overwrite: bool = False
    ) -> Iterator[Store]:
        """Begin a run in a folder, or go on with the one that lies there, for a ``with`` block.

        Args:
            out: the folder; None keeps everything in memory.
            facts: what the results depend on, as JSON values.
            overwrite: remove a benchmark run that lies there, whatever it was made with.

        Raises:
            OtherRunError: the folder holds a run with other facts; the message names the first field that differs.
            CapaProbeError: it is a file, holds something else, or another process is writing to it.
        """
        if out is None:
            yield cls(None, facts)
            return
        folder = Path(out)
        check_output(folder)  # before it is made
        with locked(folder):
            begun = read_facts(folder)
            if overwrite or begun is None:
                _remove(folder)
                write_json(folder / FACTS_FILE, {"format_version": FORMAT_VERSION, "begun_with": facts})
            else:
                refuse_other(folder, begun, facts)
            for name in (PARTS_FOLDER, TABLES_FOLDER):
                (folder / name).mkdir(exist_ok=True)
            yield cls(folder, facts)

    def part(self, table: str, key: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A finished part of a table, or one that is made now and kept.

        Args:
            table: what it is part of; letters, digits and underscores.
            key: names it within the table; letters, digits and any of ``_.,=+-``, at most 200.
            make: makes its rows.

        Raises:
            CapaProbeError: a name that cannot be a file's, or a part that cannot be read.
        """
        if self.folder is None:
            if (table, key) not in self._parts:
                self._parts[table, key] = make()
                self.made += 1
            return self._parts[table, key].copy()
        file = self._file(table, key, ".parquet")
        if file.exists():
            self.reused += 1
            return _read(file)
        frame = make()
        replace(file, lambda temporary: frame.to_parquet(temporary, index=False))
        self.made += 1
        return frame

    def tensors(
        self, table: str, key: str, make: Callable[[], Mapping[str, Tensor]], names: tuple[str, ...] = ()
    ) -> dict[str, Tensor]:
        """The same for tensors, which are kept on the CPU as safetensors.

        Args:
            table: as for :meth:`part`.
            key: as for :meth:`part`.
            make: makes them, by name.
            names: read only these; all if empty.
        """
        if self.folder is None:
            if (table, key) not in self._tensors:
                self._tensors[table, key] = _on_cpu(make())
                self.made += 1
            found = self._tensors[table, key]
            return {name: found[name] for name in names or found}
        file = self._file(table, key, ".safetensors")
        if not file.exists():
            made = _on_cpu(make())
            replace(file, lambda temporary: save_file(made, temporary))
            self.made += 1
            found = made
        else:
            self.reused += 1
            try:
                found = load_file(file)
            except (OSError, SafetensorError) as error:
                raise CapaProbeError(
                    f"{file} cannot be read ({error}); remove it, and the same call makes it anew."
                ) from None
        return {name: found[name] for name in names or found}

    def write(self, name: str, frame: pd.DataFrame) -> Path | None:
        """Write a whole table of results, ``tables/<name>.parquet``, in place of an earlier one of that name.

        Returns:
            The file; None in memory.
        """
        _check_name(name)
        self._tables[name] = frame
        if self.folder is None:
            return None
        file = self.folder / TABLES_FOLDER / f"{name}.parquet"
        return replace(file, lambda temporary: frame.to_parquet(temporary, index=False))

    def finish(self, **more: Any) -> dict[str, Any]:
        """Write the manifest: what the run was made with, its tables with their numbers of rows, and ``more``."""
        manifest = {
            "format_version": FORMAT_VERSION,
            **self.facts,
            **more,
            "tables": {name: len(frame) for name, frame in self.tables().items()},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if self.folder is not None:
            write_json(self.folder / MANIFEST_FILE, manifest)
        return manifest

    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables of results, by name."""
        return dict(self._tables) if self.folder is None else read_tables(self.folder)

    def _file(self, table: str, key: str, suffix: str) -> Path:
        assert self.folder is not None
        _check_name(table)
        if not _KEY.fullmatch(key):
            raise CapaProbeError(
                f"{key!r} was given as the key of a part; give letters, digits and _.,=+- only, at most 200."
            )
        folder = self.folder / PARTS_FOLDER / table
        folder.mkdir(exist_ok=True)
        return folder / f"{key}{suffix}"


def check_output(path: str | os.PathLike[str]) -> None:
    """Refuse a path at which no benchmark run can be begun or gone on with.

    Raises:
        CapaProbeError: it is a file, a folder with other things in it, or in use by another process.
    """
    check_folder(path, "benchmark run", FACTS_FILE, lambda folder: (folder / FACTS_FILE).is_file())


def read_facts(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What the run in a folder was begun with; None where there is none.

    Raises:
        CapaProbeError: the file that says it is damaged, or a newer version wrote it.
    """
    file = Path(path) / FACTS_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version, begun = int(content["format_version"]), dict(content["begun_with"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CapaProbeError(f"{file} is damaged; start anew with --overwrite (overwrite=True).") from None
    check_format(Path(path), version)
    return begun


def read_tables(path: str | os.PathLike[str]) -> dict[str, pd.DataFrame]:
    """The tables of results in a run's folder, by name.

    Raises:
        CapaProbeError: the folder holds no benchmark run, or a table cannot be read.
    """
    if read_facts(path) is None:
        raise CapaProbeError(f"{path} holds no benchmark run; give the folder that one was written to.")
    return {file.stem: _read(file) for file in sorted((Path(path) / TABLES_FOLDER).glob("*.parquet"))}


def _read(file: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(file)
    except (OSError, ValueError) as error:  # what pyarrow raises derives from these
        reason = str(error).splitlines()[0]
        raise CapaProbeError(
            f"{file} cannot be read ({reason}); remove it, and the same call makes it anew."
        ) from None


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise CapaProbeError(
            f"{name!r} was given as the name of a table; give small letters, digits and underscores."
        )


def _remove(folder: Path) -> None:
    """Remove our own files of an earlier run, the one that tells it is ours last."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    for pattern in (
        f"{TABLES_FOLDER}/*.parquet*",
        f"{PARTS_FOLDER}/*/*.parquet*",
        f"{PARTS_FOLDER}/*/*.safetensors*",
    ):
        for file in folder.glob(pattern):
            file.unlink()
    for inner in (*folder.glob(f"{PARTS_FOLDER}/*"), folder / PARTS_FOLDER, folder / TABLES_FOLDER):
        if inner.is_dir() and not any(inner.iterdir()):
            inner.rmdir()
    (folder / FACTS_FILE).unlink(missing_ok=True)

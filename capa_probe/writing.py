"""Writes a profile while a model runs: parts, then the layers table, then the manifest.

Every file is written under a temporary name and renamed; ``manifest.json`` comes last, so a folder that has it is
complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from capa_probe.errors import CapaProbeError
from capa_probe.tables import (
    FORMAT_VERSION,
    LAYER_SCHEMA,
    LAYERS_FILE,
    MANIFEST_FILE,
    ROWS,
    TOKEN_SCHEMA,
    TOKENS_FOLDER,
    UNFINISHED_FILE,
    LayerProfile,
    is_finished,
    is_unfinished,
    read_table,
    summarise_layers,
)

#: Batches are gathered into parts of about this many rows (some 20 MB in memory).
ROWS_PER_PART = 2**17
_LAYERS_FOLDER = "layers"


class ProfileWriter:
    """Takes the token rows of one batch after another and writes a profile while it runs.

    Args:
        out: the folder to write to; None keeps the tables in memory.
        rows_per_part: batches are gathered until a part has at least so many rows.

    Raises:
        CapaProbeError: ``out`` cannot be written to (see :func:`check_output`).
    """

    def __init__(self, out: Path | None = None, rows_per_part: int = ROWS_PER_PART) -> None:
        self._out, self._rows_per_part = out, rows_per_part
        self._waiting: list[pa.Table] = []
        self._summaries: list[pa.Table] = []
        self._n_waiting = self._n_rows = self._n_layer_rows = self._n_flushes = 0
        self._parts: list[Path | pa.Table] = []
        self._layer_parts: list[Path | pa.Table] = []
        self._rows: str | None = None
        self._seen: set[str] = set()
        if out is not None:
            check_output(out)
            remove_profile(out)  # what an interrupted run left
            (out / TOKENS_FOLDER).mkdir(parents=True)
            (out / _LAYERS_FOLDER).mkdir()
            _write_json(out / UNFINISHED_FILE, {"format_version": FORMAT_VERSION})

    def add(self, tokens: pd.DataFrame, rows: str = "all") -> None:
        """Take the rows of one batch: every token of every sample in it.

        Args:
            tokens: columns as in ``TOKEN_SCHEMA``.
            rows: which of the rows to keep, "all", "visual" or "none"; the same for every batch.

        Raises:
            CapaProbeError: columns are missing, a sample was added before, or ``rows`` is none of the three.
        """
        if rows not in ROWS or rows != (self._rows or rows):
            before = f" after rows={self._rows!r}" if self._rows else ""
            raise CapaProbeError(
                f'rows={rows!r} was given{before}; give "all", "visual" or "none", the same for every batch.'
            )
        missing = [name for name in TOKEN_SCHEMA.names if name not in tokens.columns]
        if missing:
            raise CapaProbeError(
                f"The token rows lack the columns {', '.join(missing)}; give all of TOKEN_SCHEMA."
            )
        samples = {str(sample) for sample in tokens["sample"].unique()}
        if samples & self._seen:
            raise CapaProbeError(
                f"Rows of sample {min(samples & self._seen)!r} were added twice; add each sample once, as a whole."
            )
        self._seen |= samples
        self._rows = rows

        kept = {"all": tokens, "visual": tokens[tokens["kind"] == "visual"], "none": tokens.iloc[:0]}[rows]
        self._waiting.append(_to_arrow(kept, TOKEN_SCHEMA))
        self._summaries.append(_to_arrow(summarise_layers(tokens), LAYER_SCHEMA))
        self._n_waiting += len(tokens)
        if self._n_waiting >= self._rows_per_part:
            self._flush()

    def finish(self, manifest: Mapping[str, Any]) -> LayerProfile:
        """Write what is left, the layers table and the manifest.

        Args:
            manifest: what the caller knows of the run (JSON values); counts and versions of the format are added.
        """
        self._flush()
        full = {
            "format_version": FORMAT_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **manifest,
            "rows": self._rows or "all",
            "n_parts": len(self._parts),
            "n_token_rows": self._n_rows,
            "n_layer_rows": self._n_layer_rows,
        }
        if self._out is None:
            tables = [part for part in self._layer_parts if isinstance(part, pa.Table)]
            layers = pa.concat_tables(tables) if tables else LAYER_SCHEMA.empty_table()
            return LayerProfile(full, self._parts, layers)
        _replace(self._out / LAYERS_FILE, self._merge_layers)
        _write_json(self._out / MANIFEST_FILE, full)
        shutil.rmtree(self._out / _LAYERS_FOLDER)
        (self._out / UNFINISHED_FILE).unlink()
        return LayerProfile(full, self._parts, self._out / LAYERS_FILE, self._out)

    def _flush(self) -> None:
        if not self._summaries:
            return
        number, self._n_flushes = self._n_flushes, self._n_flushes + 1
        tokens, summary = pa.concat_tables(self._waiting), pa.concat_tables(self._summaries)
        self._waiting, self._summaries, self._n_waiting = [], [], 0
        self._n_rows += len(tokens)
        self._n_layer_rows += len(summary)
        self._store(tokens, self._parts, TOKENS_FOLDER, number)
        self._store(summary, self._layer_parts, _LAYERS_FOLDER, number)

    def _store(self, table: pa.Table, parts: list[Path | pa.Table], folder: str, number: int) -> None:
        if len(table) == 0:
            return
        if self._out is None:
            parts.append(table)
            return
        file = self._out / folder / f"part-{number:05d}.parquet"
        _replace(file, lambda temporary: pq.write_table(table, temporary, **_layout(table.schema)))
        parts.append(file)

    def _merge_layers(self, temporary: Path) -> None:
        with pq.ParquetWriter(temporary, LAYER_SCHEMA, **_layout(LAYER_SCHEMA)) as writer:
            for part in self._layer_parts:
                writer.write_table(read_table(part, None, None))


def check_output(path: str | os.PathLike[str]) -> None:
    """Refuse a path that a new profile must not be written to.

    A missing or empty folder will do, and so will one in which a profile was begun and not finished.

    Raises:
        CapaProbeError: ``path`` is a file, holds a finished profile, or is a folder with other things in it.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CapaProbeError(f"{path} is a file; give a folder to write the profile to.")
    if is_finished(folder):
        raise CapaProbeError(
            f"{path} already holds a finished profile; give another folder or remove this one."
        )
    if folder.is_dir() and any(folder.iterdir()) and not is_unfinished(folder):
        raise CapaProbeError(f"{path} is not empty and holds no profile; give a new or empty folder.")


def remove_profile(path: str | os.PathLike[str]) -> None:
    """Remove the tables of a profile, finished or not, and nothing else that may lie in the folder."""
    folder = Path(path)
    # The manifest first: a folder that has one is complete.
    for name in (MANIFEST_FILE, LAYERS_FILE, f"{MANIFEST_FILE}.tmp", f"{LAYERS_FILE}.tmp"):
        (folder / name).unlink(missing_ok=True)
    for name in (TOKENS_FOLDER, _LAYERS_FOLDER):
        for file in (folder / name).glob("part-*.parquet*"):
            file.unlink()
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()
    (folder / UNFINISHED_FILE).unlink(missing_ok=True)


def _to_arrow(table: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pandas(
        table[schema.names], schema=schema, preserve_index=False
    ).replace_schema_metadata()


def _layout(schema: pa.Schema) -> dict[str, Any]:
    """Floats split by byte and the rest dictionary-encoded: about a third smaller than the default."""
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    rest = [name for name in schema.names if name not in floats]
    return {"compression": "zstd", "use_byte_stream_split": floats, "use_dictionary": rest}


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, then rename, so that no reader ever sees half a file."""
    temporary = file.with_name(f"{file.name}.tmp")
    write(temporary)
    temporary.replace(file)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    _replace(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))

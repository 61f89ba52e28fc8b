"""Writes a profile while a model runs: parts, then the layers table, then the manifest.

Every file is written under a temporary name and renamed. A part counts once the summary of its samples lies in
``layers/`` too; ``manifest.json`` comes last, so a folder that has it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capa_probe.errors import CapaProbeError
from capa_probe.files import replace, write_json
from capa_probe.layer_table import summarise_layers
from capa_probe.run_folder import LAYERS_FOLDER, begin, check_output, tidy
from capa_probe.schema import (
    FORMAT_VERSION,
    LAYER_SCHEMA,
    LAYERS_FILE,
    MANIFEST_FILE,
    ROWS,
    SAMPLE_SCHEMA,
    SAMPLES_FILE,
    TOKEN_SCHEMA,
    TOKENS_FOLDER,
)
from capa_probe.tables import LayerProfile, is_finished, read_table

#: Batches are gathered into parts of about this many rows (some 20 MB in memory).
ROWS_PER_PART = 2**17
#: In the metadata of a part's summary: what the caller said of its progress, and the size of the part.
_PROGRESS = b"capa_probe"


class ProfileWriter:
    """Takes the token rows of one batch after another and writes a profile while it runs.

    Args:
        out: the folder to write to; None keeps the tables in memory.
        rows_per_part: batches are gathered until a part has at least so many rows; by default ``ROWS_PER_PART``.
        resume: go on after the finished parts in ``out`` (see :func:`capa_probe.run_folder.begin`).

    Attributes:
        folder: where it writes; None in memory.
        progress: what was given to :meth:`add` with the last batch of the last finished part; None before the first.

    Raises:
        CapaProbeError: ``out`` cannot be written to (see :func:`capa_probe.run_folder.check_output`), or holds a
            finished profile.
    """

    def __init__(
        self, out: Path | None = None, rows_per_part: int | None = None, resume: bool = False
    ) -> None:
        self.folder, self._rows_per_part = out, rows_per_part or ROWS_PER_PART
        self._waiting: list[pa.Table] = []
        self._summaries: list[pa.Table] = []
        self._n_waiting = self._n_rows = self._n_layer_rows = self._n_flushes = 0
        self._parts: list[Path | pa.Table] = []
        self._layer_parts: list[Path | pa.Table] = []
        self._rows: str | None = None
        self._seen: set[str] = set()
        self.progress: dict[str, Any] | None = None
        self._latest: Mapping[str, Any] | None = None
        if out is None:
            return
        if resume:
            self._resume(out)
        else:
            check_output(out)
            if is_finished(out):
                raise CapaProbeError(
                    f"{out} already holds a finished profile; give another folder or remove this one."
                )
            begin(out, {}, overwrite=True)

    def add(
        self, tokens: pa.Table | pd.DataFrame, rows: str = "all", progress: Mapping[str, Any] | None = None
    ) -> None:
        """Take the rows of one batch: every token of every sample in it.

        Args:
            tokens: columns as in ``TOKEN_SCHEMA``.
            rows: which of the rows to keep, "all", "visual" or "none"; the same for every batch.
            progress: what a resumed run must know to go on after this batch (JSON values).

        Raises:
            CapaProbeError: columns are missing, a sample was added before, or ``rows`` is none of the three.
        """
        if rows not in ROWS or rows != (self._rows or rows):
            before = f" after rows={self._rows!r}" if self._rows else ""
            raise CapaProbeError(
                f'rows={rows!r} was given{before}; give "all", "visual" or "none", the same for every batch.'
            )
        missing = [name for name in TOKEN_SCHEMA.names if name not in _names(tokens)]
        if missing:
            raise CapaProbeError(
                f"The token rows lack the columns {', '.join(missing)}; give all of TOKEN_SCHEMA."
            )
        if isinstance(tokens, pd.DataFrame):
            tokens = pa.Table.from_pandas(
                tokens[TOKEN_SCHEMA.names], schema=TOKEN_SCHEMA, preserve_index=False
            ).replace_schema_metadata()
        samples = {str(sample) for sample in tokens["sample"].unique().to_pylist()}
        if samples & self._seen:
            raise CapaProbeError(
                f"Rows of sample {min(samples & self._seen)!r} were added twice; add each sample once, as a whole."
            )
        self._seen |= samples
        self._rows, self._latest = rows, progress

        if rows == "visual":
            self._waiting.append(tokens.filter(pc.field("kind") == "visual"))
        else:
            self._waiting.append(tokens if rows == "all" else tokens.slice(0, 0))
        self._summaries.append(summarise_layers(tokens))
        self._n_waiting += len(tokens)
        if self._n_waiting >= self._rows_per_part:
            self._flush()

    def finish(self, manifest: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] = ()) -> LayerProfile:
        """Write what is left, the layers and the samples table, and the manifest.

        Args:
            manifest: what the caller knows of the run (JSON values); counts and versions of the format are added.
            samples: rows of the samples table.
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
        described = pa.Table.from_pylist([dict(row) for row in samples], schema=SAMPLE_SCHEMA)
        if self.folder is None:
            tables = [part for part in self._layer_parts if isinstance(part, pa.Table)]
            layers = (
                pa.concat_tables(tables).replace_schema_metadata() if tables else LAYER_SCHEMA.empty_table()
            )
            return LayerProfile(full, self._parts, layers, samples=described)
        replace(self.folder / LAYERS_FILE, self._merge_layers)
        if samples:
            replace(self.folder / SAMPLES_FILE, lambda temporary: pq.write_table(described, temporary))
        write_json(self.folder / MANIFEST_FILE, full)
        tidy(self.folder)
        return LayerProfile(full, self._parts, self.folder / LAYERS_FILE, self.folder)

    def _flush(self) -> None:
        if not self._summaries:
            return
        number, self._n_flushes = self._n_flushes, self._n_flushes + 1
        tokens, summary = pa.concat_tables(self._waiting), pa.concat_tables(self._summaries)
        self._waiting, self._summaries, self._n_waiting = [], [], 0
        self._n_rows += len(tokens)
        self._n_layer_rows += len(summary)
        self._store(tokens, self._parts, TOKENS_FOLDER, number)
        self.progress = None if self._latest is None else dict(self._latest)
        known = {"progress": self.progress, "n_rows": len(tokens), "rows": self._rows}
        summary = summary.replace_schema_metadata({_PROGRESS: json.dumps(known).encode()})
        self._store(summary, self._layer_parts, LAYERS_FOLDER, number)

    def _store(self, table: pa.Table, parts: list[Path | pa.Table], folder: str, number: int) -> None:
        if len(table) == 0:
            return
        if self.folder is None:
            parts.append(table)
            return
        file = _part(self.folder / folder, number)
        replace(file, lambda temporary: pq.write_table(table, temporary, **_layout(table.schema)))
        parts.append(file)

    def _merge_layers(self, temporary: Path) -> None:
        with pq.ParquetWriter(temporary, LAYER_SCHEMA, **_layout(LAYER_SCHEMA)) as writer:
            for part in self._layer_parts:
                writer.write_table(read_table(part, None, None).replace_schema_metadata())

    def _resume(self, out: Path) -> None:
        """Take up the finished parts; what was begun after them is removed."""
        while (summary := _part(out / LAYERS_FOLDER, self._n_flushes)).exists():
            tokens = _part(out / TOKENS_FOLDER, self._n_flushes)
            try:
                known = json.loads((pq.read_schema(summary).metadata or {})[_PROGRESS])
                table = read_table(summary, ["sample"], None)
                whole = not known["n_rows"] or pq.read_metadata(tokens).num_rows == known["n_rows"]
            except (CapaProbeError, OSError, ValueError, KeyError, pa.ArrowException):
                break  # damaged: run again from here
            if not whole:
                break
            self._layer_parts.append(summary)
            self._parts += [tokens] if known["n_rows"] else []
            self._n_rows += known["n_rows"]
            self._n_layer_rows += len(table)
            self._seen |= {str(sample) for sample in table["sample"].unique().to_pylist()}
            self.progress, self._rows = known["progress"], known["rows"]
            self._n_flushes += 1
        finished = {*self._parts, *self._layer_parts}
        for folder in (TOKENS_FOLDER, LAYERS_FOLDER):
            (out / folder).mkdir(exist_ok=True)
            for file in (out / folder).glob("part-*.parquet*"):
                if file not in finished:
                    file.unlink()
        (out / LAYERS_FILE).unlink(missing_ok=True)


def kept_samples(path: Path) -> int:
    """How many samples lie in the finished parts of a profile that was begun."""
    files = sorted((path / LAYERS_FOLDER).glob("part-*.parquet"))
    try:
        metadata = pq.read_schema(files[-1]).metadata if files else {}
        return int(json.loads(metadata[_PROGRESS])["progress"]["seen"])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return 0


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


def _names(tokens: pa.Table | pd.DataFrame) -> list[str]:
    return list(tokens.columns) if isinstance(tokens, pd.DataFrame) else list(tokens.column_names)


def _layout(schema: pa.Schema) -> dict[str, Any]:
    """Floats split by byte and the rest dictionary-encoded: about a third smaller than the default."""
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    rest = [name for name in schema.names if name not in floats]
    return {"compression": "zstd", "use_byte_stream_split": floats, "use_dictionary": rest}

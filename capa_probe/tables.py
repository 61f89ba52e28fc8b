"""Profile tables: what a profile holds, and how it is read back (columns: ``capa_probe.schema``).

A finished profile on disk is a folder::

    tokens/part-00000.parquet ...   one row per (sample, step, layer, position); a sample is whole inside one part
    layers.parquet                  one row per (sample, step, layer, kind): the same columns, summarised
    samples.parquet                 one row per sample; none where prepared tensors were profiled
    manifest.json                   what ran on what: model, versions, data fingerprint, settings

``manifest.json`` is written last, so a folder that has it is complete. In memory, Arrow tables have the same methods.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from capa_probe.errors import CapaProbeError
from capa_probe.profile_card import COLUMNS, profile_html
from capa_probe.schema import (
    FORMAT_VERSION,
    LAYER_SCHEMA,
    LAYERS_FILE,
    MANIFEST_FILE,
    SAMPLE_SCHEMA,
    SAMPLES_FILE,
    TOKEN_SCHEMA,
    TOKENS_FOLDER,
    UNFINISHED_FILE,
)

#: Lies in the folder of a benchmark run (``capa_probe.benchmark.store``), and in none of a profile.
BENCHMARK_FILE = "benchmark.json"


class LayerProfile:
    """A profile: tokens, layers and manifest, on disk or in memory.

    ``cp.profile`` makes one, :meth:`load` opens one. Tables are read when they are first asked for; :meth:`read`
    goes through the tokens part by part and is the way through a profile that does not fit in memory.

    Attributes:
        manifest: what ran on what.
        path: the folder; None for a profile in memory.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        parts: Sequence[Path | pa.Table],
        layers: Path | pa.Table,
        path: Path | None = None,
        samples: pa.Table | None = None,
    ) -> None:
        self.manifest: dict[str, Any] = dict(manifest)
        self.path = path
        self._parts = tuple(parts)
        self._layers, self._samples = layers, samples

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerProfile:
        """Open a finished profile.

        Raises:
            CapaProbeError: there is no finished profile at ``path``, a newer version wrote it, or it is damaged.
        """
        folder = Path(path)
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise CapaProbeError(f"{path} {what}; give the folder that a profile was written to.")
        if (folder / BENCHMARK_FILE).is_file():
            raise CapaProbeError(
                f"{path} holds a run of confirm or depth, not a profile; its tables are in {folder / 'tables'}, and "
                "reports are made of the folder that a profile was written to."
            )
        if not (folder / MANIFEST_FILE).is_file():
            why = (
                "holds a profile that was not finished; run it again, and it goes on where it ended"
                if is_unfinished(folder)
                else f"holds no profile ({MANIFEST_FILE} is missing); give the folder that a profile was written to"
            )
            raise CapaProbeError(f"{path} {why}.")
        manifest = read_manifest(folder)
        n_parts = manifest.get("n_parts")
        if n_parts is None:
            raise _other_manifest(folder / MANIFEST_FILE)
        parts = sorted((folder / TOKENS_FOLDER).glob("part-*.parquet"))
        if len(parts) != n_parts:
            raise CapaProbeError(
                f"{path} is damaged: {len(parts)} token parts lie in it, but its manifest says {n_parts}; "
                "copy the folder again or profile again."
            )
        _check_columns(folder / LAYERS_FILE, LAYER_SCHEMA)
        for part in parts[:1]:
            _check_columns(part, TOKEN_SCHEMA)
        return cls(manifest, parts, folder / LAYERS_FILE, folder)

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """All token rows; read once, then kept. Columns as in ``TOKEN_SCHEMA``."""
        return self.select()

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row per (sample, step, layer, kind); read once, then kept. Columns as in ``LAYER_SCHEMA``."""
        table = self._layers if isinstance(self._layers, pa.Table) else read_table(self._layers, None, None)
        return _to_pandas(table)

    @cached_property
    def samples(self) -> pd.DataFrame:
        """One row per sample, in order. Columns as in ``SAMPLE_SCHEMA``; empty for prepared tensors."""
        file = None if self.path is None else self.path / SAMPLES_FILE
        if self._samples is None and file is not None and file.is_file():
            return _to_pandas(read_table(file, None, None))
        return _to_pandas(SAMPLE_SCHEMA.empty_table() if self._samples is None else self._samples)

    @property
    def n_parts(self) -> int:
        """How many parts the token table has."""
        return len(self._parts)

    @property
    def rows(self) -> str:
        """Which token rows were kept: "all", "visual" or "none"."""
        return str(self.manifest["rows"])

    def read(
        self, columns: Sequence[str] | None = None, where: ds.Expression | Sequence[Any] | None = None
    ) -> Iterator[pd.DataFrame]:
        """Token rows, one DataFrame per part, so that memory stays small; each sample is whole inside one part.

        Args:
            columns: columns to read; None reads all.
            where: rows to keep: a ``pyarrow.dataset`` expression such as ``pyarrow.dataset.field("layer") == 3``, or
                filters such as ``[("layer", "==", 3), ("kind", "==", "visual")]`` (all must hold; a list of such
                lists means that one of them must).

        Yields:
            A DataFrame per part, empty where no row of it matches; a profile without parts yields one empty
            DataFrame, so that ``pandas.concat`` always works.

        Raises:
            CapaProbeError: an unknown column, filters that cannot be understood, or a damaged part.
        """
        # Arguments are checked here and now, not when the first part is asked for.
        unknown = [name for name in columns or () if name not in TOKEN_SCHEMA.names]
        if unknown or isinstance(columns, str):
            raise CapaProbeError(
                f"columns={columns!r} was given; give a list of token columns: {', '.join(TOKEN_SCHEMA.names)}."
            )
        chosen, condition = None if columns is None else list(columns), _to_expression(where)
        parts: Sequence[Path | pa.Table] = self._parts or (TOKEN_SCHEMA.empty_table(),)
        return (_to_pandas(read_table(part, chosen, condition)) for part in parts)

    def select(
        self, columns: Sequence[str] | None = None, where: ds.Expression | Sequence[Any] | None = None
    ) -> pd.DataFrame:
        """The token rows that :meth:`read` would yield, in one DataFrame."""
        return pd.concat(list(self.read(columns, where)), ignore_index=True)

    def __repr__(self) -> str:
        known = self.manifest
        facts = [
            str(known.get("model", "unknown model")),
            *(
                f"{known[key]} {noun}"
                for key, noun in (("n_samples", "samples"), ("n_layers", "layers"))
                if key in known
            ),
        ]
        steps = known.get("settings", {}).get("steps")
        if steps:
            facts.append(f"{steps} decode steps")
        kept = {"all": "all tokens", "visual": "visual tokens only", "none": "no token rows"}[self.rows]
        where = "in memory" if self.path is None else str(self.path)
        return (
            f"LayerProfile of {', '.join(facts)}\n"
            f"  .tokens  {known['n_token_rows']:,} rows, {kept}, {self.n_parts} parts, {where}\n"
            f"  .layers  {known['n_layer_rows']:,} rows\n"
            f"  .manifest  {', '.join(known)}"
        )

    def _repr_html_(self) -> str:
        layers = (
            self._layers
            if isinstance(self._layers, pa.Table)
            else read_table(self._layers, list(COLUMNS), None)
        )
        where = "in memory" if self.path is None else str(self.path)
        return profile_html(self.manifest, _to_pandas(layers), where)


def describe_skipped(skipped: Sequence[Mapping[str, str]], n: int) -> str:
    """The samples that a run left out, in a sentence.

    Args:
        skipped: as the manifest has them, at least one.
        n: how many samples there were, these included.
    """
    return (
        f"{len(skipped)} of {n:,} samples {'is' if len(skipped) == 1 else 'are'} left out, because an image cannot be "
        f"used (the manifest lists them under skipped); the first: {skipped[0]['reason']}"
    )


def is_unfinished(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a profile that was begun and not finished."""
    return (Path(path) / UNFINISHED_FILE).is_file()


def is_finished(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a finished profile (not whether it is sound; :meth:`LayerProfile.load` checks that)."""
    return (Path(path) / MANIFEST_FILE).is_file() and (Path(path) / LAYERS_FILE).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished profile.

    Raises:
        CapaProbeError: it cannot be read, or a newer version wrote it.
    """
    file = folder / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        format_version = int(manifest["format_version"])
    except (OSError, ValueError, KeyError, TypeError):
        raise _other_manifest(file) from None
    check_format(folder, format_version)
    return dict(manifest)


def _other_manifest(file: Path) -> CapaProbeError:
    return CapaProbeError(
        f"{file} is not the manifest of a profile; give the folder that a profile was written to."
    )


def check_format(folder: Path, format_version: int) -> None:
    """Refuse a profile that a newer version wrote.

    Raises:
        CapaProbeError: it was.
    """
    if format_version > FORMAT_VERSION:
        raise CapaProbeError(
            f"{folder} was written by a newer capa_probe (format {format_version}, this one reads up to "
            f"{FORMAT_VERSION}); upgrade with pip install -U capa-probe."
        )


def _check_columns(file: Path, schema: pa.Schema) -> None:
    try:
        found = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise CapaProbeError(f"{file} cannot be read ({_first_line(error)}); profile again.") from None
    missing = [name for name in schema.names if name not in found.names]
    if missing:
        raise CapaProbeError(f"{file} lacks the columns {', '.join(missing)}; profile again.")


def read_table(source: Path | pa.Table, columns: list[str] | None, where: ds.Expression | None) -> pa.Table:
    """Rows and columns of one part, on disk or in memory.

    Raises:
        CapaProbeError: it cannot be read as asked.
    """
    try:
        return ds.dataset(source).to_table(columns=columns, filter=where)
    except (OSError, pa.ArrowException) as error:
        what = "the profile in memory" if isinstance(source, pa.Table) else str(source)
        raise CapaProbeError(f"{what} cannot be read as asked: {_first_line(error)}.") from None


def _to_expression(where: ds.Expression | Sequence[Any] | None) -> ds.Expression | None:
    if where is None or isinstance(where, ds.Expression):
        return where
    try:
        return pq.filters_to_expression(list(where))
    except (ValueError, TypeError, IndexError, pa.ArrowException) as error:
        raise CapaProbeError(
            f'where={where!r} was given ({_first_line(error)}); give filters such as [("layer", "==", 3)] or a '
            "pyarrow.dataset expression."
        ) from None


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    return table.to_pandas(split_blocks=True)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")

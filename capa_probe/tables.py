"""Profile tables: what a profile holds, how it is written while a model runs, and how it is read back.

A finished profile on disk is a folder::

    tokens/part-00000.parquet ...   one row per (sample, step, layer, position); a sample is whole inside one part
    layers.parquet                  one row per (sample, step, layer, kind): the same columns, summarised
    manifest.json                   what ran on what: model, versions, data fingerprint, settings

Every file is written under a temporary name and renamed; ``manifest.json`` comes last, so a folder that has it is
complete. In memory the same tables are Arrow tables behind the same methods.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from capa_probe.errors import CapaProbeError

#: Raised whenever a reader of the present version could misread what is written.
FORMAT_VERSION = 1
#: Dimensions whose sink strength is kept per token, from the largest down.
SINK_RANKS = 4

_INDICES = ("image", "tile", "row", "col")
#: Measured columns that the layers table summarises. NaN where a value does not apply.
MEASURES: tuple[str, ...] = (
    "attention",
    "attention_text",
    "contribution",
    "removal_effect",
    "value_norm",
    "resid_pre_norm",
    "resid_mid_norm",
    "attn_update_norm",
    "ffn_update_norm",
    "attn_cosine",
    "ffn_cosine",
    "sink_strength",
    *(f"sink_strength_{rank}" for rank in range(2, SINK_RANKS + 1)),
)
#: (strength, dimension) columns of the largest dimensions, in falling order of strength.
SINK_COLUMNS: tuple[tuple[str, str], ...] = (
    ("sink_strength", "sink_dim"),
    *((f"sink_strength_{rank}", f"sink_dim_{rank}") for rank in range(2, SINK_RANKS + 1)),
)
#: One row per (sample, step, layer, position). A float that does not apply is NaN; an index that does not apply
#: (place of a text token, ``sink_dim`` of a row without sink strength) is -1.
TOKEN_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("sample", pa.string()),
        *(pa.field(name, pa.int32()) for name in ("step", "layer", "position")),
        pa.field("kind", pa.string()),
        *(pa.field(name, pa.int32()) for name in _INDICES),
        *(pa.field(name, pa.float32()) for name in MEASURES if not name.startswith("sink_")),
        *(
            field
            for strength, dim in SINK_COLUMNS
            for field in (pa.field(strength, pa.float32()), pa.field(dim, pa.int32()))
        ),
    ]
)

#: Statistics of the layers table: the mean, and quantiles by linear interpolation.
QUANTILES: dict[str, float] = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
STATISTICS: tuple[str, ...] = ("mean", *QUANTILES)
GROUP_COLUMNS: tuple[str, ...] = ("sample", "step", "layer", "kind")

#: One row per (sample, step, layer, kind); ``n_tokens`` counts rows, statistics skip NaN and are NaN without values.
LAYER_SCHEMA: pa.Schema = pa.schema(
    [
        *(TOKEN_SCHEMA.field(name) for name in GROUP_COLUMNS),
        pa.field("n_tokens", pa.int32()),
        *(pa.field(f"{measure}_{stat}", pa.float32()) for measure in MEASURES for stat in STATISTICS),
    ]
)

#: Which token rows a profile keeps; the layers table is computed from all of them in any case.
ROWS = ("all", "visual", "none")
#: Batches are gathered into parts of about this many rows (some 20 MB in memory).
ROWS_PER_PART = 2**17

_MANIFEST, _LAYERS, _UNFINISHED = "manifest.json", "layers.parquet", "unfinished.json"
_TOKENS_DIR, _LAYERS_DIR = "tokens", "layers"


def summarise_layers(tokens: pd.DataFrame) -> pd.DataFrame:
    """Mean and quantiles of every measure over the tokens of each (sample, step, layer, kind).

    Args:
        tokens: token rows in any order, with the columns of ``TOKEN_SCHEMA``.

    Returns:
        One row per group, in the order in which the groups first appear, with the columns of ``LAYER_SCHEMA``. NaN
        is skipped; a group without a value gives NaN. Quantiles interpolate linearly, as ``numpy.quantile`` does.
    """
    if tokens.empty:
        return LAYER_SCHEMA.empty_table().to_pandas()
    keys = tokens[list(GROUP_COLUMNS)]
    group = keys.groupby(list(GROUP_COLUMNS), sort=False, observed=True).ngroup().to_numpy()
    sizes = np.bincount(group)
    by_group = np.argsort(group, kind="stable")
    starts = np.cumsum(sizes) - sizes
    values = np.stack([tokens[name].to_numpy(np.float32) for name in MEASURES])

    statistics = np.full((len(MEASURES), len(STATISTICS), len(sizes)), np.nan, dtype=np.float32)
    # Groups of one size form a block, so that one sort serves all of them and every measure.
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        block = values[:, by_group[starts[same, None] + np.arange(size)]]  # (measure, group, token)
        statistics[:, :, same] = _statistics(block)

    table = keys.iloc[by_group[starts]].reset_index(drop=True)
    columns: dict[str, Any] = {"n_tokens": sizes.astype(np.int32)}
    for measure, rows in zip(MEASURES, statistics, strict=True):
        columns |= {f"{measure}_{stat}": row for stat, row in zip(STATISTICS, rows, strict=True)}
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def _statistics(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """(measure, group, token) to (measure, statistic, group)."""
    ordered = np.sort(block, axis=-1)  # NaN goes last
    known = ~np.isnan(ordered)
    count = known.sum(axis=-1)
    with np.errstate(invalid="ignore"):
        mean = np.where(known, ordered, 0).sum(axis=-1, dtype=np.float64) / count
    found = [mean]
    for quantile in QUANTILES.values():
        place = quantile * np.maximum(count - 1, 0)
        below = np.floor(place).astype(np.intp)
        above = np.minimum(below + 1, np.maximum(count - 1, 0))
        low, high = (
            np.take_along_axis(ordered, index[..., None], axis=-1)[..., 0].astype(np.float64)
            for index in (below, above)
        )
        found.append(low + (high - low) * (place - below))
    return np.stack(found, axis=1).astype(np.float32)


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
    ) -> None:
        self.manifest: dict[str, Any] = dict(manifest)
        self.path = path
        self._parts = tuple(parts)
        self._layers = layers

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
        if not (folder / _MANIFEST).is_file():
            why = (
                f"holds a profile that was not finished; run it again with out={str(path)!r}"
                if is_unfinished(folder)
                else f"holds no profile ({_MANIFEST} is missing); give the folder that a profile was written to"
            )
            raise CapaProbeError(f"{path} {why}.")
        manifest = _read_manifest(folder)
        parts = sorted((folder / _TOKENS_DIR).glob("part-*.parquet"))
        if len(parts) != manifest["n_parts"]:
            raise CapaProbeError(
                f"{path} is damaged: {len(parts)} token parts lie in it, but its manifest says {manifest['n_parts']}; "
                "copy the folder again or profile again."
            )
        _check_columns(folder / _LAYERS, LAYER_SCHEMA)
        for part in parts[:1]:
            _check_columns(part, TOKEN_SCHEMA)
        return cls(manifest, parts, folder / _LAYERS, folder)

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """All token rows; read once, then kept. Columns as in ``TOKEN_SCHEMA``."""
        return self.select()

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row per (sample, step, layer, kind); read once, then kept. Columns as in ``LAYER_SCHEMA``."""
        table = self._layers if isinstance(self._layers, pa.Table) else _read(self._layers, None, None)
        return _to_pandas(table)

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
        return (_to_pandas(_read(part, chosen, condition)) for part in parts)

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
            (out / _TOKENS_DIR).mkdir(parents=True)
            (out / _LAYERS_DIR).mkdir()
            _write_json(out / _UNFINISHED, {"format_version": FORMAT_VERSION})

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
        _replace(self._out / _LAYERS, self._merge_layers)
        _write_json(self._out / _MANIFEST, full)
        shutil.rmtree(self._out / _LAYERS_DIR)
        (self._out / _UNFINISHED).unlink()
        return LayerProfile(full, self._parts, self._out / _LAYERS, self._out)

    def _flush(self) -> None:
        if not self._summaries:
            return
        number, self._n_flushes = self._n_flushes, self._n_flushes + 1
        tokens, summary = pa.concat_tables(self._waiting), pa.concat_tables(self._summaries)
        self._waiting, self._summaries, self._n_waiting = [], [], 0
        self._n_rows += len(tokens)
        self._n_layer_rows += len(summary)
        self._store(tokens, self._parts, _TOKENS_DIR, number)
        self._store(summary, self._layer_parts, _LAYERS_DIR, number)

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
                writer.write_table(_read(part, None, None))


def is_unfinished(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a profile that was begun and not finished."""
    return (Path(path) / _UNFINISHED).is_file()


def is_finished(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a finished profile (not whether it is sound; :meth:`LayerProfile.load` checks that)."""
    return (Path(path) / _MANIFEST).is_file() and (Path(path) / _LAYERS).is_file()


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
    for name in (_MANIFEST, _LAYERS, f"{_MANIFEST}.tmp", f"{_LAYERS}.tmp"):
        (folder / name).unlink(missing_ok=True)
    for name in (_TOKENS_DIR, _LAYERS_DIR):
        for file in (folder / name).glob("part-*.parquet*"):
            file.unlink()
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()
    (folder / _UNFINISHED).unlink(missing_ok=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / _MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        format_version = int(manifest["format_version"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CapaProbeError(
            f"{file} is not the manifest of a profile; give the folder that a profile was written to."
        ) from None
    if format_version > FORMAT_VERSION:
        raise CapaProbeError(
            f"{folder} was written by a newer capa_probe (format {format_version}, this one reads up to "
            f"{FORMAT_VERSION}); upgrade with pip install -U capa-probe."
        )
    return dict(manifest)


def _check_columns(file: Path, schema: pa.Schema) -> None:
    try:
        found = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise CapaProbeError(f"{file} cannot be read ({_first_line(error)}); profile again.") from None
    missing = [name for name in schema.names if name not in found.names]
    if missing:
        raise CapaProbeError(f"{file} lacks the columns {', '.join(missing)}; profile again.")


def _read(source: Path | pa.Table, columns: list[str] | None, where: ds.Expression | None) -> pa.Table:
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


def _to_arrow(table: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pandas(
        table[schema.names], schema=schema, preserve_index=False
    ).replace_schema_metadata()


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    return table.to_pandas(split_blocks=True)


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


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")

"""Hugging Face datasets: by name, as ``save_to_disk`` wrote them, or files that ``load_dataset`` reads."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from capa_probe.errors import CapaProbeError
from capa_probe.samples.rows import Columns, RowReader, row_id
from capa_probe.samples.sample import Sample

if TYPE_CHECKING:
    import datasets

#: Suffix of a table in a single file -> the builder that reads it.
FILE_BUILDERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".arrow": "arrow",
}
#: What ``save_to_disk`` leaves in a folder: of one dataset, and of a dict of them.
_SAVED, _SAVED_DICT = "state.json", "dataset_dict.json"


class DatasetSamples(Sequence[Sample]):
    """The rows of a dataset as samples, each made when it is asked for.

    Images stay encoded until a sample is opened, and are not kept. Slices are such sequences again.

    Args:
        rows: the dataset, with its images undecoded.
        reader: makes a sample of a row.
        numbers: the rows, in order.
    """

    def __init__(self, rows: datasets.Dataset, reader: RowReader, numbers: range) -> None:
        self._rows, self._reader, self._numbers = rows, reader, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> DatasetSamples: ...

    def __getitem__(self, index: int | slice) -> Sample | DatasetSamples:
        if isinstance(index, slice):
            return DatasetSamples(self._rows, self._reader, self._numbers[index])
        number = self._numbers[index]
        return self._reader.sample(number, self._rows[number])

    def __repr__(self) -> str:
        return f"<{len(self)} samples of {self._reader.where}>"


def read_dataset(
    source: Path | str,
    columns: Columns,
    *,
    prompt: str | None = None,
    split: str | None = None,
    config: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
) -> Sequence[Sample]:
    """Samples of a dataset.

    Args:
        source: a folder or file (a Path), or a name on the Hugging Face hub (a string).
        columns: which columns hold what.
        prompt: the question of every sample, where ``columns`` name none.
        split: which split; may be left out where there is only one.
        config: which configuration of a dataset that has several.
        streaming: read only ``limit`` rows, over the network, without downloading the whole dataset.
        limit: only the first so many rows; None takes all.

    Returns:
        A :class:`DatasetSamples`, or with ``streaming`` a list.

    Raises:
        CapaProbeError: the dataset cannot be had, has no such split, configuration or column, is empty, or holds
            an id twice or a question that is empty.
    """
    if streaming and limit is None:
        raise CapaProbeError("streaming was given without a limit; say how many samples are to be read.")
    where = f"dataset {source}"
    with _one_sentence(where):
        if isinstance(source, Path) and is_saved(source):
            rows, split = _from_disk(source, split, config, where)
        else:
            rows, split = _build(source, split, config, streaming, where)
    where = f"{where}, split {split}" if split else where
    folder = None
    if isinstance(source, Path):
        folder = source.parent if source.is_file() else source
    with _one_sentence(where):
        rows = _undecoded(rows, columns)
        reader = RowReader(columns, prompt, where, folder, _labels(rows, columns))
        if isinstance(rows, Sized):
            return _select(rows, columns, reader, limit)
        return _stream(rows, columns, reader, limit)


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return any((folder / name).is_file() for name in (_SAVED, _SAVED_DICT))


def _from_disk(folder: Path, split: str | None, config: str | None, where: str) -> tuple[Any, str | None]:
    import datasets

    if config is not None:
        raise CapaProbeError(f"config={config!r} was given for {where}, a saved dataset; leave it out.")
    saved = datasets.load_from_disk(folder)
    if isinstance(saved, datasets.DatasetDict):
        split = _choose(split, list(saved), where)
        return saved[split], split
    if split is not None and split != str(saved.split):
        raise CapaProbeError(
            f"split={split!r} was given for {where}, which is a single split ({saved.split}); leave it out."
        )
    return saved, split


def _build(
    source: Path | str, split: str | None, config: str | None, streaming: bool, where: str
) -> tuple[Any, str]:
    import datasets

    # A bare name such as "csv" would mean one of the library's builders: hence whole paths.
    path, files = str(source), None
    if isinstance(source, Path):
        path = str(source.resolve())
        if source.is_file():
            files = {"train": [glob.escape(path)]}
            path = FILE_BUILDERS[source.suffix.lower()]
    try:
        builder = datasets.load_dataset_builder(path, name=config, data_files=files)
    except ValueError as error:
        names: list[str] = []
        with suppress(Exception):
            names = datasets.get_dataset_config_names(path, data_files=files)
        if (config is None and len(names) > 1) or (config is not None and config not in names):
            raise CapaProbeError(
                f"config={config!r} was given for {where}; give one of its configurations: "
                f"{', '.join(names) or 'it has none'}."
            ) from error
        raise
    split = _choose(
        split, [str(name) for name in builder.info.splits or builder.config.data_files or ()], where
    )
    if streaming:
        return builder.as_streaming_dataset(split=split), split
    builder.download_and_prepare()
    return builder.as_dataset(split=split), split


def _choose(split: str | None, names: list[str], where: str) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split is None or (names and split not in names):
        given = "no split" if split is None else f"split={split!r}"
        raise CapaProbeError(
            f"{given} was given for {where}; give one of its splits: {', '.join(names) or 'unknown'}."
        )
    return split


def _undecoded(rows: Any, columns: Columns) -> Any:
    """The dataset with images left as encoded bytes or paths."""
    import datasets

    for name in columns.image:
        feature = (rows.features or {}).get(name)
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return rows


def _labels(rows: Any, columns: Columns) -> dict[str, list[str]]:
    features = rows.features or {}
    labels = {}
    for name in (columns.answers, columns.task):
        feature = features.get(name)
        feature = getattr(feature, "feature", feature)  # of a list, that of its items
        names = getattr(feature, "names", None)
        if names:
            labels[str(name)] = list(names)
    return labels


def _select(rows: Any, columns: Columns, reader: RowReader, limit: int | None) -> DatasetSamples:
    columns.check(rows.column_names, reader.where)
    rows = rows.select_columns(list(dict.fromkeys(columns.names())))
    samples = DatasetSamples(rows, reader, range(len(rows))[:limit])
    n = len(samples)
    if not n:
        raise CapaProbeError(f"{reader.where} holds no rows; give one that does.")
    # What can be known before a long run begins; a column's type shows in the first row.
    ids = () if columns.id is None else rows[columns.id][:n]
    questions = () if columns.question is None else rows[columns.question][:n]
    _check(ids, questions, columns, reader.where)
    _ = samples[0]
    return samples


def _stream(rows: Any, columns: Columns, reader: RowReader, limit: int | None) -> list[Sample]:
    samples = []
    for number, row in enumerate(itertools.islice(rows, limit)):
        columns.check(row, reader.where)
        samples.append(reader.sample(number, row))
    if not samples:
        raise CapaProbeError(f"{reader.where} holds no rows; give one that does.")
    _check([sample.id for sample in samples], (), columns, reader.where)
    return samples


def _check(ids: Iterable[Any], questions: Iterable[Any], columns: Columns, where: str) -> None:
    row_of: dict[str, int] = {}
    for number, value in enumerate(ids):
        try:
            key = row_id(str(columns.id), value)
        except CapaProbeError as error:
            raise CapaProbeError(f"{where}, row {number}: {error}") from None
        if key in row_of:
            raise CapaProbeError(
                f"{where}, row {number}: id {key!r} in column {columns.id!r} was already used in row {row_of[key]}; "
                "name a column of unique ids, or none, and rows are counted."
            )
        row_of[key] = number
    for number, value in enumerate(questions):
        if not isinstance(value, str) or not value.strip():
            raise CapaProbeError(
                f"{where}, row {number}: column {columns.question!r} holds {value!r}; a question must be a string "
                "that is not empty."
            )


@contextmanager
def _one_sentence(where: str) -> Iterator[None]:
    """What the library raises, as one sentence; what it logs besides is left out."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except CapaProbeError:
        raise
    except ConnectionError as error:
        raise CapaProbeError(
            f"{where} is no file or folder here, is not in the local cache, and the Hugging Face hub cannot be "
            f"reached ({_first_line(error)}); give an existing one, or go online."
        ) from error
    except Exception as error:
        # The builders wrap what went wrong.
        cause = error.__cause__ or error
        raise CapaProbeError(
            f"{where} cannot be read ({_first_line(cause)}); give a folder or file of parquet, CSV or JSON, one "
            "written by save_to_disk, or a name on the Hugging Face hub."
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

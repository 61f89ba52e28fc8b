"""Samples from the rows of a table whose columns have any names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from capa_probe.errors import CapaProbeError
from capa_probe.samples.sample import ImageSource, Sample, image_path


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set hold what.

    Attributes:
        image: the column of images, or several, whose images follow each other.
        question: the column of questions; None where one prompt takes its place.
        answers: that of accepted answers, if any.
        id: that of ids; None counts rows.
        task: that of tasks, if any.
    """

    image: tuple[str, ...]
    question: str | None
    answers: str | None = None
    id: str | None = None
    task: str | None = None

    def names(self) -> list[str]:
        """All columns that are read."""
        rest = (self.question, self.answers, self.id, self.task)
        return [*self.image, *(name for name in rest if name is not None)]

    def check(self, given: Iterable[str], where: str) -> None:
        """Raise a :class:`CapaProbeError` where a column is not among those given."""
        present = list(given)
        for name in self.names():
            if name not in present:
                raise CapaProbeError(
                    f"{where} has no column {name!r}; name its columns for image, question, answers, id and task "
                    f"(it has: {', '.join(present) or 'none'})."
                )


class RowReader:
    """Makes samples of rows.

    Args:
        columns: which columns hold what.
        prompt: the question of every sample where there is no column of questions.
        where: names the data set in messages.
        folder: what image paths in the table are relative to; None refuses them.
        labels: per column that holds class numbers, the names of the classes.
    """

    def __init__(
        self,
        columns: Columns,
        prompt: str | None,
        where: str,
        folder: Path | None,
        labels: Mapping[str, Sequence[str]],
    ) -> None:
        self._columns, self._prompt, self._labels = columns, prompt, labels
        self.where, self._folder = where, folder

    def sample(self, number: int, row: Mapping[str, Any]) -> Sample:
        """The sample of a row.

        Raises:
            CapaProbeError: a cell does not hold what its column should; the message names the row.
        """
        columns = self._columns
        try:
            question = self._prompt if columns.question is None else row[columns.question]
            images = [source for name in columns.image for source in self._images(name, row[name])]
            answers = () if columns.answers is None else tuple(self._answers(columns.answers, row))
            task = None if columns.task is None else self._text(columns.task, row[columns.task])
            return Sample(self.id(number, row), images, question, answers, task)  # type: ignore[arg-type]
        except CapaProbeError as error:
            raise CapaProbeError(f"{self.where}, row {number}: {error}") from None

    def id(self, number: int, row: Mapping[str, Any]) -> str:
        """The id of a row: its number where no column holds ids."""
        name = self._columns.id
        if name is None:
            return str(number)
        return row_id(name, row[name])

    def _images(self, name: str, value: Any) -> list[ImageSource]:
        if value is None:
            return []
        if isinstance(value, (Image.Image, bytes)):
            return [value]
        if isinstance(value, str):
            if self._folder is None:
                raise CapaProbeError(
                    f"column {name!r} holds a path ({value!r}), but the data set comes without a folder of images; "
                    "give a column that holds the images themselves."
                )
            return [image_path(value, self._folder)]
        if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
            # An encoded image as datasets store it; the path then is only the name it once had.
            if value.get("bytes") is not None:
                return [value["bytes"]]
            return [] if value.get("path") is None else [_stored(value["path"], self._folder)]
        if isinstance(value, Sequence):
            return [source for item in value for source in self._images(name, item)]
        raise CapaProbeError(
            f"column {name!r} holds {_kind(value)}; give a column of images, image paths, bytes of image files, or "
            "lists of these."
        )

    def _answers(self, name: str, row: Mapping[str, Any]) -> list[str]:
        value = row[name]
        if isinstance(value, Mapping):  # VQAv2's form: {"answer": ..., "answer_confidence": ...}
            value = value.get("answer", value)
        items = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
        texts = []
        for item in items:
            text = self._text(name, item.get("answer", item) if isinstance(item, Mapping) else item)
            if text is not None:
                texts.append(text)
        return texts

    def _text(self, name: str, value: Any) -> str | None:
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            known = self._labels.get(name)
            # Class -1 is what a hidden label is given as.
            return known[value] if known is not None and 0 <= value < len(known) else str(value)
        raise CapaProbeError(
            f"column {name!r} holds {_kind(value)}; give a column of strings or integers"
            ', or for answers also lists of these or of {"answer": ...}.'
        )


def row_id(column: str, value: Any) -> str:
    """A cell of the column of ids, as a sample's id.

    Raises:
        CapaProbeError: it is neither a string that is not empty nor an integer.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise CapaProbeError(
            f"column {column!r} holds {value!r}; an id must be a string that is not empty, or an integer."
        )
    return str(value)


def _stored(path: str, folder: Path | None) -> ImageSource:
    """An image that a data set holds as a path of its own: on this machine, or where it is streamed from."""
    if "://" not in path:
        # Relative to the table, if it lies there; some tables mean the folder that they were written from.
        beside = None if folder is None else folder / path
        return beside if beside is not None and beside.is_file() else path
    from datasets import Image as ImageFeature

    try:
        return ImageFeature().decode_example({"path": path, "bytes": None})
    except (OSError, ValueError, SyntaxError):
        return path  # the sample's own error when it is opened


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, value)) or 'nothing'}"
    return f"a value of type {type(value).__name__}"

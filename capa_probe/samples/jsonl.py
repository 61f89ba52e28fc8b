"""The data folder: ``samples.jsonl``, and the images that it names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from os.path import normpath
from pathlib import Path
from typing import Any

from capa_probe.errors import CapaProbeError
from capa_probe.samples.sample import Sample, is_list_of

SAMPLES_FILE = "samples.jsonl"


def load_samples(path: str | Path, limit: int | None = None) -> list[Sample]:
    """Read a data folder.

    Args:
        path: the folder, or the ``.jsonl`` file in it.
        limit: read only the first so many samples; None reads all.

    Returns:
        The samples in file order, with image paths made absolute or relative to the working directory; they are
        looked at only when they are opened.

    Raises:
        CapaProbeError: the folder or the file is missing, a line is no JSON object or lacks a field,
            an id comes twice, or there is no sample; the message names the file and line.
    """
    if limit is not None and limit < 1:
        raise CapaProbeError(
            f"limit={limit} was given for the number of samples; give 1 or more, or leave it out."
        )
    file = Path(path)
    if file.is_dir():
        file = file / SAMPLES_FILE
    elif file.suffix != ".jsonl":
        raise CapaProbeError(f"{path} is not a folder; give a folder with {SAMPLES_FILE} and images.")
    if not file.is_file():
        raise CapaProbeError(
            f"{file} does not exist; a data folder needs it, with one line of JSON "
            '({"id", "image", "question", "answers"}) per sample.'
        )

    samples: list[Sample] = []
    line_of: dict[str, int] = {}
    for number, record in _records(file):
        where = f"{file}, line {number}"
        try:
            sample = _to_sample(record, file.parent)
        except CapaProbeError as error:
            raise CapaProbeError(f"{where}: {error}") from None
        if sample.id in line_of:
            raise CapaProbeError(
                f"{where}: id {sample.id!r} was already used on line {line_of[sample.id]}; ids must be unique."
            )
        line_of[sample.id] = number
        samples.append(sample)
        if len(samples) == limit:
            break
    if not samples:
        raise CapaProbeError(f"{file} holds no samples; write one line of JSON per sample.")
    return samples


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    """Line number and parsed JSON of each line that is not blank."""
    try:
        # A byte order mark is what some editors put first.
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise CapaProbeError(
                        f"{file}, line {number}: this is not JSON ({error.msg} at column {error.colno}); "
                        "write one JSON object per line."
                    ) from None
    except UnicodeDecodeError as error:
        raise CapaProbeError(f"{file} is not UTF-8 text ({error.reason}); save it as UTF-8.") from None


def _to_sample(record: Any, folder: Path) -> Sample:
    if not isinstance(record, dict):
        raise CapaProbeError(
            f"this is a JSON {type(record).__name__}, not an object; write one object per line."
        )
    for field in ("id", "question"):
        if field not in record:
            raise CapaProbeError(f'the field "{field}" is missing (fields given: {_names(record)}).')
    if ("image" in record) == ("images" in record):
        given = "both" if "image" in record else "neither"
        raise CapaProbeError(
            f'give "image" (one path) or "images" (a list, empty for a question without an image); '
            f"{given} was given (fields given: {_names(record)})."
        )
    names = [record["image"]] if "image" in record else record["images"]
    if not is_list_of(names, str):
        raise CapaProbeError(f'"image" must be a path and "images" a list of paths, but {names!r} was given.')
    for name in names:
        if not name or Path(name).is_absolute() or Path(normpath(name)).parts[:1] == ("..",):
            raise CapaProbeError(
                f"image {name!r} is not a file in {folder}; put the images there or link them, and give paths "
                "relative to that folder."
            )
    number = record["id"]
    # Data sets often count: 17 is taken for "17", but true and 1.5 are mistakes.
    sample_id = str(number) if isinstance(number, int) and not isinstance(number, bool) else number
    images = [folder / name for name in names]
    return Sample(sample_id, images, record["question"], record.get("answers", ()), record.get("task"))


def _names(record: dict[str, Any]) -> str:
    return ", ".join(record) or "none"

"""The data folder: ``samples.jsonl``, and the images that it names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capa_probe.errors import CapaProbeError
from capa_probe.samples.sample import Sample, image_path, is_list_of

SAMPLES_FILE = "samples.jsonl"


def read_jsonl(file: Path, limit: int | None = None) -> list[Sample]:
    """Read a data folder's ``samples.jsonl``.

    One JSON object a line::

        {"id": "7-colour", "image": "images/7.png", "question": "what color is the circle", "answers": ["red"]}

    ``images`` takes a list of paths instead of ``image``'s one; paths are relative to the file's folder; ``answers``,
    ``task`` and ``regions`` may be left out, and further fields are ignored.

    Args:
        file: the file.
        limit: read only the first so many samples; None reads all.

    Returns:
        The samples in file order; their images are looked at only when they are opened.

    Raises:
        CapaProbeError: the file is missing, a line is no JSON object or lacks a field, an image path leads out of
            the folder, an id comes twice, or there is no sample; the message names the file and line.
    """
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
                except (ValueError, RecursionError) as error:
                    raise CapaProbeError(
                        f"{file}, line {number}: this cannot be read ({error}); write one plain JSON object per line."
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
    images = [image_path(name, folder) for name in names]
    number = record["id"]
    # Data sets often count: 17 is taken for "17", but true and 1.5 are mistakes.
    sample_id = str(number) if isinstance(number, int) and not isinstance(number, bool) else number
    return Sample(
        sample_id,
        images,
        record["question"],
        record.get("answers", ()),
        record.get("task"),
        record.get("regions"),
    )


def _names(record: dict[str, Any]) -> str:
    return ", ".join(record) or "none"

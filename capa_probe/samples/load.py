"""``load_samples``: one way in, for data of every form."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capa_probe.errors import CapaProbeError
from capa_probe.samples.dataset import FILE_BUILDERS, is_saved, read_dataset
from capa_probe.samples.folder import image_names, image_suffixes, read_images, visible_files
from capa_probe.samples.jsonl import SAMPLES_FILE, read_jsonl
from capa_probe.samples.rows import Columns
from capa_probe.samples.sample import Sample

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_EXPECTED = (
    f"a folder with {SAMPLES_FILE}, a folder of images with a prompt, a saved dataset, a parquet, CSV or JSON file, "
    "or a dataset on the Hugging Face hub (owner/name)"
)


def load_samples(
    source: str | Path,
    limit: int | None = None,
    *,
    prompt: str | None = None,
    image: str | Sequence[str] | None = None,
    question: str | None = None,
    answers: str | None = None,
    id: str | None = None,  # noqa: A002
    task: str | None = None,
    split: str | None = None,
    config: str | None = None,
    streaming: bool = False,
) -> Sequence[Sample]:
    """Read samples from wherever they are.

    - A folder with ``samples.jsonl`` needs nothing else (:func:`capa_probe.samples.jsonl.read_jsonl`).
    - A folder of images, or one image, needs ``prompt`` (:func:`capa_probe.samples.folder.read_images`).
    - A Hugging Face dataset needs the names of its columns, and ``split`` and ``config`` where it has several: a
      folder that ``save_to_disk`` wrote, a file or folder of parquet, CSV or JSON, or ``owner/name`` on the hub.

    No form runs code that comes with the data.

    Args:
        source: the folder, file, or ``owner/name`` on the hub.
        limit: only the first so many samples; None takes all.
        prompt: one question for all samples, in place of a column of questions.
        image: the dataset's column of images, image paths, bytes of image files, or lists of these; several names
            for several columns. "image" by default.
        question: its column of questions. "question" by default.
        answers: its column of accepted answers: strings, integers, class labels, or lists of these or of dicts
            with "answer".
        id: its column of unique ids; by default rows are counted from 0.
        task: its column of the group to report a sample under.
        split: which split of the dataset.
        config: which configuration of the dataset.
        streaming: fetch only ``limit`` rows, in place of downloading the dataset first.

    Returns:
        The samples, in order. Images are neither opened nor looked for until a sample's ``open_images()``. A
        dataset's samples are made when they are asked for, so that its images are never in memory all at once.

    Raises:
        CapaProbeError: ``source`` is none of these, an argument does not go with it, or the data are not in
            order; the message names the file and line, or the row.
    """
    if limit is not None and not 1 <= limit <= sys.maxsize:
        raise CapaProbeError(
            f"limit={limit} was given for the number of samples; give 1 or more, or leave it out."
        )
    if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
        raise CapaProbeError(f"prompt={prompt!r} was given; give a question that is not empty.")
    options = {
        "image": image,
        "question": question,
        "answers": answers,
        "id": id,
        "task": task,
        "split": split,
        "config": config,
        "streaming": streaming or None,
    }
    given = [name for name, value in options.items() if value is not None]

    form, place = _form(source, prompt, given)
    if form == "dataset":
        if prompt is not None and question is not None:
            raise CapaProbeError(
                f"prompt={prompt!r} and question={question!r} were given for dataset {source}; give one of the two."
            )
        return read_dataset(
            place,
            _columns(prompt, image, question, answers, id, task),
            prompt=prompt,
            split=split,
            config=config,
            streaming=streaming,
            limit=limit,
        )
    file = Path(place)
    if given:
        verb, them = ("was", "it") if len(given) == 1 else ("were", "them")
        raise CapaProbeError(
            f"{', '.join(given)} {verb} given for {source}, "
            f"which is no dataset with columns and splits; leave {them} out."
        )
    if form == "images":
        if prompt is None:
            what = "is an image" if file.is_file() else f"holds images and no {SAMPLES_FILE}"
            raise CapaProbeError(f"{source} {what}; give a prompt (--prompt) to ask of each image.")
        return read_images(file, prompt, limit)
    if prompt is not None:
        raise CapaProbeError(
            f"prompt={prompt!r} was given for {file}, which holds questions of its own; leave the prompt out, or give "
            "a folder of images without such a file."
        )
    return read_jsonl(file, limit)


def _form(source: Any, prompt: str | None, given: list[str]) -> tuple[str, Path | str]:
    """Which form the data have ("jsonl", "images" or "dataset"), and where they are: a path, or a name on the hub."""
    if not isinstance(source, (str, Path)) or not str(source):
        raise CapaProbeError(f"source={source!r} was given; give {_EXPECTED}.")
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        return _form_of_folder(path, prompt, given)
    if suffix == ".jsonl" and not given:
        return "jsonl", path
    if path.is_file():
        if suffix in FILE_BUILDERS:
            return "dataset", path
        if suffix in image_suffixes():
            return "images", path
        raise CapaProbeError(f"{source} is a file of another kind; give {_EXPECTED}.")
    name = source if isinstance(source, str) else source.as_posix()
    if suffix not in FILE_BUILDERS and suffix not in image_suffixes() and _HUB_NAME.fullmatch(name):
        return "dataset", name
    raise CapaProbeError(f"{source} does not exist; give {_EXPECTED}.")


def _form_of_folder(folder: Path, prompt: str | None, given: list[str]) -> tuple[str, Path]:
    if (folder / SAMPLES_FILE).is_file():
        return "jsonl", folder / SAMPLES_FILE
    if is_saved(folder):
        return "dataset", folder
    has_images = bool(image_names(folder))
    tables = [path for path in visible_files(folder) if path.suffix.lower() in FILE_BUILDERS]
    # A prompt alone is for images, even with some table beside them; a table and no prompt is meant.
    if given or (tables and not (prompt is not None and has_images)):
        described = any(path.stem == "metadata" for path in tables)  # then images and table are read together
        if has_images and not described and len(tables) == 1:
            return "dataset", folder / tables[0]  # or the images alone would be taken for the dataset
        return "dataset", folder
    if has_images or prompt is not None:
        return "images", folder
    raise CapaProbeError(f"{folder} holds no {SAMPLES_FILE}, no images and no dataset; give {_EXPECTED}.")


def _columns(
    prompt: str | None,
    image: str | Sequence[str] | None,
    question: str | None,
    answers: str | None,
    id: str | None,  # noqa: A002
    task: str | None,
) -> Columns:
    images = (image,) if isinstance(image, str) else tuple(image or ("image",))
    if question is None and prompt is None:
        question = "question"
    columns = Columns(images, question, answers, id, task)
    for name in columns.names():
        if not isinstance(name, str) or not name:
            raise CapaProbeError(
                f"{name!r} was given as the name of a column; give a string that is not empty."
            )
    return columns

"""Samples: a question about images, and the folder that a set of them is read from.

A data folder holds ``samples.jsonl`` and the images that it names, one JSON object a line::

    {"id": "7-colour", "image": "images/7.png", "question": "what color is the circle", "answers": ["red"]}

``images`` takes a list of paths instead of ``image``'s one; paths are relative to the folder; ``answers`` and
``task`` may be left out, and further fields are ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from capa_probe.errors import CapaProbeError

#: An image in memory, or where one lies.
ImageSource: TypeAlias = Image.Image | Path | str

SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True, init=False)
class Sample:
    """One question about no, one or several images.

    Attributes:
        id: names the sample in every table; unique within a data set.
        images: the images, in the order in which the prompt shows them.
        question: a plain question, or a prompt that already holds the model's image placeholders.
        answers: accepted answers, if known.
        task: a group to report the sample under, if any.

    Raises:
        CapaProbeError: a field has the wrong type, or ``id`` or ``question`` is empty.
    """

    id: str
    images: tuple[ImageSource, ...]
    question: str
    answers: tuple[str, ...] = ()
    task: str | None = None

    def __init__(
        self,
        id: str,  # noqa: A002
        images: ImageSource | Sequence[ImageSource],
        question: str,
        answers: str | Sequence[str] = (),
        task: str | None = None,
    ) -> None:
        several = (images,) if isinstance(images, ImageSource) else images
        accepted = (answers,) if isinstance(answers, str) else answers
        if not isinstance(id, str) or not id:
            raise CapaProbeError(f"id={id!r} was given for a sample; give a string that is not empty.")
        if not isinstance(question, str) or not question.strip():
            raise CapaProbeError(
                f"question={question!r} was given for sample {id!r}; give a string that is not empty."
            )
        if not _is_list_of(several, ImageSource):
            raise CapaProbeError(
                f"images={images!r} was given for sample {id!r}; give a PIL image, a path, or a list of these."
            )
        if not _is_list_of(accepted, str):
            raise CapaProbeError(f"answers={answers!r} was given for sample {id!r}; give a list of strings.")
        if task is not None and not isinstance(task, str):
            raise CapaProbeError(f"task={task!r} was given for sample {id!r}; give a string or None.")
        # Frozen: fields are set past the class's own __setattr__.
        for name, value in {
            "id": id,
            "images": tuple(several),
            "question": question,
            "answers": tuple(accepted),
            "task": task,
        }.items():
            object.__setattr__(self, name, value)

    def open_images(self) -> list[Image.Image]:
        """The images, loaded, turned upright as their EXIF data say, in RGB; always copies.

        Transparent images are laid on white; 16-bit grey becomes 8-bit grey.

        Raises:
            CapaProbeError: a file is missing or cannot be read as an image.
        """
        return [_open_rgb(source, self.id) for source in self.images]


def load_samples(path: str | Path, limit: int | None = None) -> list[Sample]:
    """Read a data folder (see the module's docstring).

    Args:
        path: the folder, or the ``.jsonl`` file in it.
        limit: read only the first so many samples; None reads all.

    Returns:
        The samples in file order, with image paths made absolute or relative to the working directory; images
        are known to exist but are opened later.

    Raises:
        CapaProbeError: the folder, the file or an image is missing, a line is no JSON object or lacks a field,
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


def data_fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 over ids, questions, answers and image bytes, in order, as 64 hex digits.

    An image file counts by its bytes, an image in memory by mode, size and pixels.

    Raises:
        CapaProbeError: an image file is missing.
    """
    digest = hashlib.sha256()
    images: dict[Path, bytes] = {}  # several questions usually share an image

    def add(*fields: bytes) -> None:
        for field in fields:
            # Lengths first, so that ("ab", "c") and ("a", "bc") differ.
            digest.update(len(field).to_bytes(8, "big") + field)

    def add_text(*fields: str) -> None:
        # JSON can hold half of a surrogate pair, which plain UTF-8 refuses.
        add(*(field.encode(errors="surrogatepass") for field in fields))

    for sample in samples:
        add_text(sample.id, sample.question)
        add(len(sample.answers).to_bytes(8, "big"))
        add_text(*sample.answers)
        add(len(sample.images).to_bytes(8, "big"))
        for source in sample.images:
            if isinstance(source, Image.Image):
                add(source.mode.encode(), repr(source.size).encode(), source.tobytes())
                continue
            file = Path(source)
            if file not in images:
                images[file] = _digest_file(file, sample.id)
            add(images[file])
    return digest.hexdigest()


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
    if not _is_list_of(names, str):
        raise CapaProbeError(f'"image" must be a path and "images" a list of paths, but {names!r} was given.')
    images = [folder / name for name in names]
    for name, image in zip(names, images, strict=True):
        if not image.is_file():
            raise CapaProbeError(
                f"image {name!r} is not in {folder}; image paths are relative to that folder."
            )
    number = record["id"]
    # Data sets often count: 17 is taken for "17", but true and 1.5 are mistakes.
    sample_id = str(number) if isinstance(number, int) and not isinstance(number, bool) else number
    return Sample(sample_id, images, record["question"], record.get("answers", ()), record.get("task"))


def _open_rgb(source: ImageSource, sample_id: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return to_rgb(source)
    try:
        with Image.open(source) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise CapaProbeError(f"image {source} of sample {sample_id!r} does not exist.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CapaProbeError(
            f"image {source} of sample {sample_id!r} cannot be read as an image ({error})."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A copy in RGB: upright as its EXIF data say, transparency laid on white, 16-bit grey as 8-bit."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255, which is nearly all white.
        grey = np.asarray(image).astype(np.float64)
        if "16" in image.mode or grey.max() > 255:
            grey = grey / 257
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _digest_file(file: Path, sample_id: str) -> bytes:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise CapaProbeError(
            f"image {file} of sample {sample_id!r} cannot be read ({error.strerror})."
        ) from error


def _is_list_of(values: Any, kind: Any) -> bool:
    return (
        isinstance(values, Sequence)
        and not isinstance(values, str)
        and all(isinstance(v, kind) for v in values)
    )


def _names(record: dict[str, Any]) -> str:
    return ", ".join(record) or "none"

"""One question about images."""

from __future__ import annotations

import io
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import normpath
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image, UnidentifiedImageError

from capa_probe.errors import BadImageError, CapaProbeError
from capa_probe.samples.pixels import to_rgb
from capa_probe.samples.showing import sample_html

#: Left, top, right and bottom in pixels of the upright image; right and bottom are the first ones outside.
Region: TypeAlias = tuple[float, float, float, float]

#: An image in memory, where one lies, or the content of an image file.
ImageSource: TypeAlias = Image.Image | Path | str | bytes

# Bytes in full would fill the screen.
_SHORT = reprlib.Repr()
_SHORT.maxother, _SHORT.maxstring, _SHORT.maxtuple, _SHORT.maxlist = 60, 200, 8, 8


@dataclass(frozen=True, init=False, repr=False)
class Sample:
    """One question about no, one or several images.

    Attributes:
        id: names the sample in every table; unique within a data set.
        images: the images, in the order in which the prompt shows them: PIL images, paths, or the bytes of image
            files. Paths and bytes are opened by :meth:`open_images` only.
        question: a plain question, or a prompt that already holds the model's image placeholders.
        answers: accepted answers, if known.
        task: a group to report the sample under, if any.
        regions: for each image, the boxes that the answer hangs on, if known: left, top, right and bottom in pixels of
            the upright image. No box where the answer is that there is no such thing.

    Raises:
        CapaProbeError: a field has the wrong type, or ``id`` or ``question`` is empty.
    """

    id: str
    images: tuple[ImageSource, ...]
    question: str
    answers: tuple[str, ...] = ()
    task: str | None = None
    regions: tuple[tuple[Region, ...], ...] | None = None

    def __init__(
        self,
        id: str,  # noqa: A002
        images: ImageSource | Sequence[ImageSource],
        question: str,
        answers: str | Sequence[str] = (),
        task: str | None = None,
        regions: Sequence[Sequence[Sequence[float]]] | None = None,
    ) -> None:
        several = (images,) if isinstance(images, ImageSource) else images
        accepted = (answers,) if isinstance(answers, str) else answers
        if not isinstance(id, str) or not id:
            raise CapaProbeError(f"id={id!r} was given for a sample; give a string that is not empty.")
        if not isinstance(question, str) or not question.strip():
            raise CapaProbeError(
                f"question={question!r} was given for sample {id!r}; give a string that is not empty."
            )
        if not is_list_of(several, ImageSource):
            raise CapaProbeError(
                f"images={_SHORT.repr(images)} was given for sample {id!r}; give a PIL image, a path, the bytes of "
                "an image file, or a list of these."
            )
        if not is_list_of(accepted, str):
            raise CapaProbeError(
                f"answers={_SHORT.repr(answers)} was given for sample {id!r}; give a list of strings."
            )
        for field, text in (("id", id), ("task", task)):
            if isinstance(text, str) and _has_surrogate(text):
                raise CapaProbeError(
                    f"{field}={text!r} was given for a sample; give text that UTF-8 can hold."
                )
        if task is not None and not isinstance(task, str):
            raise CapaProbeError(f"task={task!r} was given for sample {id!r}; give a string or None.")
        boxes = None if regions is None else _to_regions(regions, len(several), id)
        # Frozen: fields are set past the class's own __setattr__.
        for name, value in {
            "id": id,
            "images": tuple(several),
            "question": question,
            "answers": tuple(accepted),
            "task": task,
            "regions": boxes,
        }.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        images = ", ".join(_SHORT.repr(source) for source in self.images)
        regions = "" if self.regions is None else f", regions={_SHORT.repr(self.regions)}"
        return (
            f"Sample(id={self.id!r}, images=[{images}], question={self.question!r}, "
            f"answers={_SHORT.repr(self.answers)}, task={self.task!r}{regions})"
        )

    def _repr_html_(self) -> str:
        return sample_html(self)

    def open_images(self) -> list[Image.Image]:
        """The images, loaded, as :func:`to_rgb` makes them: upright, opaque, in RGB; always copies.

        Of an animation or a file of several pages, the first frame.

        Raises:
            BadImageError: an image is missing, cut short, has no pixels, or cannot be read as an image.
        """
        return [self.open_image(number) for number in range(len(self.images))]

    def open_image(self, number: int) -> Image.Image:
        """One of the images, counted from 0, as :meth:`open_images` returns it.

        Raises:
            BadImageError: it cannot be used.
        """
        source = self.images[number]
        try:
            if isinstance(source, Image.Image):
                return to_rgb(source)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return to_rgb(image)
        except FileNotFoundError:
            raise self._bad(number, "does not exist") from None
        except UnidentifiedImageError as error:
            reason = (
                "is empty" if _is_empty(source) else "is in no image format that Pillow knows, or damaged"
            )
            raise self._bad(number, f"cannot be read as an image (it {reason})") from error
        except CapaProbeError as error:
            raise self._bad(number, f"cannot be used ({error})") from None
        except MemoryError:
            raise
        except Exception as error:  # each of Pillow's formats fails in a way of its own
            raise self._bad(number, f"cannot be read as an image ({str(error) or error!r})") from error

    def _bad(self, number: int, reason: str) -> BadImageError:
        source = self.images[number]
        if isinstance(source, (str, Path)):
            return BadImageError(str(source), self.id, reason)
        return BadImageError(f"number {number + 1}, given in memory,", self.id, reason)


def is_list_of(values: Any, kind: Any) -> bool:
    """Whether these are a list or tuple of such objects, and no string."""
    return (
        isinstance(values, Sequence)
        and not isinstance(values, (str, bytes))
        and all(isinstance(value, kind) for value in values)
    )


def image_path(name: str, folder: Path) -> Path:
    """Where the image of that name lies, if this is in the folder.

    Raises:
        CapaProbeError: the name is empty, absolute, or leads out of the folder.
    """
    if not name or Path(name).is_absolute() or Path(normpath(name)).parts[:1] == ("..",):
        raise CapaProbeError(
            f"image {name!r} is not a file in {folder}; put the images there or link them, and give paths relative "
            "to that folder."
        )
    return folder / name


def _to_regions(regions: Any, n_images: int, sample_id: str) -> tuple[tuple[Region, ...], ...]:
    """Checked, as nested tuples."""
    if not is_list_of(regions, Sequence) or len(regions) != n_images:
        raise CapaProbeError(
            f"regions={_SHORT.repr(regions)} was given for sample {sample_id!r}; give one list of boxes "
            f"[left, top, right, bottom] for each of its images (it has {n_images})."
        )
    for boxes in regions:
        for box in boxes:
            numbers = isinstance(box, Sequence) and not isinstance(box, str) and len(box) == 4
            if (
                not numbers
                or not all(_is_pixel(value) for value in box)
                or box[0] >= box[2]
                or box[1] >= box[3]
            ):
                raise CapaProbeError(
                    f"the region {_SHORT.repr(box)} was given for sample {sample_id!r}; give [left, top, right, "
                    "bottom] in pixels, none negative, with left < right and top < bottom."
                )
    return tuple(tuple(tuple(box) for box in boxes) for boxes in regions)


def _is_pixel(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _is_empty(source: ImageSource) -> bool:
    if isinstance(source, Image.Image):
        return False
    return (len(source) if isinstance(source, bytes) else Path(source).stat().st_size) == 0

"""A folder of images, and one question asked of each."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image

from capa_probe.errors import CapaProbeError
from capa_probe.samples.sample import Sample

#: Formats that Pillow lists but cannot decode by itself, or that are video.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


def read_images(source: Path, prompt: str, limit: int | None = None) -> list[Sample]:
    """One sample for each image file in a folder and the folders in it, all with the same question.

    Args:
        source: the folder, or one image file.
        prompt: the question.
        limit: take only the first so many images; None takes all.

    Returns:
        The samples in the order of their paths, numbers in names counted (``2.png`` before ``10.png``). A sample's
        id is the path from the folder on, without the suffix unless two would then be the same.

    Raises:
        CapaProbeError: there is no image file.
    """
    if source.is_file():
        return [Sample(source.stem, source, prompt)]
    names = [str(name) for name in image_names(source)]
    if not names:
        raise CapaProbeError(
            f"{source} holds no image files; give a folder with images (.png, .jpg, .webp and the like)."
        )
    short = {name: str(PurePosixPath(name).with_suffix("")) for name in names}
    taken = Counter([*names, *short.values()])
    return [
        Sample(short[name] if taken[short[name]] == 1 else name, source / name, prompt)
        for name in names[:limit]
    ]


def image_names(folder: Path) -> list[PurePosixPath]:
    """Paths of all image files below a folder, relative to it, in order; hidden files and folders do not count."""
    suffixes = image_suffixes()
    found = (path for path in visible_files(folder) if path.suffix.lower() in suffixes)
    return sorted(found, key=_natural)


def visible_files(folder: Path) -> Iterator[PurePosixPath]:
    """Relative paths of all files below a folder, links followed, without hidden ones."""
    seen = {folder.resolve()}
    for root, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        here = Path(root)
        inner = []
        for name in folders:
            target = (here / name).resolve()
            if not name.startswith(".") and target not in seen:  # a link may lead back to where it lies
                seen.add(target)
                inner.append(name)
        folders[:] = inner
        for name in files:
            if not name.startswith("."):
                yield PurePosixPath((here / name).relative_to(folder).as_posix())


def _refuse(error: OSError) -> None:
    raise CapaProbeError(
        f"folder {error.filename} cannot be read ({error.strerror}); make it readable, or give another."
    ) from error


def image_suffixes() -> frozenset[str]:
    """Suffixes of the image formats that Pillow can open, in lower case."""
    Image.init()
    known = Image.registered_extensions().items()
    opened = {suffix for suffix, kind in known if kind in Image.OPEN and kind not in _NOT_DECODED}
    return frozenset(opened | {".mpo"})  # opened as JPEG


def _natural(path: PurePosixPath) -> tuple[list[list[str | int]], str]:
    """Sorts as people count, the same on every platform; capitals matter only between else equal names."""
    parts: list[list[str | int]] = [
        [int(piece) if piece.isdecimal() else piece for piece in re.split(r"([0-9]+)", part.casefold())]
        for part in path.parts
    ]
    return parts, str(path)

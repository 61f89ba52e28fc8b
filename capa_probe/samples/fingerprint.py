"""What data a run was made on, in 64 hex digits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import ExifTags, Image

from capa_probe.samples.sample import Sample

#: Stands for an image whose file is missing or cannot be read.
UNREADABLE = hashlib.sha256(b"unreadable image").digest()
_CACHED_FILES = 4096


def data_fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 over ids, questions, answers and image bytes, in order, as 64 hex digits.

    An image file counts by its bytes, wherever it lies, an image in memory by mode, size and pixels, and one that
    cannot be read by a fixed marker.
    """
    fingerprint = Fingerprint()
    for sample in samples:
        fingerprint.add(sample)
    return fingerprint.hexdigest()


class Fingerprint:
    """The fingerprint of the samples so far: after ``n`` samples, that of exactly these ``n`` in this order.

    Each step hashes the last value with :func:`sample_digest`, so that one can be gone on with.

    Args:
        start: the ``hexdigest()`` to go on from; by default that of no samples.
    """

    def __init__(self, start: str | None = None) -> None:
        self._value = hashlib.sha256().digest() if start is None else bytes.fromhex(start)
        # Several questions usually share an image.
        self._digest_file = lru_cache(_CACHED_FILES)(_digest_file)

    def add(self, sample: Sample) -> str:
        """Take in one more sample; returns a key of its images (see :func:`images_key`)."""
        images = _digest_images(sample, self._digest_file)
        self._value = hashlib.sha256(self._value + _digest(sample, images)).digest()
        return images_key(images)

    def hexdigest(self) -> str:
        """64 hex digits."""
        return self._value.hex()


def sample_digest(sample: Sample, digest_file: Callable[[Path], bytes] | None = None) -> bytes:
    """SHA-256 (32 bytes) over a sample's id, question, answers and images; its task and regions do not count.

    Images count as in :func:`data_fingerprint`; a file that cannot be read raises nothing.

    Args:
        sample: the sample.
        digest_file: maps an image file to the digest of its bytes, to read files in another way; by default each
            is read once per call.
    """
    return _digest(sample, _digest_images(sample, digest_file or _digest_file))


def images_key(digests: Sequence[bytes]) -> str:
    """16 hex digits that samples with the same images in the same order share; empty without an image."""
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16] if digests else ""


def _digest_images(sample: Sample, digest_file: Callable[[Path], bytes]) -> list[bytes]:
    found = []
    for source in sample.images:
        if isinstance(source, Image.Image):
            found.append(_digest_image(source))
        elif isinstance(source, bytes):
            found.append(hashlib.sha256(source).digest())
        else:
            found.append(digest_file(Path(source)))
    return found


def _digest(sample: Sample, images: Sequence[bytes]) -> bytes:
    digest = hashlib.sha256()

    def add(*fields: bytes) -> None:
        for field in fields:
            # Lengths first, so that ("ab", "c") and ("a", "bc") differ.
            digest.update(len(field).to_bytes(8, "big") + field)

    def add_text(*fields: str) -> None:
        # JSON can hold half of a surrogate pair, which plain UTF-8 refuses.
        add(*(field.encode(errors="surrogatepass") for field in fields))

    add_text(sample.id, sample.question)
    add(len(sample.answers).to_bytes(8, "big"))
    add_text(*sample.answers)
    add(len(sample.images).to_bytes(8, "big"))
    add(*images)
    return digest.digest()


def _digest_file(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except (OSError, ValueError):  # the latter for a name that no file can have
        return UNREADABLE


def _digest_image(image: Image.Image) -> bytes:
    try:
        pixels = image.tobytes()
        # All that decides what to_rgb makes of them.
        look = (
            image.mode,
            image.size,
            image.getpalette("RGBA") if image.mode in ("P", "PA") else None,
            image.info.get("transparency"),
            image.getexif().get(ExifTags.Base.Orientation, 1),
        )
    except (OSError, ValueError, SyntaxError):
        return UNREADABLE
    return hashlib.sha256(f"{look}\0".encode() + pixels).digest()

"""The exceptions that a user is meant to read."""

from __future__ import annotations


class CapaProbeError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence: what was given, what was expected, what to do. The command line prints
    it without a traceback and exits with status 2.
    """


class BadImageError(CapaProbeError):
    """One image of one sample cannot be used; the other samples are not affected.

    Attributes:
        image: names the image: its path, or which image of the sample it is.
        sample: id of the sample.
        reason: what is wrong with it, as the message goes on after ``image ... of sample ...``.
    """

    def __init__(self, image: str, sample: str, reason: str) -> None:
        super().__init__(image, sample, reason)  # all three, so that the error can be pickled
        self.image, self.sample, self.reason = image, sample, reason

    def __str__(self) -> str:
        return f"image {self.image} of sample {self.sample!r} {self.reason}."


class OtherRunError(CapaProbeError):
    """A folder holds a run that was made with other settings, or on other data, than the present one."""


class LeftOutWarning(UserWarning):
    """Samples were left out of a run, because an image of theirs cannot be used."""

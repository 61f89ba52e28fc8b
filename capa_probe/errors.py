"""The one exception that a user is meant to read."""

from __future__ import annotations


class CapaProbeError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence: what was given, what was expected, what to do. The command line prints
    it without a traceback and exits with status 2.
    """

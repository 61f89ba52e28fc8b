"""Checks of what the user gives to the counter."""

from __future__ import annotations

from typing import Any

from capa_probe.errors import CapaProbeError


def whole(name: str, value: Any, least: int = 0) -> int:
    """``value`` as an int.

    Raises:
        CapaProbeError: it is no whole number, or below ``least``.
    """
    try:
        number = None if isinstance(value, bool) else value.__index__()  # NumPy's integers have it too
    except (AttributeError, TypeError):
        number = None
    if number is None or number < least:
        raise CapaProbeError(
            f"{name} = {value!r} was given to the cost counter; give a whole number, {least} or more."
        )
    return int(number)


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise CapaProbeError unless ``value`` is one of the names ``allowed``."""
    # By type too: True == 1.
    if not any(value == each and type(value) is type(each) for each in allowed):
        known = ", ".join(map(repr, allowed))
        raise CapaProbeError(f"{name} = {value!r} was given to the cost counter; choose one of {known}.")

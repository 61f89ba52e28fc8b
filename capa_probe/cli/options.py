"""Options that several commands share, and what their texts mean."""

from __future__ import annotations

from typing import Annotated

import typer

from capa_probe.errors import CapaProbeError

Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Use only the first N samples.")]

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start anew instead of going on with the run in the folder.")
]


def parse_tau(text: str) -> float | str:
    """``--tau``: "auto", "relative" or a positive number."""
    if text in ("auto", "relative"):
        return text
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise CapaProbeError(f"--tau {text} was given; give a positive number, relative or auto.")
    return number


def parse_dims(text: str | None) -> list[int] | str | None:
    """``--sink-dims``: "published", or whole numbers with commas between."""
    if text is None or text == "published":
        return text
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise CapaProbeError(
            f"--sink-dims {text} was given; give published, or dimensions with commas between, such as 1415,2533."
        )
    return [int(number) for number in numbers]


def check_eta(eta: float) -> None:
    """Refuse an eta that no layer can be compared with."""
    if not -1 < eta < 1:
        raise CapaProbeError(f"--eta {eta} was given; give a cosine between -1 and 1, such as 0.96.")

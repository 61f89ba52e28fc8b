"""Options that several commands may share, and what their texts mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from capa_probe.errors import CapaProbeError

Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Use only the first N samples.")]

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start anew instead of going on with the run in the folder.")
]

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Name on the Hugging Face hub, or a folder.")]
Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Folder with samples.jsonl; or a folder of images, or a dataset: a folder, file, or name on the hub.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples per forward.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: the checkpoint's own.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU if there is one.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Stop at an image that cannot be used; by default its sample is left out."),
]
_DATA = "Data that are not a folder with samples.jsonl"


def _column(what: str) -> Any:
    return typer.Option(metavar="NAME", help=f"A dataset's column of {what}.", rich_help_panel=_DATA)


Prompt = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="One question for every image, for a folder of images or a dataset without questions.",
        rich_help_panel=_DATA,
    ),
]
ImageColumn = Annotated[str | None, _column("images, image by default")]
QuestionColumn = Annotated[str | None, _column("questions, question by default")]
AnswersColumn = Annotated[str | None, _column("accepted answers")]
IdColumn = Annotated[str | None, _column("ids; by default rows are counted")]
TaskColumn = Annotated[str | None, _column("tasks")]
Split = Annotated[str | None, typer.Option(metavar="NAME", help="A dataset's split.", rich_help_panel=_DATA)]
Config = Annotated[
    str | None, typer.Option(metavar="NAME", help="A dataset's configuration.", rich_help_panel=_DATA)
]


def parse_tau(text: str) -> float | str:
    """``--tau``: "relative", "auto", or a positive number."""
    if text in ("relative", "auto"):
        return text
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise CapaProbeError(f"--tau {text} was given; give a positive number, relative or auto.")
    return number


def parse_shares(text: str, whole: bool = False) -> tuple[float, ...]:
    """``--keep`` of several shares of the visual tokens, largest first; ``whole``: whether 1 is among those allowed."""
    try:
        shares = tuple(sorted({float(part) for part in text.split(",")}, reverse=True))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share < 1 or (whole and share == 1) for share in shares):
        allowed = "in (0, 1]" if whole else "between 0 and 1"
        raise CapaProbeError(
            f"--keep {text} was given; give shares {allowed} with commas between, such as 0.5,0.25."
        )
    return shares


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


def parse_layers(text: str, option: str = "--layers") -> list[int]:
    """``--layers``: whole numbers and ranges (both ends included) with commas between, such as ``2-5,7``."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        ends = (first, last if dash else first)
        if not all(end.isdecimal() and len(end) <= 4 for end in ends) or int(ends[0]) > int(ends[1]):
            raise CapaProbeError(
                f"{option} {text} was given; give layers or rising ranges with commas between, such as 2-5,7."
            )
        layers += range(int(ends[0]), int(ends[1]) + 1)
    return layers


def parse_keep(text: str) -> float | int | tuple[float | int, ...]:
    """``--keep``: a share, or a whole number of tokens above 1; or several, with commas between."""
    keeps = []
    for part in text.split(","):
        try:
            keeps.append(int(part) if part.strip().isdecimal() else float(part))
        except ValueError:
            raise CapaProbeError(
                f"--keep {text} was given; give a share of the visual tokens in (0, 1], such as 0.25, or a whole "
                "number of them above 1; several for several layers, with commas between."
            ) from None
    return keeps[0] if len(keeps) == 1 else tuple(keeps)


def check_eta(eta: float) -> None:
    """Refuse an eta that no layer can be compared with."""
    if not -1 < eta < 1:
        raise CapaProbeError(f"--eta {eta} was given; give a cosine between -1 and 1, such as 0.96.")

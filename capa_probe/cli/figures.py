"""``capa-probe figures``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capa_probe.cli.app import app
from capa_probe.errors import CapaProbeError


@app.command()
def figures(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders that demo, profile, confirm or depth wrote, of each model at most one of each kind; folders "
            "of demo models, for how they were trained.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the figures.")] = Path("runs/figures"),
    only: Annotated[
        str, typer.Option(metavar="NAMES", help="Only these figures, with commas between; by default all.")
    ] = "",
    pdf: Annotated[bool, typer.Option("--pdf", help="Write PDF files beside the PNG and SVG files.")] = False,
) -> None:
    """Draw every figure that the runs allow, as PNG and SVG, several models side by side; nothing is computed anew.

    Example: `capa-probe figures runs/demo runs/confirm runs/depth data/demo-lvlm --out runs/figures`
    """
    from capa_probe.console import status

    if out.exists() and not out.is_dir():
        raise CapaProbeError(f"--out {out} was given, which is a file; give a folder.")
    with status("reading"):
        from capa_probe.figure_set import collect, needed, write_set
        from capa_probe.figures.registry import entries_named

        entries = entries_named(only)
        collected = collect(runs, entries)
    with status("drawing"):
        left_out = list(collected.left_out)
        files = list(write_set(collected.models, out, entries, pdf=pdf, left_out=left_out))
    for file in files:
        typer.echo(file)
    if not files:
        raise CapaProbeError(" ".join(left_out) or needed(entries))
    for sentence in left_out:
        typer.echo(sentence, err=True)

"""``capa-probe report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capa_probe.cli.app import app


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of finished profiles, shown side by side; with them, folders of confirm and depth, and files "
            "of run --json, of the same models.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The file to write.  [default: report.html in the first profile]",
            show_default=False,
        ),
    ] = None,
    examples: Annotated[
        int, typer.Option(min=0, metavar="N", help="Show at most N of the examples that each profile kept.")
    ] = 4,
) -> None:
    """Write what runs found as one interactive HTML file that needs nothing beside it and loads nothing.

    Example: `capa-probe report runs/demo runs/confirm --out demo.html`
    """
    from capa_probe.console import status

    with status("writing the report"):
        from capa_probe.report import write_report

        file = write_report(runs, out, n_examples=examples)
    typer.echo(file)

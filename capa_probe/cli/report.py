"""``capa-probe report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capa_probe.cli.app import app


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished profile.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The file to write.  [default: report.html in RUN]", show_default=False
        ),
    ] = None,
    examples: Annotated[
        int, typer.Option(min=0, metavar="N", help="Show at most N of the examples that the run kept.")
    ] = 4,
) -> None:
    """Write a run's findings, figures, examples and settings as one HTML file that needs nothing beside it.

    Example: `capa-probe report runs/demo --out demo.html`
    """
    from capa_probe.console import status

    with status("writing the report"):
        from capa_probe.report import write_report

        file = write_report(run, out, n_examples=examples)
    typer.echo(file)

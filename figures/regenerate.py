"""Draws every figure of a profile again, with the functions that drew them the first time.

Example: python figures/regenerate.py runs/demo --out figures/demo --pdf
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capa_probe.cli.one_line import one_line_errors
from capa_probe.cli.options import check_eta, parse_tau
from capa_probe.figures import save
from capa_probe.findings import draw, find, read_settings
from capa_probe.tables import LayerProfile


def regenerate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished profile.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the figures.")],
    tau: Annotated[
        str | None, typer.Option(help="Threshold on sink strength; by default the run's own.")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="Threshold on FFN cosine; by default the run's own.")
    ] = None,
    pdf: Annotated[bool, typer.Option("--pdf", help="Write PDF files beside the PNG files.")] = False,
) -> None:
    """Draw every figure of the profile in RUN again.

    Example: python figures/regenerate.py runs/demo --out figures/demo --pdf
    """
    with one_line_errors():
        prof = LayerProfile.load(run)
        settings = read_settings(run)
        if tau is not None:
            settings["tau"] = parse_tau(tau)
        if eta is not None:
            check_eta(eta)
            settings["eta"] = eta
        findings = find(prof, **settings)
        for name, figure in draw(prof, findings).items():
            for file in save(figure, out / f"{name}.png", pdf=pdf):
                typer.echo(file)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(regenerate)

if __name__ == "__main__":
    app()

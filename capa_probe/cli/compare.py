"""``capa-probe compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capa_probe.cli.app import app

NAME = "comparison"


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders that demo, profile, confirm or depth wrote; of each model at most one of each kind.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder for comparison.md, comparison-short.md and comparison.csv."),
    ] = Path("runs") / NAME,
) -> None:
    """Put models side by side: depth, redundant layers, sinks, accuracy kept, FLOPs, and every claim of the paper.

    Example: `capa-probe compare runs/demo runs/confirm runs/other-profile runs/other-confirm`
    """
    from capa_probe.console import status

    with status("reading"):
        from capa_probe.comparison import brief, differences, page, read_runs
        from capa_probe.comparison import compare as table_of
        from capa_probe.files import replace

        models = read_runs(runs)
        table = table_of(models)
    out.mkdir(parents=True, exist_ok=True)
    files = [
        replace(out / f"{NAME}.md", lambda file: file.write_text(page(table), encoding="utf-8")),
        replace(out / f"{NAME}-short.md", lambda file: file.write_text(brief(table), encoding="utf-8")),
        replace(out / f"{NAME}.csv", lambda file: table.to_csv(file, index=False)),
    ]
    for model in models:
        typer.echo(f"{model.name} ({model.facts['family']}): {', '.join(model.folders)}")
    for row in differences(table).itertuples():
        typer.echo(f"{row.row} ({row.part}): holds on {row.holds}, does not hold on {row.fails}")
    for file in files:
        typer.echo(f"  {file}")

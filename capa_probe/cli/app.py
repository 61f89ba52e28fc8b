"""The ``capa-probe`` command itself; a command is a file beside this one, named in ``capa_probe/cli/__init__.py``."""

from __future__ import annotations

from typing import Annotated

import typer

from capa_probe.__about__ import __version__
from capa_probe.cli.one_line import Commands

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Layer-by-layer measurements of vision-language models: attention sinks, FFN redundancy.",
)


def main() -> None:
    """Entry point of the ``capa-probe`` command."""
    app(prog_name="capa-probe")


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"capa-probe {__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())

"""Everything a user can get wrong, as one line on stderr with exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from capa_probe.errors import CapaProbeError

#: The base of every mistake on the command line, by its public subclass.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """Reports everything a user can get wrong as one line on stderr, with exit status 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Parse and run; exits, as usual, unless ``standalone_mode`` is off."""
        parent = super().main
        if not standalone_mode:
            return parent(args, prog_name, complete_var, False, windows_expand_args, **extra)
        try:
            status = parent(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except _UsageError as error:
            message = getattr(error, "format_message", lambda: str(error))()
            message = message.replace("Value error, ", "")  # said by a check of types, before its own words
            _fail(f"{message.rstrip('.')}; see capa-probe --help.")
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with one_line_errors():
            return super().invoke(ctx)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input becomes one line on stderr and exit status 2, Ctrl-C one line and 130; bugs keep their traceback."""
    try:
        yield
    except BrokenPipeError:  # the reader of our output went away, as with "| head"
        raise
    except CapaProbeError as error:
        _fail(str(error))
    except OSError as error:
        reason = error.strerror or str(error)
        _fail(f"{error.filename}: {reason}." if error.filename else f"{reason}.")
    except KeyboardInterrupt as interrupt:
        typer.echo("; ".join(["interrupted", *map(str, interrupt.args)]), err=True)
        raise SystemExit(130) from None


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    typer.echo(f"error: {line}", err=True)
    raise SystemExit(2)

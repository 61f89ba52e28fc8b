"""``capa-probe``: the command line. Heavy packages are imported only once the arguments are known to be good."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from capa_probe.__about__ import __version__
from capa_probe.errors import CapaProbeError

if TYPE_CHECKING:
    from capa_probe.samples import Sample

#: The base of every mistake on the command line, by its public subclass.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
DEMO_BATCH_SIZE = 8


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


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Layer-by-layer measurements of vision-language models: attention sinks, FFN redundancy.",
)

Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Use only the first N samples.")]


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


@app.command()
def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name on the Hugging Face hub, or a folder.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder with samples.jsonl and images.")],
    out: Annotated[Path, typer.Option(metavar="RUN", help="New folder for tables and figures.")],
    limit: Limit = None,
    steps: Annotated[int, typer.Option(min=0, help="Decode steps to follow after prefill.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward.")] = 1,
    rows: Annotated[
        Literal["all", "visual", "none"] | None,
        typer.Option(help="Token rows to keep.  [default: all; visual with --steps]", show_default=False),
    ] = None,
    probes: Annotated[
        str, typer.Option(help="default (all but removal_effect), all, or names with commas between.")
    ] = "default",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: the checkpoint's own.")
    ] = "auto",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU if there is one.")
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    tau: Annotated[
        str, typer.Option(help="Threshold on sink strength: a number, relative, or auto (20 where it fits).")
    ] = "auto",
    eta: Annotated[float, typer.Option(help="Threshold on the FFN cosine.")] = 0.96,
    sink_dims: Annotated[
        str | None,
        typer.Option(
            help="Dimensions for sink strength: numbers with commas between, or published. Default: all."
        ),
    ] = None,
) -> None:
    """Profile a model on your own samples: tables, figures and a summary.

    Example: `capa-probe profile llava-hf/llava-1.5-7b-hf DATA --out runs/llava --limit 200`
    """
    threshold = parse_tau(tau)
    check_eta(eta)
    dims = parse_dims(sink_dims)
    samples = load_data(data, limit, out)
    _run(
        model,
        samples,
        out,
        tau=threshold,
        eta=eta,
        device=device,
        load={"dtype": dtype, "revision": revision},
        steps=steps,
        batch_size=batch_size,
        rows=rows,
        sink_dims=dims,
        probes=probes if probes in ("default", "all") else [name.strip() for name in probes.split(",")],
    )


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for tables and figures; an earlier demo is replaced.")
    ] = Path("runs/demo"),
    limit: Limit = None,
) -> None:
    """Profile the small trained model that comes with capa_probe, on its own test questions.

    Example: `capa-probe demo --limit 50`
    """
    from capa_probe.console import status
    from capa_probe.demo import demo_data_path, demo_model_path

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk
    model, data = demo_model_path(), demo_data_path("test")
    with status("starting"):
        from capa_probe.jobs import clear_demo
    clear_demo(out, model)
    samples = load_data(data, limit, out)
    _run(str(model), samples, out, batch_size=DEMO_BATCH_SIZE)


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


def load_data(folder: Path, limit: int | None, out: Path) -> list[Sample]:
    """The samples of a data folder, and a look at where the profile goes: both take no time, and come first."""
    from capa_probe.samples import load_samples
    from capa_probe.writing import check_output

    samples = load_samples(folder, limit)
    check_output(out)
    return samples


def _run(*args: Any, **kwargs: Any) -> None:
    from capa_probe.console import status

    with status("starting"):  # importing PyTorch and transformers takes seconds
        from capa_probe.jobs import run
    run(*args, **kwargs)


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    typer.echo(f"error: {line}", err=True)
    raise SystemExit(2)

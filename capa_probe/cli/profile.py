"""``capa-probe profile``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from capa_probe.cli.app import app
from capa_probe.cli.options import (
    AnswersColumn,
    BatchSize,
    Config,
    Data,
    Device,
    Dtype,
    IdColumn,
    ImageColumn,
    Limit,
    ModelName,
    Overwrite,
    Prompt,
    QuestionColumn,
    Revision,
    Split,
    Strict,
    TaskColumn,
    check_eta,
    parse_dims,
    parse_tau,
)
from capa_probe.errors import CapaProbeError

if TYPE_CHECKING:
    from capa_probe.samples import Sample


@app.command()
def profile(
    model: ModelName,
    data: Data,
    out: Annotated[
        Path,
        typer.Option(metavar="RUN", help="Folder for tables and figures; a run that was stopped goes on."),
    ],
    limit: Limit = None,
    steps: Annotated[int, typer.Option(min=0, help="Decode steps to follow after prefill.")] = 0,
    batch_size: BatchSize = 1,
    rows: Annotated[
        Literal["all", "visual", "none"] | None,
        typer.Option(help="Token rows to keep.  [default: all; visual with --steps]", show_default=False),
    ] = None,
    probes: Annotated[
        str, typer.Option(help="default (all but removal_effect), all, or names with commas between.")
    ] = "default",
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
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
    strict: Strict = False,
    overwrite: Overwrite = False,
    prompt: Prompt = None,
    image_column: ImageColumn = None,
    question_column: QuestionColumn = None,
    answers_column: AnswersColumn = None,
    id_column: IdColumn = None,
    task_column: TaskColumn = None,
    split: Split = None,
    config: Config = None,
) -> None:
    """Profile a model on your own samples: tables, figures and a summary.

    Example: `capa-probe profile llava-hf/llava-1.5-7b-hf DATA --out runs/llava --limit 200`
    """
    threshold = parse_tau(tau)
    check_eta(eta)
    dims = parse_dims(sink_dims)
    samples = load_data(
        data,
        limit,
        out,
        prompt=prompt,
        image=image_column,
        question=question_column,
        answers=answers_column,
        id=id_column,
        task=task_column,
        split=split,
        config=config,
    )
    start(
        model,
        samples,
        out,
        tau=threshold,
        eta=eta,
        device=device,
        load={"dtype": dtype, "revision": revision},
        limit=limit,
        steps=steps,
        batch_size=batch_size,
        rows=rows,
        sink_dims=dims,
        strict=strict,
        overwrite=overwrite,
        probes=probes if probes in ("default", "all") else [name.strip() for name in probes.split(",")],
    )


def load_data(data: str, limit: int | None, out: Path | None, **options: Any) -> Sequence[Sample]:
    """The samples, and a look at where a profile goes, if one does: both take little time, and come first."""
    from huggingface_hub import is_offline_mode

    from capa_probe.run_folder import check_output
    from capa_probe.samples import SAMPLES_FILE, load_samples

    if out is not None:
        check_output(out)
    folder = Path(data).expanduser()
    if (
        out is not None
        and folder.is_dir()
        and not (folder / SAMPLES_FILE).is_file()
        and out.resolve().is_relative_to(folder.resolve())
    ):
        raise CapaProbeError(
            f"--out {out} lies in the data folder {data}, where its files would be taken for data; give another --out."
        )
    # The first rows of a dataset on the hub need not wait for all the others.
    fetched = not folder.exists() and not is_offline_mode()
    return load_samples(data, limit, streaming=fetched and limit is not None, **options)


def start(*args: Any, **kwargs: Any) -> None:
    """The job itself (:func:`capa_probe.jobs.run`)."""
    from capa_probe.console import status

    with status("starting"):  # importing PyTorch and transformers takes seconds
        from capa_probe.jobs import run
    run(*args, **kwargs)

"""``capa-probe calibrate``."""

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
    Prompt,
    QuestionColumn,
    Revision,
    Split,
    Strict,
    TaskColumn,
    parse_layers,
)
from capa_probe.cli.profile import load_data

if TYPE_CHECKING:
    from capa_probe.pruning.ffn import HadamardFFN
    from capa_probe.samples import Sample


@app.command()
def calibrate(
    model: ModelName,
    data: Data,
    layers: Annotated[
        str, typer.Option(metavar="LAYERS", help="Decoder layers, counted from 0, such as 2-5,7.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Safetensors file for the factors; a calibration that was stopped goes on."
        ),
    ],
    x: Annotated[
        Literal["residual", "normed"],
        typer.Option("--x", help="What is scaled: the residual stream entering the FFN block, or its norm."),
    ] = "residual",
    limit: Limit = None,
    batch_size: BatchSize = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    strict: Strict = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew instead of going on with the calibration in FILE.")
    ] = False,
    prompt: Prompt = None,
    image_column: ImageColumn = None,
    question_column: QuestionColumn = None,
    answers_column: AnswersColumn = None,
    id_column: IdColumn = None,
    task_column: TaskColumn = None,
    split: Split = None,
    config: Config = None,
) -> None:
    """Fit the Hadamard approximation of FFNs (CAPA) to the visual tokens of your samples.

    Example: `capa-probe calibrate llava-hf/llava-1.5-7b-hf DATA --layers 2-5,22-29 --out alpha.safetensors --limit 500`
    """
    chosen = parse_layers(layers)
    samples = load_data(
        data,
        limit,
        None,
        prompt=prompt,
        image=image_column,
        question=question_column,
        answers=answers_column,
        id=id_column,
        task=task_column,
        split=split,
        config=config,
    )
    fitted = _run(
        model,
        samples,
        out,
        device,
        {"dtype": dtype, "revision": revision},
        layers=chosen,
        x=x,
        limit=limit,
        batch_size=batch_size,
        strict=strict,
        overwrite=overwrite,
    )
    typer.echo("layer      R²")
    for layer, r2 in fitted.r2.items():
        typer.echo(f"{layer:5d}  {r2:6.4f}")
    typer.echo(f"{fitted.n_tokens:,} visual tokens of {fitted.n_samples:,} samples, in {out}")


def _run(
    model: str, samples: Sequence[Sample], out: Path, device: str, load: dict[str, Any], **settings: Any
) -> HadamardFFN:
    from capa_probe.console import quiet_transformers, status

    with status("starting"):  # importing PyTorch and transformers takes seconds
        import warnings

        from capa_probe.errors import LeftOutWarning
        from capa_probe.jobs import device_map
        from capa_probe.lvlm import HookedLVLM
        from capa_probe.pruning.calibrate import calibrate_hadamard
        from capa_probe.pruning.calibration_run import check_output

    check_output(out)  # loading a model takes longer
    with status(f"loading {model}"), quiet_transformers():
        lvlm = HookedLVLM.from_pretrained(model, device_map=device_map(device), **load)
    try:
        with quiet_transformers(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", LeftOutWarning)
            fitted = calibrate_hadamard(lvlm, samples, out=out, **settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"the calibration in {out} is not finished; the same command goes on from here"
        ) from None
    for warning in caught:
        typer.echo(f"warning: {warning.message}", err=True)
    return fitted

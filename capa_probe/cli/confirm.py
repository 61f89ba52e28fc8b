"""``capa-probe confirm``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capa_probe.cli.app import app
from capa_probe.cli.options import (
    AnswersColumn,
    Config,
    Data,
    Device,
    Dtype,
    IdColumn,
    ImageColumn,
    ModelName,
    Overwrite,
    Prompt,
    QuestionColumn,
    Revision,
    Split,
    Strict,
    TaskColumn,
    check_eta,
    parse_layers,
    parse_shares,
    parse_tau,
)
from capa_probe.cli.profile import load_data

if TYPE_CHECKING:
    from capa_probe.benchmark.confirm import Confirmation
    from capa_probe.samples import Sample

#: Rows of a data set on the hub that are fetched, for each sample that is tested.
ROWS_TO_DRAW_FROM = 8


@app.command()
def confirm(
    model: ModelName,
    data: Data,
    out: Annotated[
        Path, typer.Option(metavar="RUN", help="Folder for the tables; a run that was stopped goes on.")
    ],
    experiments: Annotated[
        str,
        typer.Option(metavar="NAMES", help="all, or numbers or names with commas between, such as 1,budget."),
    ] = "all",
    limit: Annotated[
        int, typer.Option(min=1, metavar="N", help="Samples to test on, as many of each task.")
    ] = 210,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Other samples, for FFN cosines and Hadamard factors. By default a folder named calibration beside "
            "DATA; where there is none, a quarter of DATA's images.",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS", help="Pruning layers, such as 5,12,16. By default the model's three stages."
        ),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            metavar="SHARES",
            # The column of help breaks lines at spaces only.
            help="Budgets of experiment 3, with commas between.  [default: 1, 0.75, 0.5, 0.25, 0.1, 0.05]",
            show_default=False,
        ),
    ] = "1,0.75,0.5,0.25,0.1,0.05",
    draws: Annotated[
        int, typer.Option(min=1, metavar="N", help="How often a random choice of tokens is repeated.")
    ] = 3,
    knockout_samples: Annotated[
        int, typer.Option(min=1, metavar="N", help="Samples of experiment 2, spread over tasks and images.")
    ] = 32,
    step_samples: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Samples of experiment 6, half of which ask for a description."
        ),
    ] = 64,
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Generation steps that experiment 6 follows.")
    ] = 16,
    tau: Annotated[
        str, typer.Option(help="Threshold on sink strength: a number, relative, or auto (20 where it fits).")
    ] = "auto",
    eta: Annotated[float, typer.Option(help="Threshold on the FFN cosine.")] = 0.96,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples, and of all that is random.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
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
    """Test whether the findings of the CAPA paper hold on a model and your samples.

    Example: `capa-probe confirm llava-hf/llava-1.5-7b-hf DATA --out runs/confirm --experiments 1,3`
    """
    from capa_probe.benchmark.experiments import choose
    from capa_probe.benchmark.store import check_output

    choose(experiments)
    check_eta(eta)
    settings = {
        "layers": None if layers is None else tuple(parse_layers(layers)),
        "keeps": parse_shares(keep, whole=True),
        "draws": draws,
        "knockout_samples": knockout_samples,
        "step_samples": step_samples,
        "steps": steps,
        "tau": parse_tau(tau),
        "eta": eta,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    check_output(out)
    columns = {
        "prompt": prompt,
        "image": image_column,
        "question": question_column,
        "answers": answers_column,
        "id": id_column,
        "task": task_column,
        "split": split,
        "config": config,
    }
    # Of a data set on the hub not all is fetched, but enough to draw from.
    rows = None if Path(data).expanduser().exists() else ROWS_TO_DRAW_FROM * limit
    samples = load_data(data, rows, None, **columns)
    others = calibration or _beside(data)
    # What says how to read DATA says so of its neighbour too.
    aside = None if others is None else load_data(others, None, None, **columns)
    found = _run(
        model,
        samples,
        aside,
        out,
        device,
        {"dtype": dtype, "revision": revision},
        settings,
        experiments=experiments,
        limit=limit,
        strict=strict,
        overwrite=overwrite,
    )
    _show(found, out)


def _beside(data: str) -> str | None:
    """The calibration split of data such as ShapesQA's, whose splits are folders side by side."""
    from capa_probe.samples import SAMPLES_FILE

    folder = Path(data).expanduser().resolve()
    neighbour = folder.parent / "calibration"
    is_split = (folder / SAMPLES_FILE).is_file() and (neighbour / SAMPLES_FILE).is_file()
    return str(neighbour) if is_split and neighbour != folder else None


def _run(
    model: str,
    samples: Sequence[Sample],
    calibration: Sequence[Sample] | None,
    out: Path,
    device: str,
    load: dict[str, Any],
    settings: dict[str, Any],
    **options: Any,
) -> Confirmation:
    from capa_probe.console import quiet_transformers, status

    with status("starting"):  # importing PyTorch and transformers takes seconds
        import warnings

        from capa_probe.benchmark.confirm import confirm as run
        from capa_probe.benchmark.setup import Settings
        from capa_probe.errors import LeftOutWarning
        from capa_probe.jobs import device_map
        from capa_probe.lvlm import HookedLVLM

    with status(f"loading {model}"), quiet_transformers():
        lvlm = HookedLVLM.from_pretrained(model, device_map=device_map(device), **load)
    try:
        with quiet_transformers(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", LeftOutWarning)
            found = run(lvlm, samples, out, calibration, settings=Settings(**settings), **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"the confirmation in {out} is not finished; the same command goes on from there"
        ) from None
    for warning in caught:
        if issubclass(warning.category, LeftOutWarning):
            typer.echo(f"warning: {warning.message}", err=True)
    return found


def _show(found: Confirmation, out: Path) -> None:
    from rich.console import Console

    from capa_probe.console import claims_lines

    console = Console(highlight=False)
    # A file is not read at the width of a terminal.
    width = console.width if console.is_terminal else None
    for line in claims_lines(found.claims, width):
        console.print(line, soft_wrap=width is None)
    said = " ".join(found.claims["numbers"])
    for name, table in found.tables.items():
        if name.endswith("_notes"):
            for note in table["note"]:
                if note not in said:
                    console.print(f"{name.removesuffix('_notes')}: {note}", markup=False)
    console.print(f"\nTables in {out}/tables, manifest.json beside them", markup=False, soft_wrap=True)

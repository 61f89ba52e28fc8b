"""``capa-probe depth``."""

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
    parse_layers,
    parse_shares,
)
from capa_probe.cli.profile import load_data
from capa_probe.errors import CapaProbeError

if TYPE_CHECKING:
    import pandas as pd

    from capa_probe.samples import Sample

#: What the figure is called, in the run's folder.
FIGURE = "figures/depth"


@app.command()
def depth(
    model: ModelName,
    data: Data,
    out: Annotated[
        Path,
        typer.Option(metavar="RUN", help="Folder for tables and figure; a run that was stopped goes on."),
    ],
    limit: Annotated[
        int, typer.Option(min=1, metavar="N", help="Samples to ask, as many of each task.")
    ] = 210,
    keep: Annotated[
        str,
        typer.Option(metavar="SHARES", help="Shares of the visual tokens that stay, with commas between."),
    ] = "0.5,0.25,0.1,0.05",
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS",
            help="From which layers on they stay, such as 2,8,16. By default 2, L/4 and L/2 of L layers.",
        ),
    ] = None,
    score: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="What else chooses them, beside chance: some of contribution, attention, value_norm, removal_effect, "
            "with commas between; or all.",
        ),
    ] = "",
    draws: Annotated[int, typer.Option(min=1, help="How often a random choice is repeated.")] = 3,
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
    """Measure up to which layer a model looks at the image, and how many visual tokens it can spare.

    Example: `capa-probe depth llava-hf/llava-1.5-7b-hf DATA --out runs/depth --limit 200`
    """
    from capa_probe.benchmark.store import check_output

    settings = {
        "limit": limit,
        "keeps": parse_shares(keep),
        "layers": None if layers is None else parse_layers(layers),
        "scores": _parse_scores(score),
        "draws": draws,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "strict": strict,
        "overwrite": overwrite,
    }
    check_output(out)
    samples = load_data(
        data,
        None,
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
    tables, n_layers = _run(model, samples, out, device, {"dtype": dtype, "revision": revision}, settings)
    _show(tables, n_layers, out)


def _run(
    model: str,
    samples: Sequence[Sample],
    out: Path,
    device: str,
    load: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[dict[str, pd.DataFrame], int]:
    from capa_probe.console import quiet_transformers, status

    with status("starting"):  # importing PyTorch and transformers takes seconds
        import warnings

        from capa_probe.benchmark.depth import measure_depth
        from capa_probe.errors import LeftOutWarning
        from capa_probe.jobs import device_map
        from capa_probe.lvlm import HookedLVLM

    with status(f"loading {model}"), quiet_transformers():
        lvlm = HookedLVLM.from_pretrained(model, device_map=device_map(device), **load)
    try:
        with quiet_transformers(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", LeftOutWarning)
            tables = measure_depth(lvlm, samples, out, **settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"the run in {out} is not finished; the same command goes on from there"
        ) from None
    for warning in caught:
        if issubclass(warning.category, LeftOutWarning):
            typer.echo(f"warning: {warning.message}", err=True)
    return tables, lvlm.n_layers


def _show(tables: dict[str, pd.DataFrame], n_layers: int, out: Path) -> None:
    """Draw the figure, and print the verdict and where everything lies."""
    from rich.console import Console

    from capa_probe.benchmark.depth_verdict import sentences
    from capa_probe.console import depth_table, status
    from capa_probe.figures.depth import depth as draw
    from capa_probe.figures.save import save

    with status("drawing"):
        files = save(draw(tables), out / FIGURE, svg=True)
    console = Console(highlight=False)
    console.print(depth_table(tables["depth"]))
    for sentence in (*sentences(tables["depth"], n_layers), *tables["depth_notes"]["note"]):
        console.print(sentence, markup=False, soft_wrap=True)
    console.print(f"\nTables in {out}/tables, manifest.json beside them", markup=False, soft_wrap=True)
    for file in files:
        console.print(f"  {file}", markup=False, soft_wrap=True)


def _parse_scores(text: str) -> tuple[str, ...]:
    from capa_probe.pruning.capa import SCORES

    known = tuple(score for score in SCORES if score != "random")
    names = known if text == "all" else tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in known:
            raise CapaProbeError(f"--score {text} was given; give some of {', '.join(known)}, or all.")
    return tuple(dict.fromkeys(names))

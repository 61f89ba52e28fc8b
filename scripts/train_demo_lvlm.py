"""Train a demo model, from a seed.

python scripts/train_demo_lvlm.py --family llava

writes data/demo-lvlm, measured on data/shapesqa; the other families are trained on the world ``wide``:

python scripts/make_shapesqa.py --world wide --out data/shapesqa-wide
python scripts/train_demo_lvlm.py --family qwen2.5-vl --start-from data/demo-lvlm

Interrupted, it goes on from its last checkpoint when run again, to the very same weights. With ``--start-from`` the
decoder starts from LLaVA's trained one, which saves most of the symbols stage; without it, from random weights.
From random weights, LLaVA's takes about two and a half hours on one or two CPU cores.
"""

from __future__ import annotations

import json
import os
import platform
from enum import StrEnum
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer

from capa_probe.demo import demo_data_path
from capa_probe.samples import load_samples
from demo_training.architecture import Parts
from demo_training.cpu_attention import attention_in_float32
from demo_training.evaluation import evaluate, mean_of, misses_bar
from demo_training.export import export
from demo_training.findings import findings
from demo_training.loop import run_stage
from demo_training.recipe import NAMES
from demo_training.recipes import RECIPES, warmed
from demo_training.stages import build_stage
from demo_training.warm_start import start_from as start_decoder_from

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Stages = StrEnum("Stages", [(name, name) for name in NAMES])
Families = StrEnum("Families", [(name, name) for name in RECIPES])
_LLAVA = Families("llava")


@app.command()
def main(
    family: Annotated[Families, typer.Option(help="Whose architecture, processor and prompt form.")] = _LLAVA,
    work: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints and the log; runs/train-FAMILY by default.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the finished model, replaced if it exists; in data/ by default."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with the splits it is measured on; the shipped ones by default."),
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the trained LLaVA demo model whose decoder another family's starts from."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides initial weights and data.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[
        int,
        typer.Option(
            help="Processes that draw batches ahead; worth it beside a GPU. The weights do not depend on it."
        ),
    ] = 0,
    until: Annotated[
        Stages | None, typer.Option(help="Stop after this stage; nothing is written to --out.")
    ] = None,
) -> None:
    """Train the demo model stage by stage, measure it on the test split, and write it with its model card."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = RECIPES[family.value]
    if start_from:
        if recipe.family.name == "llava":
            raise typer.BadParameter(
                "--start-from was given for llava, whose decoder it names; leave it out."
            )
        recipe = warmed(recipe)
    work = work or Path(f"runs/train-{family.value}")
    out = out or Path("data") / recipe.family.folder
    # Before hours of training, since they may not be there.
    samples = {
        split: load_samples(data / split if data else demo_data_path(split, recipe.world.name))
        for split in ("test", "calibration")
    }
    torch.manual_seed(seed)
    parts = Parts(recipe)
    if start_from:
        start_decoder_from(parts, start_from)
    parts.to(device)
    with attention_in_float32(parts.decoder):
        for name in recipe.stages:
            run_stage(build_stage(name, parts, seed, torch.device(device)), work, typer.echo, workers=workers)
            if until and name == until.value:
                return

    model, processor = parts.lvlm.eval(), recipe.family.processor(recipe.world)
    results = evaluate(model, processor, samples["test"], recipe.world)
    for task in recipe.world.tasks:
        typer.echo(
            f"{task:14} {results[task]['accuracy']:.3f} "
            f"[{results[task]['low']:.3f}, {results[task]['high']:.3f}]  blank {results[task]['blank']:.3f}"
        )
    for kind, tasks in (("plain", recipe.world.plain_tasks), ("two-hop", recipe.world.two_hop_tasks)):
        typer.echo(f"mean of the {kind} tasks {mean_of(results, tasks):.3f}")
    misses = list(misses_bar(results, recipe.world))
    for miss in misses:
        typer.echo(f"below the bar: {miss}", err=True)
    facts = {
        "accuracy": results,
        "seed": seed,
        "machine": _machine(device),
        "start_from": str(start_from) if start_from else None,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "profile": findings(model, processor, samples["calibration"]),
    }
    log = [json.loads(line) for line in (work / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    export(model, processor, out, log, facts, recipe)
    typer.echo(f"wrote {out}")
    raise typer.Exit(1 if misses else 0)


def _machine(device: str) -> str:
    if device == "cuda":
        return f"one {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    counted = "one thread" if threads == 1 else f"{threads} threads"
    return f"{counted} of a CPU ({platform.machine()}), torch {torch.__version__.split('+')[0]}"


if __name__ == "__main__":
    app()

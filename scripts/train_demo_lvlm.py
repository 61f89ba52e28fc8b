"""Train the demo model that is shipped in data/demo-lvlm, from a seed.

python scripts/train_demo_lvlm.py --work runs/train-demo

Interrupted, it goes on from the last checkpoint when run again, to the same weights. About an hour on two CPU cores.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer

from demo_training.architecture import Parts
from demo_training.loop import run_stage
from demo_training.stages import NAMES, build_stage

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Stages = StrEnum("Stages", [(name, name) for name in NAMES])


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Folder for checkpoints and the log.")] = Path("runs/train-demo"),
    seed: Annotated[int, typer.Option(help="Decides initial weights and data.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    until: Annotated[Stages | None, typer.Option(help="Stop after this stage.")] = None,
) -> None:
    """Train the demo model, stage by stage."""
    place = torch.device(
        "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
    )
    torch.manual_seed(seed)
    parts = Parts().to(place)
    for name in NAMES:
        run_stage(build_stage(name, parts, seed, place), work, typer.echo)
        if until and name == until.value:
            return


if __name__ == "__main__":
    app()

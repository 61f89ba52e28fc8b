"""Write the shipped ShapesQA splits anew: data/shapesqa/{calibration,test}.

python scripts/make_shapesqa.py --out data/shapesqa --world rich
"""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from capa_probe.demo.dataset import SHIPPED_IMAGES, write_folder
from capa_probe.demo.worlds import WORLDS

Worlds = StrEnum("Worlds", [(name, name) for name in WORLDS])


def main(
    out: Annotated[Path, typer.Option(help="Folder for the splits.")] = Path("data/shapesqa"),
    world: Annotated[Worlds, typer.Option(help="What is drawn and asked.")] = Worlds.rich,
) -> None:
    """Write the calibration and the test split."""
    for split in SHIPPED_IMAGES[world.value]:
        shutil.rmtree(out / split, ignore_errors=True)
        typer.echo(f"{out / split}: {write_folder(split, out / split, world=WORLDS[world.value])} questions")


if __name__ == "__main__":
    typer.run(main)

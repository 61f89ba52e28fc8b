"""Write the shipped ShapesQA splits anew: data/shapesqa/{calibration,test}.

python scripts/make_shapesqa.py --out data/shapesqa
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from capa_probe.demo.dataset import SHIPPED_IMAGES, write_folder


def main(out: Annotated[Path, typer.Option(help="Folder for the splits.")] = Path("data/shapesqa")) -> None:
    """Write the calibration and the test split."""
    for split in SHIPPED_IMAGES:
        shutil.rmtree(out / split, ignore_errors=True)
        typer.echo(f"{out / split}: {write_folder(split, out / split)} questions")


if __name__ == "__main__":
    typer.run(main)

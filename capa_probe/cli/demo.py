"""``capa-probe demo``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from capa_probe.cli.app import app
from capa_probe.cli.options import Limit, Overwrite
from capa_probe.cli.profile import load_data, start

DEMO_BATCH_SIZE = 8


@app.command()
def demo(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for tables and figures. A run that was stopped goes on, another demo is replaced."
        ),
    ] = Path("runs/demo"),
    limit: Limit = None,
    overwrite: Overwrite = False,
) -> None:
    """Profile the small trained model that comes with capa_probe, on its own test questions.

    Example: `capa-probe demo --limit 50`
    """
    from capa_probe.demo import demo_data_path, demo_model_path

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk
    model, data = demo_model_path(), demo_data_path("test")
    samples = load_data(str(data), limit, out)
    start(
        str(model),
        samples,
        out,
        own_model=model,
        overwrite=overwrite,
        limit=limit,
        batch_size=DEMO_BATCH_SIZE,
    )

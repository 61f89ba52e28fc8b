"""``capa-probe demo``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from capa_probe.cli.app import app
from capa_probe.cli.options import Limit, Overwrite
from capa_probe.cli.profile import load_data, start

DEMO_BATCH_SIZE = 8


@app.command()
def demo(
    model: Annotated[
        Literal["llava", "qwen2.5-vl", "internvl", "all"],
        typer.Option(help="Family of the demo model, or all of them, one after the other."),
    ] = "llava",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for tables and figures, with --model all one folder inside for each. A run that was stopped "
            "goes on, another demo is replaced.  [default: runs/demo; runs/demo-MODEL; with --limit N, -N behind it]",
            show_default=False,
        ),
    ] = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
) -> None:
    """Profile a small trained model that comes with capa_probe, on its own test questions.

    Example: `capa-probe demo --limit 50`
    """
    from capa_probe.demo import DEMO_MODELS, demo_data_path, demo_model_path

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk
    parts = ["demo", *([model] if model != "llava" else []), *([str(limit)] if limit else [])]
    out = out or Path("runs") / "-".join(parts)  # a short demo leaves the whole one as it is
    runs: dict[str, Path] = {name: out / name for name in DEMO_MODELS} if model == "all" else {model: out}
    # What is missing is said before the first one has run.
    found = {name: (demo_model_path(name), demo_data_path("test", DEMO_MODELS[name].world)) for name in runs}
    for name, (path, data) in found.items():
        samples = load_data(str(data), limit, runs[name])
        start(
            str(path),
            samples,
            runs[name],
            own_model=path,
            overwrite=overwrite,
            limit=limit,
            batch_size=DEMO_BATCH_SIZE,
            probes="all",  # so that the report and the overlays can draw the removal effect too
        )

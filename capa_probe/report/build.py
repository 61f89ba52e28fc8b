"""Puts a report together from what lies in the folders of runs; no model runs."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from capa_probe.__about__ import __version__
from capa_probe.errors import CapaProbeError
from capa_probe.figures.style import count
from capa_probe.files import replace
from capa_probe.findings import Findings
from capa_probe.report import commands, words
from capa_probe.report.charts import charts
from capa_probe.report.costs import costs
from capa_probe.report.encoding import script_json
from capa_probe.report.explorer import QUANTITIES, examples
from capa_probe.report.listing import columns_of
from capa_probe.report.listings import listings
from capa_probe.report.pictures import colours
from capa_probe.report.pruned import strangers
from capa_probe.report.runs import ShownRun, read_runs
from capa_probe.report.scatter import scatter
from capa_probe.report.settings import tables
from capa_probe.report.strip import height_note, strip

#: Name of the report in its run's folder.
REPORT_FILE = "report.html"
#: Characters that the examples of all runs may take, and the points of all scatter plots: under 10 MB with the rest.
EXAMPLES_ROOM, POINTS_ROOM = 8_000_000, 800_000
#: Characters of names up to which a title has those of all runs.
_TITLE = 60
_TEMPLATES = Path(__file__).parent / "templates"
#: The page's scripts, in the order in which they build on each other.
SCRIPTS = (
    "data",
    "numbers",
    "state",
    "axes",
    "colours",
    "download",
    "patch",
    "heatmap",
    "samples",
    "explorer",
    "legend",
    "charts",
    "scatter",
    "tables",
    "keys",
    "start",
)


def write_report(
    run: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    n_examples: int = 4,
    findings: Findings | None = None,
) -> Path:
    """Write one HTML file that shows what runs found: headline, layer explorer, plots, tables, settings.

    The file needs nothing beside it and loads nothing; its scripts and data are in it. What a run lacks (token rows,
    probes, examples) is replaced by a sentence that says so.

    Args:
        run: folder of a finished profile, or several: more profiles, which are shown side by side, folders of
            ``confirm`` and ``depth``, and files of ``capa-probe run --json``, of the same models. Sinks and layers are
            found as each profile's ``findings.json`` says.
        out: the file to write; by default ``report.html`` in the first profile's folder.
        n_examples: how many of each profile's examples to show; all of them if there are fewer.
        findings: what ``find`` returned for the only profile, where it is at hand already.

    Returns:
        The file written.

    Raises:
        CapaProbeError: there is no finished profile, a newer version wrote it, it is damaged, a run is of a model of
            which no profile was given, or an argument cannot be used.
        OSError: the file cannot be written.
    """
    if not isinstance(n_examples, int) or isinstance(n_examples, bool) or n_examples < 0:
        raise CapaProbeError(f"n_examples={n_examples!r} was given; give a whole number of at least 0.")
    paths = [run] if isinstance(run, (str, os.PathLike)) else list(run)
    runs = read_runs(paths, findings)
    file = runs[0].folder / REPORT_FILE if out is None else Path(out)
    if file.is_dir():
        raise CapaProbeError(f"{file} is a folder; give the file to write the report to.")
    page = _page(runs, [Path(path) for path in paths], n_examples)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Half of a surrogate pair, which a question from JSON can hold, becomes a question mark.
    return replace(file, lambda temporary: temporary.write_bytes(page.encode(errors="replace")))


def _page(runs: Sequence[ShownRun], paths: Sequence[Path], n_examples: int) -> str:
    found = [examples(run, n_examples, EXAMPLES_ROOM / len(runs)) for run in runs]
    plots = charts(runs)
    content = {
        "runs": [
            {
                "name": run.name,
                "layers": run.n_layers,
                "examples": shown,
                "offsets": words.offset_dims(run.findings),
                "sinks_known": run.findings is not None and run.findings.sinks is not None,
                "points": scatter(run, POINTS_ROOM / len(runs)),
            }
            for run, (shown, _) in zip(runs, found, strict=True)
        ],
        "quantities": [vars(quantity) for quantity in QUANTITIES],
        "charts": [{**vars(chart), "lines": [vars(line) for line in chart.lines]} for chart in plots],
        "colours": base64.b64encode(colours().tobytes()).decode(),
    }
    script = "".join((_TEMPLATES / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    return _environment().get_template("report.html.j2").render(
        title=_title([run.name for run in runs]),
        policy=_policy(script, style),
        style=style,
        script=script,
        content=script_json(content),
        models=[
            _model(run, number, example[0], example[1])
            for number, (run, example) in enumerate(zip(runs, found, strict=True))
        ],
        charts=plots,
        any_examples=any(shown for shown, _ in found),
        report_command=commands.report(paths),
        version=__version__,
    )  # fmt: skip


def _title(names: Sequence[str]) -> str:
    together = ", ".join(names)
    return together if len(names) == 1 or len(together) <= _TITLE else f"{len(names)} runs"


def _model(run: ShownRun, number: int, shown: list[dict[str, Any]], no_examples: str) -> dict[str, Any]:
    """What the templates show of a run without a script."""
    manifest, findings = run.prof.manifest, run.findings
    by_layer = None if findings is None else findings.by_layer
    return {
        "number": number,
        "name": run.name,
        "facts": words.facts(manifest, findings),
        "samples": count(int(manifest["n_samples"]), "sample"),
        "tiles": words.tiles(manifest, findings, costs(run.tables)),
        "warnings": words.warnings(manifest, findings),
        "verdict": words.verdict(findings),
        "cautions": words.cautions(manifest, run.remarks),
        "strip": strip(manifest, findings),
        "height_note": height_note(findings),
        "any_sinks": by_layer is not None and bool(by_layer["n_sinks"].any()),
        "any_undetermined": by_layer is not None and bool(by_layer["n_undetermined"].any()),
        "no_examples": no_examples,
        "strangers": strangers(run, shown),
        "listings": listings(run, number),
        "tables": tables(manifest, findings),
        "command": commands.profile(run.folder, manifest, run.settings["tau"], run.settings["eta"]),
    }


def _compared(models: Sequence[dict[str, Any]]) -> dict[str, list[words.Tile | None]]:
    """For several runs: what a tile says, to that tile of each run, None where it has none."""
    labels = dict.fromkeys(tile.label for model in models for tile in model["tiles"])
    found = [{tile.label: tile for tile in model["tiles"]} for model in models]
    return {label: [tiles.get(label) for tiles in found] for label in labels}


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["columns_of"] = columns_of
    environment.globals["compared"] = _compared
    return environment


def _policy(script: str, style: str) -> str:
    """Nothing is loaded from anywhere, and no script or style runs but the report's own."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )

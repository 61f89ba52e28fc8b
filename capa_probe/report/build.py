"""Puts a report together from what lies in a run's folder; no model runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from capa_probe.__about__ import __version__
from capa_probe.analysis import redundant_layers
from capa_probe.errors import CapaProbeError
from capa_probe.examples import EXAMPLES, Example, read_examples
from capa_probe.files import replace
from capa_probe.findings import CONFIDENCE, Findings, find, read_settings
from capa_probe.report import overlay, words
from capa_probe.report.figures import figures
from capa_probe.report.settings import commands, tables
from capa_probe.tables import LayerProfile

logger = logging.getLogger(__name__)

#: Name of the report in its run's folder.
REPORT_FILE = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ShownExample:
    """An example with its pictures, and sentences that say what is missing."""

    example: Example
    views: list[overlay.View]
    missing: list[str]
    right: bool | None

    @property
    def drawn(self) -> bool:
        """Whether anything is drawn over one of its pictures."""
        return any(row.panels for view in self.views for row in view.rows)


def write_report(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    n_examples: int = 4,
    findings: Findings | None = None,
) -> Path:
    """Write one HTML file that shows what a run found: summary, figures, examples, settings.

    The file needs nothing beside it, neither network nor JavaScript, and follows the reader's choice of light or
    dark. What a run lacks (token rows, probes, examples) is replaced by a sentence that says so.

    Args:
        run: folder of a finished profile; sinks and layers are found as its ``findings.json`` says.
        out: the file to write; by default ``report.html`` in the run's folder.
        n_examples: how many of the run's examples to show; all of them if there are fewer.
        findings: what ``find`` returned for this run, where it is at hand already.

    Returns:
        The file written.

    Raises:
        CapaProbeError: there is no finished profile, a newer version wrote it, it is damaged, or an argument cannot
            be used.
        OSError: the file cannot be written.
    """
    if not isinstance(n_examples, int) or isinstance(n_examples, bool) or n_examples < 0:
        raise CapaProbeError(f"n_examples={n_examples!r} was given; give a whole number of at least 0.")
    prof = LayerProfile.load(run)
    file = Path(run) / REPORT_FILE if out is None else Path(out)
    if file.is_dir():
        raise CapaProbeError(f"{file} is a folder; give the file to write the report to.")
    remarks: tuple[str, ...]
    if findings is None:
        settings: Mapping[str, Any] = read_settings(run)
        findings, remarks = _find(prof, settings)
    else:
        settings, remarks = findings.settings or read_settings(run), findings.remarks
    tau, eta = settings["tau"], settings["eta"]
    page = _page(prof, Path(run), findings, remarks, n_examples, commands(Path(run), prof.manifest, tau, eta))
    file.parent.mkdir(parents=True, exist_ok=True)
    # Half of a surrogate pair, which a question from JSON can hold, becomes a question mark.
    return replace(file, lambda temporary: temporary.write_bytes(page.encode(errors="replace")))


def _page(
    prof: LayerProfile,
    run: Path,
    findings: Findings | None,
    remarks: tuple[str, ...],
    n_examples: int,
    command_lines: list[str],
) -> str:
    manifest = prof.manifest
    layers = overlay.spread(int(manifest["n_layers"]), _most_sinks(findings))
    shown, no_examples = _examples(prof, run, findings, layers, n_examples)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = words.number
    environment.filters["percent"] = words.percent
    return environment.get_template("report.html.j2").render(
        name=words.model_name(manifest),
        manifest=manifest,
        findings=findings,
        tiles=words.tiles(manifest, findings),
        verdict=words.verdict(findings),
        cautions=words.cautions(manifest, remarks),
        strip=words.strip(manifest, findings),
        layer_table=[] if findings is None else findings.summary().to_dict("records"),
        roles=_records(None if findings is None else findings.totals),
        dims=_records(None if findings is None else findings.model_dims),
        figures=list(figures(prof, findings, remarks)),
        examples=shown,
        no_examples=no_examples,
        layers=layers,
        colour_bar=overlay.colour_bar(),
        tables=tables(manifest, findings),
        commands=command_lines,
        css=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
        version=__version__,
    )


def _find(prof: LayerProfile, settings: Mapping[str, Any]) -> tuple[Findings | None, tuple[str, ...]]:
    """As ``find``, but what cannot be analysed at all, or only in part, is a remark."""
    try:
        findings = find(prof, **settings)
    except CapaProbeError as error:
        remarks = (str(error),)
    else:
        return findings, findings.remarks
    eta = settings["eta"]
    try:  # a model too narrow for tau still has redundant layers
        layers = redundant_layers(prof, eta=eta, confidence=CONFIDENCE)
    except CapaProbeError:
        return None, remarks
    layers.attrs = {"eta": eta, "confidence": CONFIDENCE}
    return Findings(None, None, layers, float("nan"), eta, remarks), remarks


def _most_sinks(findings: Findings | None) -> int | None:
    if findings is None or findings.by_layer is None or not findings.by_layer["n_sinks"].any():
        return None
    most = int(findings.by_layer["n_sinks"].to_numpy().argmax())
    return int(findings.by_layer["layer"].iloc[most])


def _examples(
    prof: LayerProfile, run: Path, findings: Findings | None, layers: list[int], n: int
) -> tuple[list[ShownExample], str]:
    """Examples to show, and, where there are none, why."""
    try:
        examples = read_examples(run)[:n]
    except CapaProbeError as error:
        return [], str(error)
    if not examples:
        why = (
            "None were asked for."
            if n == 0
            else "This run keeps no examples: its samples came without images."
        )
        return [], why
    tokens, no_tokens = None, ""
    if prof.rows == "none":
        no_tokens = 'Nothing is drawn over the images: rows="none" kept no token rows.'
    else:
        where = [
            ("sample", "in", [example.id for example in examples]),
            ("step", "==", 0),
            ("kind", "==", "visual"),
            ("layer", "in", layers),
        ]
        tokens = prof.select(list(overlay.COLUMNS), where)
    sinks = None if findings is None else findings.sinks
    draw = partial(_show, run=run, tokens=tokens, no_tokens=no_tokens, sinks=sinks, layers=layers)
    return [draw(example) for example in examples], ""


def _show(
    example: Example,
    run: Path,
    tokens: pd.DataFrame | None,
    no_tokens: str,
    sinks: pd.DataFrame | None,
    layers: list[int],
) -> ShownExample:
    own = None if tokens is None else tokens[tokens["sample"] == example.id]
    own_sinks = None if sinks is None else sinks[sinks["sample"] == example.id]
    views, missing = overlay.views(example.images, run / EXAMPLES, own, own_sinks, layers)
    for why in missing:
        logger.info("example %s: %s", example.id, why)
    if no_tokens:
        missing = [no_tokens, *missing]
    return ShownExample(example, views, missing, words.is_right(example))


def _records(table: pd.DataFrame | None) -> list[dict[str, Any]]:
    return [] if table is None else [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]

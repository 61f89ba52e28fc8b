"""The confirmation: whether the findings of the CAPA paper hold on a model and data, on generated answers."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from capa_probe.benchmark.claims import judge
from capa_probe.benchmark.experiments import Experiment, choose
from capa_probe.benchmark.sampling import apart, drawn, split, stratified, usable
from capa_probe.benchmark.setup import Settings, Setup
from capa_probe.benchmark.store import Store
from capa_probe.describing import describe
from capa_probe.errors import CapaProbeError, LeftOutWarning
from capa_probe.lvlm import HookedLVLM
from capa_probe.measures import resolve_tau
from capa_probe.samples import Sample, data_fingerprint
from capa_probe.schema import MANIFEST_FILE
from capa_probe.tables import describe_skipped

logger = logging.getLogger(__name__)

#: Samples that are tested on unless said otherwise, and that are calibrated on at most.
LIMIT, CALIBRATION_LIMIT = 210, 210
#: Of a data set larger than so many times the limit, so many samples are looked at.
POOL = 8
#: Of the images, where no calibration samples are given.
CALIBRATION_SHARE = 0.25


@dataclass(frozen=True)
class Confirmation:
    """What a confirmation found.

    Attributes:
        tables: results by name; per experiment a summary, paired tests and per-sample rows.
        claims: one row per claim of the paper: verdict, and the numbers that decide.
        manifest: model, data, settings, versions, times.
    """

    tables: dict[str, pd.DataFrame]
    claims: pd.DataFrame
    manifest: dict[str, Any]


def confirm(
    lvlm: HookedLVLM,
    samples: Sequence[Sample],
    out: str | os.PathLike[str] | None = None,
    calibration: Sequence[Sample] | None = None,
    experiments: str = "all",
    limit: int | None = LIMIT,
    settings: Settings | None = None,
    progress: bool = True,
    strict: bool = False,
    overwrite: bool = False,
) -> Confirmation:
    """Run the experiments that tell whether the paper's claims hold, and judge the claims.

    A run that was stopped, by whatever means, is taken up again by the same call: what is finished is not run again.
    Experiments may be added to a run later.

    Args:
        lvlm: the model, with a processor.
        samples: with images, answers and, best, tasks.
        out: folder to write to; None keeps the tables in memory.
        calibration: samples to measure FFN redundancy and fit Hadamard factors on; those that share an image with
            ``samples`` are left out. None sets a quarter of the images of ``samples`` aside for it.
        experiments: "all", or numbers or names with commas between (:mod:`capa_probe.benchmark.experiments`).
        limit: samples to test on, drawn so that each task has as many; None takes all.
        settings: of the experiments.
        progress: show progress bars.
        strict: raise at the first image that cannot be used, rather than leave its sample out with a warning.
        overwrite: start anew, whatever confirmation lies in ``out``.

    Returns:
        Tables, claims and manifest.

    Raises:
        OtherRunError: ``out`` holds a run of another model, other data or other settings.
        BadImageError: with ``strict``.
        CapaProbeError: arguments or samples that cannot be used, or another process that writes to ``out``.
    """
    settings, chosen = settings or Settings(), choose(experiments)
    _check(lvlm, limit, settings)
    if not len(samples):
        raise CapaProbeError("No sample was given to confirm on; give at least one.")
    given = drawn(samples, None if limit is None else POOL * limit, settings.seed)
    if calibration is None:
        pool, aside = split(given, CALIBRATION_SHARE, settings.seed)
    else:
        pool, aside = given, drawn(calibration, POOL * CALIBRATION_LIMIT, settings.seed)
    tested, skipped = usable(stratified(pool, limit, settings.seed), strict)
    if not tested:
        reason = f"; the first: {skipped[0]['reason']}" if skipped else ""
        raise CapaProbeError(f"None of the {len(given)} samples could be used{reason}")
    fitted, more = usable(stratified(apart(aside, tested), CALIBRATION_LIMIT, settings.seed), strict)
    if skipped or more:
        n = len(tested) + len(fitted) + len(skipped) + len(more)
        warnings.warn(describe_skipped([*skipped, *more], n), LeftOutWarning, stacklevel=2)
    facts = {
        **describe(lvlm),
        "settings": {"limit": limit, **settings.as_json()},
        "n_samples": len(tested),
        "data_fingerprint": data_fingerprint(tested),
        "n_calibration": len(fitted),
        "calibration_fingerprint": data_fingerprint(fitted),
    }
    with Store.open(out, facts, overwrite) as store:
        setup = Setup(lvlm, tested, fitted, store, settings, progress)
        seconds = {experiment.name: _run(experiment, setup) for experiment in chosen}
        tables = store.tables()
        claims = judge(tables)
        store.write("claims", claims)
        manifest = store.finish(
            skipped=[*skipped, *more], seconds=_all_seconds(out, seconds), stages=setup.stages()
        )
        return Confirmation({**tables, "claims": claims}, claims, manifest)


def _run(experiment: Experiment, setup: Setup) -> dict[str, float]:
    """Run one experiment and write its tables; how long that took, and how much was there already."""
    before, started, cpu = setup.store.made, time.perf_counter(), time.process_time()
    logger.info("Experiment %d: %s", experiment.number, experiment.title)
    for name, table in experiment.run(setup).items():
        setup.store.write(name, table)
    return {
        "wall": round(time.perf_counter() - started, 1),
        "cpu": round(time.process_time() - cpu, 1),
        "parts_made": setup.store.made - before,
    }


def _all_seconds(out: str | os.PathLike[str] | None, seconds: dict[str, Any]) -> dict[str, Any]:
    """Of this call, and of earlier ones where this one had nothing to do."""
    earlier = {} if out is None else read_manifest(out).get("seconds", {})
    kept = {name: own for name, own in earlier.items() if not seconds.get(name, {}).get("parts_made")}
    return {**seconds, **kept}


def _check(lvlm: HookedLVLM, limit: int | None, settings: Settings) -> None:
    if lvlm.processor is None:
        raise CapaProbeError(
            "A HookedLVLM without a processor was given, which reads no questions; give HookedLVLM(model, processor)."
        )
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise CapaProbeError(f"limit={limit!r} was given; give a whole number of at least 1, or None.")
    if settings.tau != "auto":
        resolve_tau(settings.tau, lvlm.d_model)
    for layer in (*(settings.layers or ()), *(settings.knockout_layers or ())):
        if not 1 <= layer < lvlm.n_layers:
            raise CapaProbeError(
                f"Layer {layer} was given for a model of {lvlm.n_layers} layers; give pruning layers from 1 to "
                f"{lvlm.n_layers - 1}."
            )
    if settings.layers is None and not Setup(lvlm, ()).stages():
        raise CapaProbeError(
            f"The model has {lvlm.n_layers} layer, and nothing can be pruned before it; give a deeper one."
        )


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a confirmation; empty where it is not finished."""
    file = Path(path) / MANIFEST_FILE
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}

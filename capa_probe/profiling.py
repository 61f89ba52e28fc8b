"""Profiles a model: runs probes over samples and writes tidy tables while it goes."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor
from tqdm.auto import tqdm

from capa_probe.batching import Batches
from capa_probe.describing import describe
from capa_probe.errors import CapaProbeError, LeftOutWarning, OtherRunError
from capa_probe.lvlm import HookedLVLM
from capa_probe.lvlm.attached import refuse_shortened
from capa_probe.memory import memory_errors
from capa_probe.probes import Probe, Recorder, choose_probes
from capa_probe.probes.forward import check_logits, run
from capa_probe.probes.token_table import token_table
from capa_probe.run_folder import begin, check_output, locked
from capa_probe.samples import Sample
from capa_probe.tables import LayerProfile, describe_skipped
from capa_probe.writing import ProfileWriter

logger = logging.getLogger(__name__)


def profile(
    lvlm: HookedLVLM,
    samples: Iterable[Sample] | Iterable[Mapping[str, Tensor]],
    out: str | os.PathLike[str] | None = None,
    steps: int = 0,
    batch_size: int = 1,
    rows: str | None = None,
    probes: str | Iterable[str] = "default",
    limit: int | None = None,
    progress: bool = True,
    sink_dims: Sequence[int] | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> LayerProfile:
    """Measure every layer of a model on samples.

    A run that was stopped, by whatever means, is taken up again by the same call: parts that are finished stay as they
    are, and the tables become those of an undisturbed run. A finished run is not run again but opened.

    Args:
        lvlm: the model.
        samples: :class:`Sample` objects, or dicts of prepared tensors, of which each row is then a sample with ids
            "0", "1", ... in order.
        out: folder to write to while it runs; None keeps the tables in memory.
        steps: decode steps to follow after prefill. Step t has the t-th generated token (greedy) as query; a sample
            whose answer ends earlier has fewer.
        batch_size: samples per forward; prepared tensors come in their own batches.
        rows: rows of the token table to keep: "all", "visual", or "none" for the layers table only. Default "all",
            and "visual" when ``steps`` > 0.
        probes: "default" (all but removal_effect), "all", or names.
        limit: stop after this many samples.
        progress: show a progress bar.
        sink_dims: restrict sink strength to these dimensions, so that phi over them is exact; None takes the four
            largest of all dimensions.
        strict: raise at the first image that is missing, corrupt or empty. Otherwise its sample is left out, with a
            warning, and listed in the manifest under ``skipped``.
        overwrite: start anew, whatever profile lies in ``out``.

    Returns:
        The profile: ``.tokens``, ``.layers``, ``.manifest``.

    Raises:
        OtherRunError: ``out`` holds a profile of another model, other settings or other data; the message names the
            first field that differs.
        BadImageError: with ``strict``.
        CapaProbeError: arguments or samples that cannot be used, a statistic that is not finite, too little memory, or
            another process that writes to ``out``. Finished parts stay.
    """
    refuse_shortened(lvlm.model, "A profile")
    chosen = choose_probes(probes)
    rows = ("visual" if steps else "all") if rows is None else rows
    dims = None if sink_dims is None else tuple(sorted({int(dim) for dim in sink_dims}))
    _check(lvlm, steps, batch_size, rows, limit, dims)
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "rows": rows,
        "limit": limit,
        "probes": [probe.name for probe in chosen],
    }
    facts = {**describe(lvlm), "settings": settings, "sink_dims": None if dims is None else list(dims)}
    batches = Batches(lvlm, samples, batch_size, limit, strict)
    with ExitStack() as stack:
        folder = None if out is None else Path(out)
        if folder is not None:
            check_output(folder)  # before it is made
            stack.enter_context(locked(folder))
            if begin(folder, facts, overwrite) == "finished":
                return _finished(folder, batches, strict)
        writer = ProfileWriter(folder, resume=folder is not None)
        return _measure(lvlm, batches, writer, chosen, facts, dims, progress)


def _finished(folder: Path, batches: Batches, strict: bool) -> LayerProfile:
    """The profile in a folder, provided that it is one of these samples."""
    prof = LayerProfile.load(folder)
    batches.pass_over()
    if batches.fingerprint() != prof.manifest["data_fingerprint"]:
        raise OtherRunError(
            f"{folder} was made on other data: its data_fingerprint is not that of the samples given; give another "
            "folder, or start anew with --overwrite (overwrite=True)."
        )
    _refuse_skipped(prof.manifest.get("skipped"), strict)
    logger.info("%s is finished; nothing is run again", folder)
    return prof


def _measure(
    lvlm: HookedLVLM,
    batches: Batches,
    writer: ProfileWriter,
    probes: Sequence[Probe],
    facts: dict[str, Any],
    dims: tuple[int, ...] | None,
    progress: bool,
) -> LayerProfile:
    """Run the model over the batches that a writer does not have yet, and finish its profile."""
    settings, before = facts["settings"], 0.0
    if writer.progress is not None:
        before = writer.progress["seconds"]
        batches.resume(writer.progress, writer.folder)
        _refuse_skipped(batches.skipped, batches.strict)
        logger.info("Going on after %d samples of an earlier run", batches.seen)
    started = time.perf_counter() - before
    with tqdm(
        total=batches.total, initial=batches.seen, unit="sample", desc="profile", disable=not progress
    ) as bar:
        for ids, inputs in batches:
            with memory_errors(_what(ids, inputs)):
                spans = lvlm.spans(inputs)
                recorder = Recorder(lvlm, probes, spans, dims, settings["steps"])
                n_steps, nan_steps = run(lvlm, inputs, spans, recorder, settings["steps"])
                table = token_table(ids, spans, recorder, n_steps)
            check_logits(ids, nan_steps)
            seconds = time.perf_counter() - started
            writer.add(table, settings["rows"], {**batches.progress(), "seconds": seconds})
            bar.update(batches.seen - bar.n)
    n_samples = batches.seen - len(batches.skipped)
    if not n_samples:
        _refuse_nothing(batches)
    if batches.skipped:
        warnings.warn(describe_skipped(batches.skipped, batches.seen), LeftOutWarning, stacklevel=3)
    return writer.finish(
        {
            **facts,
            "n_samples": n_samples,
            "skipped": batches.skipped,
            "data_fingerprint": batches.fingerprint(),
            "seconds": round(time.perf_counter() - started, 3),
        },
        batches.described(),
    )


def _refuse_skipped(skipped: Sequence[Mapping[str, str]] | None, strict: bool) -> None:
    """What an earlier run left out, a strict one does not accept."""
    if strict and skipped:
        raise CapaProbeError(
            f"The run so far left out {len(skipped)} samples; mend them and start anew, or go on without strict. The "
            f"first: {skipped[0]['reason']}"
        )


def _what(ids: Sequence[str], inputs: Mapping[str, Any]) -> str:
    batch, length = inputs["input_ids"].shape
    return f"sample {ids[0]} ({batch} in the batch, {length:,} positions each)"


def _refuse_nothing(batches: Batches) -> NoReturn:
    if batches.skipped:
        raise CapaProbeError(
            f"None of the {batches.seen} samples could be used; the first: {batches.skipped[0]['reason']}"
        )
    raise CapaProbeError("No sample was given to profile; give at least one.")


def _check(
    lvlm: HookedLVLM,
    steps: int,
    batch_size: int,
    rows: str,
    limit: int | None,
    sink_dims: tuple[int, ...] | None,
) -> None:
    for name, value, least in (("steps", steps, 0), ("batch_size", batch_size, 1), ("limit", limit, 1)):
        if value is not None and (not isinstance(value, int) or not least <= value <= sys.maxsize):
            raise CapaProbeError(f"{name}={value!r} was given; give a whole number of at least {least}.")
    if rows not in ("all", "visual", "none"):
        raise CapaProbeError(f'rows={rows!r} was given; give "all", "visual" or "none".')
    if sink_dims is not None and not (sink_dims and sink_dims[0] >= 0 and sink_dims[-1] < lvlm.d_model):
        raise CapaProbeError(
            f"sink_dims={list(sink_dims)} was given; give at least one dimension, each from 0 to {lvlm.d_model - 1}."
        )

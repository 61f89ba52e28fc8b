"""Fits the Hadamard approximation of an FFN: streamed least squares over the visual tokens of calibration samples.

Per layer and channel four sums are kept, in float64. They are also all that a stopped run needs to go on; now and then
they are written beside the result, as ``<name>.unfinished``.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from capa_probe.batching import Batches
from capa_probe.describing import describe
from capa_probe.errors import CapaProbeError, LeftOutWarning, OtherRunError
from capa_probe.lvlm import HookedLVLM
from capa_probe.lvlm.attached import refuse_shortened
from capa_probe.memory import memory_errors
from capa_probe.pruning.bypass import is_bypassed
from capa_probe.pruning.calibration_run import (
    CalibrationRun,
    CalibrationState,
    check_output,
    locked,
    state_file,
)
from capa_probe.pruning.ffn import HadamardFFN, check_x
from capa_probe.pruning.visual_ffn import check_layers
from capa_probe.run_folder import refuse_other
from capa_probe.samples import Sample
from capa_probe.tables import describe_skipped

logger = logging.getLogger(__name__)


def calibrate_hadamard(
    lvlm: HookedLVLM,
    samples: Iterable[Sample] | Iterable[Mapping[str, Tensor]],
    layers: Iterable[int],
    x: Literal["residual", "normed"] = "residual",
    out: str | os.PathLike[str] | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    progress: bool = True,
    strict: bool = False,
    overwrite: bool = False,
) -> HadamardFFN:
    """Fit ``x + FFN(norm(x)) ~ x * alpha`` to the visual tokens of samples (CAPA; the paper takes 500 COCO images).

    ``alpha = sum(x * y) / sum(x * x)`` per channel, with y = x + FFN(norm(x)): ordinary least squares without an
    intercept, in closed form; 1 for a channel that is always zero. All layers are fitted in one pass, with sums in
    float64 over the activations as the model computes them.

    A run that was stopped, by whatever means, is taken up again by the same call with the same ``out``, and ends with
    the same numbers. A finished one is not run again but opened.

    Args:
        lvlm: the model.
        samples: :class:`Sample` objects, or dicts of prepared tensors, of which each row is then a sample.
        layers: decoder layers to fit, from 0.
        x: what alpha is multiplied with: "residual", the residual stream that enters the FFN block, or "normed", what
            the block's norm makes of it.
        out: safetensors file to write (:meth:`HadamardFFN.load` reads it); None keeps the result in memory.
        batch_size: samples per forward; prepared tensors come in their own batches.
        limit: stop after this many samples.
        progress: show a progress bar.
        strict: raise at the first image that is missing, corrupt or empty. Otherwise its sample is left out, with a
            warning, and listed in the manifest under ``skipped``.
        overwrite: start anew, whatever calibration ``out`` holds.

    Returns:
        Factors with R² per layer and counts of samples and tokens.

    Raises:
        OtherRunError: ``out`` was made with another model, other settings or other data; the message names what
            differs.
        BadImageError: with ``strict``.
        CapaProbeError: arguments or samples that cannot be used, no visual token at all, an activation that is not
            finite, too little memory, or another process that writes to ``out``.
    """
    chosen = check_layers(layers, lvlm.n_layers)
    check_x(x)
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise CapaProbeError(f"{name}={value!r} was given; give a whole number of at least 1.")
    if is_bypassed(lvlm):
        raise CapaProbeError(
            "A calibration was asked for while an FFN approximation is attached to the model; leave its with block "
            "first."
        )
    refuse_shortened(lvlm.model, "A calibration")
    settings = {"layers": list(chosen), "x": x, "batch_size": batch_size, "limit": limit}
    described = describe(lvlm)
    # What a user most likely changed comes first: of two runs that differ, the first difference is named.
    facts = {"settings": settings, "dtype": described["dtype"], **described}
    file = None if out is None else Path(out)
    with ExitStack() as stack:
        if file is not None:
            check_output(file)  # before anything is made
            stack.enter_context(locked(file))
            if overwrite:
                file.unlink(missing_ok=True)
                state_file(file).unlink(missing_ok=True)
            elif file.exists():
                refuse_other(file, HadamardFFN.load(file).manifest, facts)
                return _finished(file, lvlm, Batches(lvlm, samples, batch_size, limit, strict))
        batches = Batches(lvlm, samples, batch_size, limit, strict)
        run = CalibrationRun(file, facts)
        stack.callback(run.keep)  # whatever happens
        _measure(lvlm, batches, run, chosen, x, progress)
        found = {"data_fingerprint": batches.fingerprint(), "skipped": batches.skipped}
        fitted = _fit(run.state, x, {**facts, **found})
        run.finish(fitted, file)
    if batches.skipped:
        warnings.warn(describe_skipped(batches.skipped, batches.seen), LeftOutWarning, stacklevel=2)
    return fitted


def _measure(
    lvlm: HookedLVLM, batches: Batches, run: CalibrationRun, layers: Sequence[int], x: str, progress: bool
) -> None:
    """Add up the batches that a run does not have yet."""
    if run.state.progress is not None:
        batches.resume(run.state.progress, run.file)
        logger.info("Going on after %d samples of an earlier run", batches.seen)
    with tqdm(
        total=batches.total, initial=batches.seen, unit="sample", desc="calibrate", disable=not progress
    ) as bar:
        for ids, inputs in batches:
            batch, length = inputs["input_ids"].shape
            with memory_errors(f"sample {ids[0]} ({batch} in the batch, {length:,} positions each)"):
                visual = lvlm.spans(inputs).visual.clone()
                visual[len(ids) :] = False  # beyond the limit
                sums = _sums(lvlm, inputs, visual, layers, x, ids) if bool(visual.any()) else {}
            run.advance(run.state.plus(sums, visual, batches.progress()))
            bar.update(batches.seen - bar.n)
    if not run.state.n_tokens:
        left_out = f" ({len(batches.skipped)} left out for their images)" if batches.skipped else ""
        raise CapaProbeError(
            f"The {batches.seen} samples given{left_out} have no visual token to fit; give samples with images."
        )


def _sums(
    lvlm: HookedLVLM,
    inputs: Mapping[str, Any],
    visual: Tensor,
    layers: Sequence[int],
    x: str,
    ids: Sequence[str],
) -> dict[int, Tensor]:
    """Run one batch: layer to float64 (4, d_model), on the CPU."""
    sums: dict[int, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def remember(tensor: Tensor, hook: Any) -> None:
        seen[hook.name.rpartition(".")[2]] = tensor

    def add(update: Tensor, layer: int) -> None:
        where = visual.to(update.device)
        residual = seen.pop("hook_resid_mid")[where].double()
        y = residual + update[where].double()
        given = residual if x == "residual" else seen.pop("hook_in")[where].double()
        total = torch.stack([(given * given).sum(0), (given * y).sum(0), (y * y).sum(0), y.sum(0)]).cpu()
        if not bool(total.isfinite().all()):
            row = int(where.nonzero()[(~(given * y).isfinite()).any(dim=1)][0, 0])
            raise CapaProbeError(
                f"What enters or leaves the FFN of layer {layer} is not finite for sample {ids[row]}; load the model "
                "in bfloat16 or float32, or leave the sample out."
            )
        sums[layer] = total

    hooks: list[tuple[str, Any]] = []
    for layer in layers:
        block = f"blocks.{layer}"
        hooks.append((f"{block}.hook_resid_mid", remember))
        if x == "normed":
            hooks.append((f"{block}.mlp.hook_in", remember))
        hooks.append((f"{block}.hook_mlp_out", lambda update, hook, layer=layer: add(update, layer)))
    with torch.no_grad(), lvlm.hooks(hooks):
        lvlm.model(**inputs, use_cache=False, logits_to_keep=1)
    return sums


def _fit(
    state: CalibrationState, x: Literal["residual", "normed"], manifest: Mapping[str, Any]
) -> HadamardFFN:
    """Close the least squares of every layer."""
    alpha, r2 = {}, {}
    for layer, (xx, xy, yy, y) in state.sums.items():
        factors = torch.where(xx > 0, xy / xx.where(xx > 0, 1.0), 1.0)
        error = (yy - 2 * factors * xy + factors.square() * xx).clamp(min=0.0).sum()
        deviation = (yy - y.square() / state.n_tokens).clamp(min=0.0).sum()
        # Below this the deviation is rounding, not variance.
        varies = bool(deviation > 1e-12 * yy.sum())
        alpha[layer], r2[layer] = factors, float(1 - error / deviation) if varies else math.nan
    return HadamardFFN(alpha, x, r2, state.n_samples, state.n_tokens, manifest)


def _finished(file: Path, lvlm: HookedLVLM, batches: Batches) -> HadamardFFN:
    """The calibration in a file, provided that it is one of these samples."""
    found = HadamardFFN.load(file, lvlm)
    batches.pass_over()
    if batches.fingerprint() != found.manifest.get("data_fingerprint"):
        raise OtherRunError(
            f"{file} was made on other data: its data_fingerprint is not that of the samples given; give another file, "
            "or start anew with --overwrite (overwrite=True)."
        )
    state_file(file).unlink(missing_ok=True)  # of a run that was killed with all its work done
    logger.info("%s is finished; nothing is run again", file)
    return found

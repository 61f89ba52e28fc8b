"""Profiles a model: runs probes over samples and writes tidy tables while it goes."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessorList

from capa_probe.batching import Batches
from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM, TokenSpans
from capa_probe.probes import Recorder, choose_probes
from capa_probe.probes.token_table import token_table
from capa_probe.samples import Sample
from capa_probe.tables import LayerProfile
from capa_probe.writing import ProfileWriter

#: Packages whose versions a manifest records.
PACKAGES = ("capa-probe", "torch", "transformers", "transformer-lens")


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
) -> LayerProfile:
    """Measure every layer of a model on samples.

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

    Returns:
        The profile: ``.tokens``, ``.layers``, ``.manifest``.

    Raises:
        CapaProbeError: arguments or samples that cannot be used, or a statistic that is not finite.
    """
    chosen = choose_probes(probes)
    rows = ("visual" if steps else "all") if rows is None else rows
    dims = None if sink_dims is None else tuple(sorted({int(dim) for dim in sink_dims}))
    _check(lvlm, steps, batch_size, rows, limit, dims)
    batches = Batches(lvlm, samples, batch_size, limit)
    writer = ProfileWriter(None if out is None else Path(out))
    started = time.perf_counter()
    with tqdm(total=batches.total, unit="sample", desc="profile", disable=not progress) as bar:
        for ids, inputs in batches:
            spans = lvlm.spans(inputs)
            recorder = Recorder(lvlm, chosen, spans, dims)
            n_steps, nan_steps = run(lvlm, inputs, spans, recorder, steps)
            table = token_table(ids, spans, recorder, n_steps)
            _check_logits(ids, nan_steps)
            writer.add(table, rows)
            bar.update(len(ids))
    if not batches.seen:
        raise CapaProbeError("No sample was given to profile; give at least one.")
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "rows": rows,
        "limit": limit,
        "probes": [probe.name for probe in chosen],
    }
    return writer.finish(
        {
            **describe(lvlm),
            "n_samples": batches.seen,
            "data_fingerprint": batches.fingerprint(),
            "settings": settings,
            "sink_dims": None if dims is None else list(dims),
            "seconds": round(time.perf_counter() - started, 3),
        }
    )


def run(
    lvlm: HookedLVLM, inputs: Mapping[str, Any], spans: TokenSpans, recorder: Recorder, steps: int
) -> tuple[list[int], list[int | None]]:
    """One prefill and up to ``steps`` greedy decode steps under a recorder.

    Returns:
        For each sample, how many decode steps have a generated token other than a stop token as query, and the first
        step whose token was chosen from logits with NaN, if any.
    """
    length = spans.padding.shape[1]
    with torch.no_grad(), recorder.attached():
        if steps == 0:
            lvlm.model(**inputs, use_cache=False, logits_to_keep=1)
            return [0] * len(spans.padding), [None] * len(spans.padding)
        if bool((spans.last != length - 1).any()):
            raise CapaProbeError(
                f"steps={steps} was asked for on right-padded inputs, which cannot be continued; pad on the left "
                '(padding_side="left").'
            )
        # The model's own generation settings (stop tokens, penalties), made greedy.
        config = copy.deepcopy(lvlm.model.generation_config)
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        plain = {"return_dict_in_generate": False, "num_return_sequences": 1}
        config.update(**greedy, **plain, max_length=None, max_new_tokens=steps + 1, use_cache=True)
        watch = _NaNWatch()
        processors = LogitsProcessorList([watch])
        generated: Tensor = lvlm.model.generate(
            **inputs, generation_config=config, logits_processor=processors
        )[:, length:]
    stops = config.eos_token_id
    stop_ids = torch.as_tensor([] if stops is None else stops, device=generated.device).reshape(-1)
    running = (~torch.isin(generated, stop_ids)).int().cumprod(dim=1).sum(dim=1)
    n_steps = [min(steps, int(n), len(recorder.steps) - 1) for n in running]
    return n_steps, watch.first_steps(n_steps, steps)


def describe(lvlm: HookedLVLM) -> dict[str, Any]:
    """What a manifest says of a model: its name, sizes, family, how it ran, and the versions it ran with."""
    config, text = lvlm.model.config, lvlm.model.config.get_text_config()
    published = lvlm.family.sink_dims(lvlm.model)
    return {
        "model": config.name_or_path or type(lvlm.model).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "family": lvlm.family.name,
        "architecture": type(lvlm.model).__name__,
        "config_hash": hashlib.sha256(config.to_json_string().encode()).hexdigest(),
        "n_layers": lvlm.n_layers,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "d_model": lvlm.d_model,
        "norm_eps": lvlm.norm_eps,
        "dtype": str(lvlm.model.dtype).removeprefix("torch."),
        "device": str(lvlm.device),
        "attention_backend": lvlm.attention_backend,
        "published_sink_dims": None if published is None else list(published),
        "versions": {package: version(package) for package in PACKAGES},
    }


class _NaNWatch:
    """Notes logits with NaN, from which generation would take any token without a word."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._found.append(scores.isnan().any(dim=1))
        return scores

    def first_steps(self, n_steps: Sequence[int], steps: int) -> list[int | None]:
        """For each sample, the first step whose token is chosen from NaN; None if none of those that count is."""
        rows = torch.stack(self._found, dim=1).tolist()
        counted = [row[: min(n + 1, steps)] for row, n in zip(rows, n_steps, strict=True)]
        return [row.index(True) + 1 if any(row) else None for row in counted]


def _check_logits(ids: Sequence[str], nan_steps: Sequence[int | None]) -> None:
    for sample_id, step in zip(ids, nan_steps, strict=False):  # with a limit, ids may be fewer
        if step is not None:
            raise CapaProbeError(
                f"The logits that choose generated token {step} of sample {sample_id} hold NaN, though every layer is "
                "finite; check the final norm and the output head, or load the model in bfloat16 or float32."
            )


def _check(
    lvlm: HookedLVLM,
    steps: int,
    batch_size: int,
    rows: str,
    limit: int | None,
    sink_dims: tuple[int, ...] | None,
) -> None:
    for name, value, least in (("steps", steps, 0), ("batch_size", batch_size, 1), ("limit", limit, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise CapaProbeError(f"{name}={value!r} was given; give a whole number of at least {least}.")
    if rows not in ("all", "visual", "none"):
        raise CapaProbeError(f'rows={rows!r} was given; give "all", "visual" or "none".')
    if sink_dims is not None and not (sink_dims and sink_dims[0] >= 0 and sink_dims[-1] < lvlm.d_model):
        raise CapaProbeError(
            f"sink_dims={list(sink_dims)} was given; give at least one dimension, each from 0 to {lvlm.d_model - 1}."
        )

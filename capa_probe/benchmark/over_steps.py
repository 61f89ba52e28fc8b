"""Experiment 6: what pruning does over the steps of generation, and how stable the ranking is that it goes by.

Distributions: at each step, the next-token distribution of the pruned model is compared with the model's own, both on
the model's own answer (teacher forcing), so that they stand before the same words. Step 0 is the prompt's; step t has
the t-th answer token as query. The answer's tokens come as decode steps after the pruned prefill.

Maps: at each step and layer, the contributions of the visual tokens to the current query token, divided by their sum,
are compared with those of the step before and of the prompt. Here nothing is pruned.

Half of the samples ask for a description of an image, whose answers are long; the others are those of the data. A step
that few answers reach has few samples: each row says how many.

Tables: ``over_steps`` (mean distance per method, stage and step), ``over_steps_tests`` (CAPA against every other
method: the mean over a sample's steps, paired over samples), ``over_steps_rows`` (per sample), ``over_steps_maps``
(mean change of the maps per layer and step) and ``over_steps_maps_rows``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from capa_probe.benchmark.answers import prepare
from capa_probe.benchmark.knock_means import means
from capa_probe.benchmark.sampling import stratified
from capa_probe.benchmark.setup import Setup, chunks, images_keys, key_of
from capa_probe.benchmark.steps_forced import Answers, digest, forced, greedy
from capa_probe.benchmark.steps_maps import MEASURES, compare_maps
from capa_probe.benchmark.summary import PROPORTIONS, compare, corrected
from capa_probe.lvlm.inputs import LVLMInputs
from capa_probe.memory import memory_errors
from capa_probe.profiling import profile
from capa_probe.pruning import CAPA, Pruner
from capa_probe.samples import Sample

#: The question whose answers are long, and the task that it is reported under.
DESCRIBE, DESCRIBE_TASK = "Describe the picture.", "describe"
#: CAPA; the same budget by other scores; and CAPA with every step ranking the visual tokens anew.
METHODS: dict[str, dict[str, Any]] = {
    "contribution": {"score": "contribution"},
    "attention": {"score": "attention"},
    "random": {"score": "random"},
    "every_step": {"score": "contribution", "rescore": "every_step"},
}
DISTANCES = ("hellinger", "kl")


def run(setup: Setup) -> dict[str, pd.DataFrame]:
    """Follow some samples over generation steps; see the module's docstring.

    Args:
        setup: of the run; ``settings.step_samples`` samples, up to ``settings.steps`` steps, share
            ``settings.capa_keep`` of the visual tokens, at the model's stages.
    """
    settings = setup.settings
    samples = followed(setup.samples, settings.step_samples, settings.seed)
    images = images_keys(samples)
    of = {sample.id: {"task": sample.task or "", "image": images[sample.id]} for sample in samples}
    distances, maps = [], []
    for chunk in setup.bar(chunks(samples, settings.batch_size), "over_steps"):
        batch = _Batch(setup, chunk, of)
        which = digest(*(sample.id for sample in chunk))
        for stage, layer in setup.stages().items():
            for method in METHODS:
                key = key_of({"method": method, "layer": layer, "samples": which})
                part = setup.store.part("over_steps", key, batch.distances_maker(method, layer))
                distances.append(part.assign(stage=stage))
        key = key_of({"maps": settings.steps, "samples": which})
        maps.append(setup.store.part("over_steps", key, batch.maps))
    columns = ["sample", "task", "image", "method", "stage", "layer", "step", "n_steps", *DISTANCES, "agrees"]
    rows = pd.concat(distances, ignore_index=True)[columns]
    of_maps, seed = pd.concat(maps, ignore_index=True), settings.seed
    steps = ["method", "stage", "layer", "step"]
    return {
        "over_steps": means(rows, steps, (*DISTANCES, "agrees"), PROPORTIONS, seed),
        "over_steps_tests": compare_methods(rows, seed),
        "over_steps_rows": rows,
        "over_steps_maps": means(of_maps, ["layer", "against", "step"], MEASURES, seed=seed),
        "over_steps_maps_rows": of_maps,
    }


def followed(samples: Sequence[Sample], n: int, seed: int = 0) -> tuple[Sample, ...]:
    """Half of ``n`` samples of the data, as many of each task, and descriptions of as many of their images.

    Args:
        samples: of the data.
        n: how many; fewer where those of the data have fewer images.
        seed: of the draw.
    """
    images = images_keys(samples)
    own = stratified(samples, n - n // 2, seed)
    described: dict[str, Sample] = {}
    for sample in own:
        key = images[sample.id]
        if len(described) < n // 2 and key not in described:
            described[key] = Sample(f"{DESCRIBE_TASK}-{key}", sample.images, DESCRIBE, task=DESCRIBE_TASK)
    return (*own, *described.values())


def compare_methods(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """CAPA against every other method, by the mean distance over a sample's steps, paired over samples.

    Args:
        rows: per sample, method, stage and step.
        seed: of the intervals and tests.

    Returns:
        As :func:`capa_probe.benchmark.summary.compare` returns them; a negative difference says that CAPA stays closer
        to the model itself. "every_step" does not prune at the prompt, so that with it the prompt's step is left out.
    """
    first, *others = METHODS
    keys = ["stage", "layer", "method", "sample", "task", "image"]
    found = []
    for other in others:
        steps = rows[rows["step"] > 0] if other == "every_step" else rows
        of_sample = steps.groupby(keys, sort=False)[list(DISTANCES)].mean().reset_index()
        found.append(compare(of_sample, ["stage", "layer"], "method", [(first, other)], DISTANCES, seed))
    return corrected(pd.concat([table for table in found if len(table)], ignore_index=True))


def step_distances(own: Tensor, pruned: Tensor) -> dict[str, Tensor]:
    """How far two sequences of next-token distributions are apart, in float64.

    Args:
        own: (..., vocabulary) logits of the model itself.
        pruned: (..., vocabulary) of the pruned model.

    Returns:
        Each (...): hellinger; kl, of the model's own distribution from the pruned one, in nats; and agrees, 1 where
        both have the same most likely token.
    """
    log_p, log_q = own.double().log_softmax(dim=-1), pruned.double().log_softmax(dim=-1)
    p = log_p.exp()
    return {
        "hellinger": ((p.sqrt() - log_q.exp().sqrt()).norm(dim=-1) / 2**0.5).clamp(max=1),
        "kl": torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1).clamp(min=0),
        "agrees": (own.argmax(dim=-1) == pruned.argmax(dim=-1)).double(),
    }


class _Batch:
    """Samples that run together; the model's own answers are made when first asked for."""

    def __init__(self, setup: Setup, samples: Sequence[Sample], of: Mapping[str, Mapping[str, Any]]) -> None:
        self._setup, self._samples, self._of = setup, samples, of

    @cached_property
    def _own(self) -> tuple[LVLMInputs, Answers]:
        inputs = prepare(self._setup.lvlm, self._samples)
        return inputs, greedy(self._setup.lvlm, inputs, self._setup.settings.steps)

    def distances_maker(self, method: str, layer: int) -> Any:
        def make() -> pd.DataFrame:
            settings = self._setup.settings
            pruner: Pruner = CAPA(
                layers=(layer,), keep=settings.capa_keep, seed=settings.seed, **METHODS[method]
            )
            with memory_errors(f"sample {self._samples[0].id} ({len(self._samples)} in the batch)"):
                inputs, answers = self._own
                with pruner.attach(self._setup.lvlm):
                    found = step_distances(answers.logits, forced(self._setup.lvlm, inputs, answers))
            return pd.DataFrame(self._rows({"method": method, "layer": layer}, answers, found))

        return make

    def _rows(
        self, condition: Mapping[str, Any], answers: Answers, found: Mapping[str, Tensor]
    ) -> Iterator[dict[str, Any]]:
        values = {name: value.cpu().tolist() for name, value in found.items()}
        for row, sample in enumerate(self._samples):
            for step in range(answers.n_steps[row]):
                place = {"sample": sample.id, **self._of[sample.id], **condition, "step": step}
                place["n_steps"] = answers.n_steps[row]
                yield place | {name: value[step][row] for name, value in values.items()}

    def maps(self) -> pd.DataFrame:
        settings, lvlm = self._setup.settings, self._setup.lvlm
        with memory_errors(f"sample {self._samples[0].id} ({len(self._samples)} in the batch)"):
            prof = profile(
                lvlm,
                self._samples,
                steps=settings.steps - 1,  # the prompt's step is one of them
                batch_size=settings.batch_size,
                rows="visual",
                probes=["contribution"],
                progress=False,
            )
        return compare_maps(prof.tokens, self._of, settings.capa_keep)

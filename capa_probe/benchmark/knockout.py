"""Experiment 2: is attention contribution the better proxy of what a visual token does?

Each visual token is knocked out by itself, exactly: from layer l on nobody sees it, as if it alone had been pruned
before layer l. What this does to the output is the truth that every score claims to foretell. The scores come from the
undisturbed run, with the last prompt token as query.

Tables: ``knockout`` (mean rank agreement per layer, reading, effect and score), ``knockout_tests`` (contribution
against every other score, paired over samples), ``knockout_rows`` (per sample) and ``knockout_tokens`` (per token).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from capa_probe.benchmark.answers import prepare
from capa_probe.benchmark.knock_means import means
from capa_probe.benchmark.knock_ranks import STATISTICS, correlate
from capa_probe.benchmark.knock_tail import SCORES, Vanilla, effects, knock_out, run_vanilla
from capa_probe.benchmark.sampling import stratified
from capa_probe.benchmark.setup import Setup, images_keys, key_of
from capa_probe.benchmark.statistics import holm
from capa_probe.benchmark.steps_forced import digest, greedy
from capa_probe.benchmark.summary import compare
from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM
from capa_probe.lvlm.spans import TokenSpans
from capa_probe.memory import memory_errors
from capa_probe.samples import Sample

EFFECTS = ("kl", "hellinger", "first_drop", "answer_drop")
#: The control: a score that knows nothing.
RANDOM = "random"
#: Whose attention is scored: the layer's before the knock-out, as CAPA scores before it prunes, or the first layer's
#: that no longer sees the token.
SCORED_AT = {"previous": -1, "same": 0}
_PLACE = ("image", "tile", "row", "col")


def run(setup: Setup) -> dict[str, pd.DataFrame]:
    """Knock out every visual token of some samples at some layers, and rank-correlate; see the module's docstring.

    Args:
        setup: of the run; ``settings.knockout_samples`` samples, spread over tasks and images, and
            ``settings.knockout_layers`` (the model's stages if None); ``settings.batch_size`` copies run at a time.

    Raises:
        CapaProbeError: a layer out of range, or a model whose layers cannot be run by themselves.
    """
    settings = setup.settings
    layers = settings.knockout_layers or tuple(setup.stages().values())
    if not layers or min(layers) < 1 or max(layers) >= setup.lvlm.n_layers:
        raise CapaProbeError(
            f"knockout_layers={tuple(layers)} was given for a model of {setup.lvlm.n_layers} layers; give layers from "
            f"1 to {setup.lvlm.n_layers - 1}."
        )
    samples = stratified(setup.samples, settings.knockout_samples, settings.seed)
    parts = []
    for sample in setup.bar(samples, "knockout"):
        once = _Once(setup, sample, layers)
        for layer in layers:
            key = key_of({"layer": layer, "sample": digest(sample.id)})
            parts.append(setup.store.part("knockout", key, once.maker(layer)))
    tokens = pd.concat(parts, ignore_index=True)
    rows = correlate(tokens, images_keys(samples), EFFECTS, (*SCORES, RANDOM))
    return {
        "knockout": means(rows, ["layer", "scored_at", "effect", "score"], STATISTICS, seed=settings.seed),
        "knockout_tests": compare_scores(rows, settings.seed),
        "knockout_rows": rows,
        "knockout_tokens": tokens,
    }


def compare_scores(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Contribution against every other score, paired over samples, of all tasks together and of each.

    Args:
        rows: what :func:`~capa_probe.benchmark.knock_ranks.correlate` returns.
        seed: of the intervals and tests.

    Returns:
        As :func:`capa_probe.benchmark.summary.compare` returns them; a positive difference is a lead of contribution,
        and ``p_holm`` is corrected over the layers and scores of one task, reading, effect and statistic.
    """
    pairs = [(SCORES[0], score) for score in (*SCORES[1:], RANDOM)]
    by = ["layer", "scored_at", "effect"]
    tests = compare(rows, by, "score", pairs, STATISTICS, seed)
    families = tests.groupby(["task", "scored_at", "effect", "measure"], sort=False)["p"]
    return tests.assign(p_holm=families.transform(lambda p: holm(p.to_numpy())))


def knockout_table(
    lvlm: HookedLVLM, vanilla: Vanilla, spans: TokenSpans, layer: int, batch_size: int = 16
) -> pd.DataFrame:
    """True effect and scores of every visual token of one sample at one layer.

    Args:
        lvlm: the model.
        vanilla: the undisturbed run.
        spans: of the prompt.
        layer: before which each token is knocked out.
        batch_size: copies of the prompt that run at a time.

    Returns:
        One row per (scored_at, token): layer, scored_at ("previous": scores of layer l - 1's attention, "same": of
        layer l's own), position, image (index within the sample), tile, row, col, the effects
        (:func:`~capa_probe.benchmark.knock_tail.effects`), and the scores, all from the last prompt token.
    """
    measured = [effects(vanilla, logits) for _, logits in knock_out(lvlm, vanilla, layer, None, batch_size)]
    at = vanilla.visual.cpu()
    columns: dict[str, Any] = {"position": at.numpy().astype(np.int32)}
    columns |= {name: values[0, at].numpy() for name, values in spans.places().items()}
    columns |= {name: torch.cat([chunk[name] for chunk in measured]).cpu().numpy() for name in EFFECTS}
    found = []
    for scored_at, offset in SCORED_AT.items():
        scores = {name: vanilla.scores[layer + offset][name].numpy() for name in SCORES}
        found.append(pd.DataFrame({"layer": layer, "scored_at": scored_at, **columns, **scores}))
    return pd.concat(found, ignore_index=True)


class _Once:
    """Runs the undisturbed model on a sample when the first part asks for it, and never twice."""

    def __init__(self, setup: Setup, sample: Sample, layers: Sequence[int]) -> None:
        self._setup, self._sample, self._layers = setup, sample, layers
        self._done: tuple[Mapping[str, Any], Vanilla] | None = None

    def maker(self, layer: int) -> Any:
        def make() -> pd.DataFrame:
            setup, sample = self._setup, self._sample
            with memory_errors(f"sample {sample.id} ({setup.settings.batch_size} copies at a time)"):
                inputs, vanilla = self._vanilla()
                spans = setup.lvlm.spans(inputs)
                table = knockout_table(setup.lvlm, vanilla, spans, layer, setup.settings.batch_size)
            table.insert(0, "sample", sample.id)
            table.insert(1, "task", sample.task or "")
            seed = [setup.settings.seed, layer, int(digest(sample.id), 16)]
            drawn = np.random.default_rng(seed).random(len(vanilla.visual))
            return table.assign(**{RANDOM: np.tile(drawn, len(SCORED_AT))})

        return make

    def _vanilla(self) -> tuple[Mapping[str, Any], Vanilla]:
        if self._done is None:
            setup = self._setup
            inputs = prepare(setup.lvlm, [self._sample])
            answers = greedy(setup.lvlm, inputs, setup.settings.max_new_tokens)
            ids = answers.ids[0, : answers.n_steps[0]]
            # A generated placeholder is text, but in a prompt it would stand for an image: it comes last, not fed back.
            placeholder = ids == setup.lvlm.family.image_token_id(setup.lvlm.model)
            ids = ids[(placeholder.cumsum(dim=0) - placeholder.long()) == 0]
            self._done = inputs, run_vanilla(setup.lvlm, inputs, ids, self._layers)
        return self._done

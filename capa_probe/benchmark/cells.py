"""A cell of an experiment: all samples answered under one condition, compared with the model's own answers.

The rows of every cell have these columns, after those of its condition:

========== ================================================================================================
sample     id
task       "" where the sample has none
image      key that samples of the same images share; what intervals and tests are clustered by
answer     the greedy answer
correct    1 if it is an accepted one (normalised exact match), else 0; NaN where none is known
agrees     1 if it is the model's own answer, unpruned (likewise normalised), else 0
kl         KL divergence, in nats, of the next-token distribution at the last prompt token from the model's own
hellinger  Hellinger distance of the two, in [0, 1]
n_visual   visual tokens of the prompt
n_kept     visual tokens that the last layer's attention saw
flops      FLOPs of the prefill, with vision tower and scoring
seconds    wall time of generating the answer, as a share of its batch
========== ================================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import pandas as pd
import torch

from capa_probe.benchmark.answers import answer, is_correct, normalise
from capa_probe.benchmark.setup import Setup, images_keys, key_of
from capa_probe.benchmark.store import Store
from capa_probe.measures import hellinger, kl_divergence
from capa_probe.pruning import Pruner
from capa_probe.samples import Sample

#: Columns of a cell's rows, without those of its condition.
COLUMNS = (
    "sample",
    "task",
    "image",
    "answer",
    "correct",
    "agrees",
    "kl",
    "hellinger",
    "n_visual",
    "n_kept",
    "flops",
    "seconds",
)
#: The measures among them that are compared.
MEASURES = ("correct", "agrees", "kl", "hellinger")


@dataclass(frozen=True)
class Vanilla:
    """What the model itself gives for a sample.

    Attributes:
        sample: id.
        answer: its greedy answer.
        n_visual: visual tokens of the prompt.
        flops: of the prefill.
        seconds: wall time of generating the answer, as a share of its batch.
        log_probs: (vocab,) log-probabilities of the first new token.
        image: key that samples of the same images share.
    """

    sample: str
    answer: str
    n_visual: int
    flops: float
    seconds: float
    log_probs: torch.Tensor
    image: str


_VANILLA: WeakKeyDictionary[Store, dict[str, Vanilla]] = WeakKeyDictionary()


def vanilla(setup: Setup) -> dict[str, Vanilla]:
    """What the model itself gives for each sample, by sample id; computed once per run."""
    if setup.store not in _VANILLA:
        kept = setup.store.tensors("vanilla", "answers", lambda: _run_vanilla(setup))
        records = json.loads(bytes(kept["records"].tolist()))
        keys = images_keys(setup.samples)
        _VANILLA[setup.store] = {
            record["sample"]: Vanilla(log_probs=log_probs, image=keys[record["sample"]], **record)
            for record, log_probs in zip(records, kept["log_probs"], strict=True)
        }
    return _VANILLA[setup.store]


def vanilla_rows(setup: Setup) -> pd.DataFrame:
    """The rows of the model itself, as those of a cell without a condition."""
    found = vanilla(setup)
    table = [
        {
            **_described(sample, found[sample.id].image),
            "answer": found[sample.id].answer,
            "correct": is_correct(found[sample.id].answer, sample.answers),
            "agrees": 1.0,
            "kl": 0.0,
            "hellinger": 0.0,
            "n_visual": found[sample.id].n_visual,
            "n_kept": found[sample.id].n_visual,
            "flops": found[sample.id].flops,
            "seconds": found[sample.id].seconds,
        }
        for sample in setup.samples
    ]
    return pd.DataFrame(table, columns=list(COLUMNS))


def cell(
    setup: Setup,
    table: str,
    condition: Mapping[str, Any],
    pruner: Pruner,
    samples: Sequence[Sample] | None = None,
) -> pd.DataFrame:
    """The rows of one cell, from the store if they are there.

    Args:
        setup: of the run.
        table: name of the experiment.
        condition: names and values of the columns that tell this cell from the others of the experiment.
        pruner: attached to the model meanwhile.
        samples: some of those of the setup; all if None.
    """
    chosen = setup.samples if samples is None else samples
    before = vanilla(setup)

    def make() -> pd.DataFrame:
        found = _compared(setup, chosen, pruner, before)
        return pd.DataFrame(found, columns=list(COLUMNS))

    rows = setup.store.part(table, key_of(condition), make)
    for number, (name, value) in enumerate(condition.items()):
        rows.insert(number, name, value)
    return rows


def _compared(
    setup: Setup, samples: Sequence[Sample], pruner: Pruner, before: Mapping[str, Vanilla]
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    settings = setup.settings
    for batch in answer(setup.lvlm, samples, pruner, settings.batch_size, settings.max_new_tokens):
        own = samples[len(found) : len(found) + len(batch.texts)]
        reference = torch.stack([before[sample.id].log_probs for sample in own])
        kl = kl_divergence(reference, batch.log_probs).tolist()
        distance = hellinger(reference.exp(), batch.log_probs.exp()).tolist()
        for row, sample in enumerate(own):
            known = before[sample.id]
            text = batch.texts[row]
            found.append(
                {
                    **_described(sample, known.image),
                    "answer": text,
                    "correct": is_correct(text, sample.answers),
                    "agrees": float(normalise(text) == normalise(known.answer)),
                    "kl": kl[row],
                    "hellinger": distance[row],
                    "n_visual": batch.visual[row],
                    "n_kept": batch.kept[row],
                    "flops": float(batch.flops[row]),
                    "seconds": batch.seconds,
                }
            )
    return found


def _run_vanilla(setup: Setup) -> dict[str, torch.Tensor]:
    settings = setup.settings
    n_batches = -(-len(setup.samples) // settings.batch_size)
    batches = answer(setup.lvlm, setup.samples, None, settings.batch_size, settings.max_new_tokens)
    log_probs, records = [], list[dict[str, Any]]()
    for _ in setup.bar(range(n_batches), "unpruned"):
        batch = next(batches)
        log_probs.append(batch.log_probs)
        for row, text in enumerate(batch.texts):
            records.append(
                {
                    "sample": setup.samples[len(records)].id,
                    "answer": text,
                    "n_visual": batch.visual[row],
                    "flops": float(batch.flops[row]),
                    "seconds": batch.seconds,
                }
            )
    # Texts and numbers in the same file, so that they are there together or not at all.
    content = torch.tensor(list(json.dumps(records).encode()), dtype=torch.uint8)
    return {"log_probs": torch.cat(log_probs), "records": content}


def _described(sample: Sample, image: str) -> dict[str, Any]:
    return {"sample": sample.id, "task": sample.task or "", "image": image}

"""The measurements of ``capa_speed.py``: what is timed and how, and what is predicted for it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from _speed_models import Width
from torch import Tensor

from capa_probe.flops import Shape, kv_cache_values, prefill_cost, scorer_cost
from capa_probe.lvlm import HookedLVLM
from capa_probe.pruning.capa import CAPA
from capa_probe.pruning.ffn import HadamardFFN
from capa_probe.pruning.keep import n_kept
from capa_probe.pruning.scoring import Scoring

#: A measurement whose wall time is above so many times its CPU time per thread shared the machine with something.
DISTURBED = 1.1
SCORES = ("attention", "contribution", "removal_effect")


@dataclass
class Seconds:
    """How long something took: on the clock, and summed over the processors that ran it."""

    wall: float = 0.0
    cpu: float = 0.0

    @property
    def disturbed(self) -> bool:
        """Whether other programs held it up; on a GPU that cannot be told, and is taken as no."""
        return not torch.cuda.is_initialized() and self.wall > DISTURBED * self.cpu / torch.get_num_threads()


@contextmanager
def timed() -> Iterator[Seconds]:
    """Time a block, to the end of what it asked of a GPU."""
    found = Seconds()
    _wait()
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    _wait()
    found.wall, found.cpu = time.perf_counter() - wall, time.process_time() - cpu


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass
class Generation:
    """One answer: its prefill, ``steps`` decode steps, and the KV cache after prefill."""

    prefill: Seconds
    decode: Seconds
    cache_bytes: int

    @property
    def disturbed(self) -> bool:
        return self.prefill.disturbed or self.decode.disturbed


@dataclass(frozen=True)
class TimedScores(CAPA):
    """CAPA that times several scores on what it sees at its pruning layer."""

    times: dict[str, list[Seconds]] = field(default_factory=dict, compare=False)

    def score_tokens(self, scoring: Scoring) -> Tensor:
        for _ in range(3):
            for score in SCORES:
                fresh = replace(scoring)  # without what was computed before
                with timed() as seconds:
                    replace(self, score=score).measure(fresh)
                self.times.setdefault(score, []).append(seconds)
        return self.measure(scoring)

    def measure(self, scoring: Scoring) -> Tensor:
        """The score itself."""
        return super().score_tokens(scoring)


def generate(lvlm: HookedLVLM, inputs: dict[str, Tensor], pruner: CAPA | None, steps: int) -> Generation:
    """Prefill, attaching the pruner included, and greedy decoding."""
    model = lvlm.model
    with ExitStack() as stack:
        with timed() as prefill:
            if pruner is not None:
                stack.enter_context(pruner.attach(lvlm))
            out = model(**inputs, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        n_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        with timed() as decode:
            for _ in range(steps):
                token = out.logits[:, -1:].argmax(dim=-1)
                out = model(input_ids=token, past_key_values=cache, use_cache=True)
    return Generation(prefill, decode, n_bytes)


def undisturbed(run: Callable[[], Generation], repeats: int) -> Generation:
    """A run, taken again ``repeats`` times at most while it is disturbed."""
    found = run()
    for _ in range(repeats):
        if not found.disturbed:
            break
        found = run()
    return found


class Comparison:
    """Vanilla and pruned generation on one prompt, round by round."""

    def __init__(
        self,
        lvlm: HookedLVLM,
        width: Width,
        arguments: argparse.Namespace,
        visual: int,
        ran_on: dict[str, Any],
    ) -> None:
        self.lvlm, self.arguments = lvlm, arguments
        self.shape, self.grids = Shape.of(lvlm.model.config), width.grids(visual)
        self.inputs = width.prompt(lvlm.model, visual, arguments.text_tokens)
        self.prune, self.hadamard = width.plan(lvlm.n_layers)
        self.counts = {"visual": visual, "text": arguments.text_tokens}
        ffn = HadamardFFN({layer: torch.full((self.shape.d_model,), 1.01) for layer in self.hadamard})
        self.pruners: dict[float | None, CAPA | None] = {None: None}
        for keep in sorted(arguments.keep, reverse=True):
            self.pruners[keep] = CAPA(layers=(self.prune,), keep=keep, ffn=ffn)
        self.settings = {
            "machine": ran_on,
            "model": f"{width.paper}, tiny" if arguments.quick else width.paper,
            "n_layers": lvlm.n_layers,
            "prune": self.prune,
            "hadamard": list(self.hadamard),
            **self.counts,
            "steps": arguments.steps,
        }

    def warm_up(self) -> None:
        """The smallest budget alone: its first layers see the whole prompt, its later ones few tokens."""
        self._generate(min(self.arguments.keep), 1)

    def round(self, number: int) -> dict[str, Any]:
        """One measurement of everything, every other round backwards."""
        rows = [self._counted(keep) for keep in self.pruners]
        for row in reversed(rows) if number % 2 else rows:
            keep = row["keep"]
            run = undisturbed(
                lambda keep=keep: self._generate(keep, self.arguments.steps), self.arguments.repeats
            )
            if run.cache_bytes != row["cache_bytes"]:
                raise SystemExit(
                    f"The KV cache holds {run.cache_bytes} bytes instead of {row['cache_bytes']}."
                )
            row["prefill"], row["decode"] = [asdict(run.prefill)], [asdict(run.decode)]
            row["disturbed"] = [run.disturbed]
            print(
                f"    {keep or 'all'}: {run.prefill.cpu:.2f} s, on the clock {run.prefill.wall:.2f} s",
                flush=True,
            )
        times: dict[str, list[Seconds]] = {}
        scores = TimedScores(layers=(self.prune,), keep=min(self.arguments.keep), times=times)
        with scores.attach(self.lvlm):
            self.lvlm.model(**self.inputs, logits_to_keep=1)
        scoring = {
            score: {
                "flops": scorer_cost(self.shape, **self.counts, score=score),
                "seconds": [asdict(seconds) for seconds in times[score][1:]],  # the first warms up
            }
            for score in SCORES
        }
        return {**self.settings, "rows": rows, "scoring": scoring}

    def _generate(self, keep: float | None, steps: int) -> Generation:
        return generate(self.lvlm, self.inputs, self.pruners[keep], steps)

    def _counted(self, keep: float | None) -> dict[str, Any]:
        """What is known without running: tokens, FLOPs, bytes."""
        whole = prefill_cost(self.shape, **self.counts, grids=self.grids)
        kept = {} if keep is None else {self.prune: n_kept(keep, self.counts["visual"])}
        cost = whole
        if keep is not None:
            cost = prefill_cost(
                self.shape,
                **self.counts,
                grids=self.grids,
                kept=kept,
                hadamard=self.hadamard,
                score="contribution",
            )
        cache = self.lvlm.model.dtype.itemsize * kv_cache_values(self.shape, **self.counts, kept=kept)
        return {
            "keep": keep,
            "kept": kept.get(self.prune, self.counts["visual"]),
            "flops": cost.total,
            "predicted": whole.total / cost.total,
            "cache_bytes": cache,
            "decode_bytes": _decoded_bytes(self.lvlm.model) + cache,
        }


def add(results: dict[str, Any], new: dict[str, Any]) -> None:
    """Put a round to those of the same settings, or in place of rounds with other ones."""
    kept = []
    for old in results["comparisons"]:
        if _place(old) != _place(new):
            kept.append(old)
        elif _settings(old) == _settings(new):
            for row, more in zip(old["rows"], new["rows"], strict=True):
                for what in ("prefill", "decode", "disturbed"):
                    more[what] = row[what] + more[what]
            for score, found in new["scoring"].items():
                found["seconds"] = old["scoring"][score]["seconds"] + found["seconds"]
    results["comparisons"] = sorted([*kept, new], key=_place)


def rounds_held(results: dict[str, Any], comparison: Comparison) -> int:
    """Rounds of this comparison that the results hold already."""
    held = [each for each in results["comparisons"] if _place(each) == _place(comparison.settings)]
    return len(held[0]["rows"][0]["prefill"]) if held else 0


def _place(comparison: dict[str, Any]) -> tuple[Any, ...]:
    machine = comparison["machine"]
    return (
        machine["gpu"] or "",
        machine["processor"],
        machine["dtype"],
        comparison["model"],
        comparison["n_layers"],
        comparison["visual"],
    )


def _settings(comparison: dict[str, Any]) -> dict[str, Any]:
    """All that a round does not measure."""
    counted = [
        {name: value for name, value in row.items() if name not in ("prefill", "decode", "disturbed")}
        for row in comparison["rows"]
    ]
    return {**comparison, "rows": counted, "scoring": None}


def _decoded_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that a decode step reads: decoder and output head."""
    parts = (model.base_model.language_model.layers, model.lm_head)
    return sum(weight.nbytes for part in parts for weight in part.parameters())

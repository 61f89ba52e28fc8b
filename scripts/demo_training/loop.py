"""The training loop: two optimizers, a schedule, checkpoints, and resuming to the very same weights.

A batch is a function of (seed, stage, step) and nothing else, so parameters and optimizer state are all there is to
save: safetensors for the tensors, JSON for the rest.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """How a stage is optimized.

    Attributes:
        steps: in all.
        muon, adamw: peak learning rates; Muon takes the matrices, AdamW embeddings, norms and output heads.
        weight_decay: of Muon.
        warmup: steps.
        tail: share of the steps, at the end, over which the rates fall to zero.
        slow: rate relative to the others of the modules that a stage names as slow.
        stop: step at which the stage ends, where the next one goes on before the rates have fallen to zero.
    """

    steps: int
    muon: float
    adamw: float
    weight_decay: float = 0.1
    warmup: int = 50
    tail: float = 0.4
    slow: float = 0.1
    stop: int | None = None

    def rate(self, step: int) -> float:
        """Share of the peak rate at a step (from 0)."""
        rise = min(1.0, (step + 1) / self.warmup)
        return rise * min(1.0, (self.steps - step) / (self.tail * self.steps))


@dataclass
class Stage:
    """One part of the recipe.

    Attributes:
        name: of the checkpoint and in the log.
        schedule: how it is optimized.
        trained: modules that it trains, by name.
        batch: step -> data, on the CPU, a function of the step alone.
        loss: data, step -> loss and, by name, lists of right or wrong answers.
        slow: names in ``trained`` whose rate is lowered.
        rate: step -> by what the schedule's rate is multiplied.
    """

    name: str
    schedule: Schedule
    trained: Mapping[str, nn.Module]
    batch: Callable[[int], Any]
    loss: Callable[[Any], tuple[Tensor, dict[str, list[bool]]]]
    slow: tuple[str, ...] = ()
    rate: Callable[[int], float] = lambda step: 1.0


CLIP_NORM = 0.5
CHECKPOINT_EVERY = 100
LOG_EVERY = 25


def run_stage(
    stage: Stage,
    folder: Path,
    report: Callable[[str], None],
    stop_at: int | None = None,
    workers: int = 0,
) -> None:
    """Train a stage to its end, from its last checkpoint if there is one.

    Args:
        stage: what to train.
        folder: holds checkpoints and ``log.jsonl``.
        report: is told a line now and then.
        stop_at: stop after so many steps, as if interrupted; for tests.
        workers: processes that draw batches ahead; 0 draws the next one in a thread. The batches are the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {
        f"{name}.{key}": value
        for name, module in stage.trained.items()
        for key, value in module.named_parameters()
    }
    optimizers = _optimizers(stage, parameters)
    state = _Checkpoint(folder / stage.name, parameters, optimizers)
    first, spent = state.load(asdict(stage.schedule))
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    started, answers, losses = time.monotonic() - spent, {}, []
    ends = (stage.schedule.steps, stage.schedule.stop, stop_at)
    last = min(end for end in ends if end is not None)
    with _pool(workers) as ahead:
        coming = deque(
            ahead.submit(stage.batch, step) for step in range(first, min(last, first + workers + 1))
        )
        for step in range(first, last):
            data = coming.popleft().result()
            if step + workers + 1 < last:
                coming.append(ahead.submit(stage.batch, step + workers + 1))
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = peak * stage.schedule.rate(step) * stage.rate(step)
                optimizer.zero_grad()
            loss, right = stage.loss(data)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), CLIP_NORM, error_if_nonfinite=True)
            for optimizer in optimizers:
                optimizer.step()

            losses.append(loss.item())
            for name, values in right.items():
                answers.setdefault(name, []).extend(values)
            if (step + 1) % LOG_EVERY == 0 or step + 1 == last:
                line = {
                    "stage": stage.name,
                    "step": step + 1,
                    "seconds": round(time.monotonic() - started, 1),
                    "loss": round(sum(losses) / len(losses), 5),
                    "accuracy": {name: round(sum(v) / len(v), 4) for name, v in answers.items()},
                }
                with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
                report(_sentence(line))
                answers, losses = {}, []
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == last:
                state.save(step + 1, time.monotonic() - started, asdict(stage.schedule))


def _pool(workers: int) -> Executor:
    # Spawned: a process that has used a GPU or threads must not be forked.
    return ProcessPoolExecutor(workers, get_context("spawn")) if workers else ThreadPoolExecutor(1)


def _optimizers(stage: Stage, parameters: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    def is_matrix(name: str, value: Tensor) -> bool:
        return value.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "heads", "symbols"))

    def groups(matrices: bool, peak: float) -> list[dict[str, Any]]:
        found = []
        for slow in (False, True):
            chosen = [
                value
                for name, value in parameters.items()
                if is_matrix(name, value) == matrices and (name.split(".")[0] in stage.slow) == slow
            ]
            if chosen:
                found.append({"params": chosen, "lr": peak * (stage.schedule.slow if slow else 1.0)})
        return found

    muon = torch.optim.Muon(
        groups(True, stage.schedule.muon),
        lr=stage.schedule.muon,
        weight_decay=stage.schedule.weight_decay,
        adjust_lr_fn="original",
    )
    adamw = torch.optim.AdamW(
        groups(False, stage.schedule.adamw), lr=stage.schedule.adamw, weight_decay=0.01, betas=(0.9, 0.98)
    )
    return [muon, adamw]


class _Checkpoint:
    """Parameters and optimizer state of one stage: ``NAME.safetensors`` and ``NAME.json``."""

    def __init__(
        self,
        path: Path,
        parameters: Mapping[str, nn.Parameter],
        optimizers: list[torch.optim.Optimizer],
    ) -> None:
        self._tensors, self._facts = path.with_suffix(".safetensors"), path.with_suffix(".json")
        self._parameters, self._optimizers = parameters, optimizers

    def save(self, step: int, seconds: float, schedule: dict[str, Any]) -> None:
        tensors = {name: value.detach().contiguous() for name, value in self._parameters.items()}
        for i, optimizer in enumerate(self._optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer{i}.{index}.{key}": value for key, value in state.items()}
        facts = {"step": step, "seconds": seconds, "schedule": schedule}
        # The facts lie inside the file as well: the two can never belong to different steps.
        temporary = self._tensors.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})
        temporary.replace(self._tensors)
        temporary = self._facts.with_suffix(".tmp")
        temporary.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        temporary.replace(self._facts)

    def load(self, schedule: dict[str, Any]) -> tuple[int, float]:
        """Steps done and seconds spent so far."""
        from safetensors import safe_open

        if not self._tensors.is_file():
            return 0, 0.0
        with safe_open(self._tensors, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
        if facts["schedule"] != schedule:
            raise SystemExit(
                f"{self._tensors} was made with other settings ({facts['schedule']}); "
                "give another --work folder or remove this file."
            )
        tensors = load_file(self._tensors)
        with torch.no_grad():
            for name, value in self._parameters.items():
                value.copy_(tensors[name])
        for i, optimizer in enumerate(self._optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith(f"optimizer{i}."):
                    _, index, key = name.split(".")
                    state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return facts["step"], facts["seconds"]


def _sentence(line: dict[str, Any]) -> str:
    shares = "  ".join(f"{name} {value:.2f}" for name, value in line["accuracy"].items())
    return f"{line['stage']} {line['step']}  {line['seconds']:.0f} s  loss {line['loss']:.3f}  {shares}"

"""The recipe: tower, symbols, projector, joint.

1. ``tower``: every patch learns to tell what its own cell holds.
2. ``symbols``: the decoder learns all tasks on scenes of nine tokens, each the sum of what a cell holds.
3. ``projector``: patch features are mapped onto those tokens by regression.
4. ``joint``: everything together, on images; the last part in prompt form only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from capa_probe.demo.dataset import split_rng
from capa_probe.demo.drawing import render
from capa_probe.demo.scenes import Scene, random_scene
from capa_probe.demo.worlds import SMALL
from demo_training.architecture import BOARD, PATCH_CELL, Parts, describe_cells
from demo_training.loop import Schedule, Stage
from demo_training.turns import PackedTurns, TurnStyle, draw_questions, pack, right_by_task
from demo_training.vocabulary import BOS, PATCHES_PER_SIDE, USER, build_processor, build_tokenizer

NAMES = ("tower", "symbols", "projector", "joint")
SCHEDULES = {
    "tower": Schedule(steps=900, muon=0.01, adamw=2e-3, warmup=30, tail=0.5),
    "symbols": Schedule(steps=1500, muon=0.004, adamw=1.5e-3),
    "projector": Schedule(steps=300, muon=0.01, adamw=2e-3, warmup=20, tail=0.5, weight_decay=0.0),
    "joint": Schedule(steps=600, muon=0.003, adamw=1e-3),
}
SCENES_PER_STEP = {"tower": 64, "symbols": 16, "projector": 64, "joint": 16}

#: Shares of the tasks, in the order of the world's: first the simple ones, then above all relation.
_FIRST_WEIGHTS = dict(zip(SMALL.tasks, (0.30, 0.14, 0.10, 0.10, 0.14, 0.10, 0.12), strict=True))
_LATER_WEIGHTS = dict(zip(SMALL.tasks, (0.24, 0.10, 0.06, 0.06, 0.12, 0.06, 0.36), strict=True))
_JOINT_WEIGHTS = dict(zip(SMALL.tasks, (0.22, 0.10, 0.12, 0.10, 0.16, 0.12, 0.18), strict=True))


def symbols_style(done: float) -> TurnStyle:
    """Turns when a share of the symbols stage is done."""
    return TurnStyle(
        weights=_FIRST_WEIGHTS if done < 0.35 else _LATER_WEIGHTS, template=0.0 if done < 0.25 else 0.6
    )


def joint_style(done: float) -> TurnStyle:
    """Turns when a share of the joint stage is done."""
    return TurnStyle(
        weights=_JOINT_WEIGHTS, template=0.6 if done < 0.5 else 1.0, easy=0.3 if done < 0.5 else 0.1
    )


def build_stage(name: str, parts: Parts, seed: int, device: torch.device, steps: int | None = None) -> Stage:
    """A stage of the recipe on a model; ``steps`` shortens it, for tests."""
    schedule = SCHEDULES[name]
    if steps is not None:
        schedule = Schedule(**{**schedule.__dict__, "steps": steps})
    trained = {
        "tower": {"tower": parts.tower, "heads": parts.heads},
        "symbols": {"decoder": parts.decoder, "lm_head": parts.lvlm.lm_head, "symbols": parts.symbols},
        "projector": {"projector": parts.projector},
        "joint": {
            "tower": parts.tower,
            "projector": parts.projector,
            "decoder": parts.decoder,
            "lm_head": parts.lvlm.lm_head,
        },
    }[name]
    batch, loss = _JOBS[name]
    return Stage(
        name,
        schedule,
        trained,
        batch=_Batch(batch, name, seed, schedule.steps),
        loss=partial(loss, parts, device),
        slow=("tower",) if name == "joint" else (),
    )


class _Batch:
    """Data of a step, from nothing but the seed, the stage and the step."""

    def __init__(self, draw: Callable[..., object], name: str, seed: int, steps: int) -> None:
        self._draw, self._name, self._seed, self._steps = draw, name, seed, steps
        self._tokenizer, self._images = build_tokenizer(), build_processor().image_processor

    def __call__(self, step: int) -> object:
        rng = split_rng("train", self._seed, NAMES.index(self._name), step)
        scenes = [random_scene(rng) for _ in range(SCENES_PER_STEP[self._name])]
        return self._draw(self, scenes, rng, step / self._steps)

    def pixels(self, scenes: list[Scene]) -> Tensor:
        return self._images([render(scene) for scene in scenes], return_tensors="pt")["pixel_values"]

    def turns(self, scenes: list[Scene], style: TurnStyle, rng: np.random.Generator) -> PackedTurns:
        return pack([draw_questions(scene, style, rng) for scene in scenes], style, rng, self._tokenizer)


def _draw_cells_and_pixels(
    batch: _Batch, scenes: list[Scene], rng: object, done: float
) -> tuple[Tensor, Tensor]:
    return batch.pixels(scenes), torch.tensor([describe_cells(scene) for scene in scenes])


def _draw_symbols(
    batch: _Batch, scenes: list[Scene], rng: np.random.Generator, done: float
) -> tuple[Tensor, Tensor, PackedTurns]:
    turns = batch.turns(scenes, symbols_style(done), rng)
    # A cell stands at the position of one of its patches, so that the decoder meets the positions of an image.
    side = PATCHES_PER_SIDE // BOARD
    cells = np.arange(BOARD**2)
    first = cells // BOARD * side * PATCHES_PER_SIDE + cells % BOARD * side
    row, col = rng.integers(side, size=(2, len(scenes), BOARD**2))
    positions = torch.from_numpy(2 + first + row * PATCHES_PER_SIDE + col)
    return torch.tensor([describe_cells(scene) for scene in scenes]), positions, turns


def _draw_joint(
    batch: _Batch, scenes: list[Scene], rng: np.random.Generator, done: float
) -> tuple[Tensor, PackedTurns]:
    return batch.pixels(scenes), batch.turns(scenes, joint_style(done), rng)


def _tower_loss(
    parts: Parts, device: torch.device, data: tuple[Tensor, Tensor]
) -> tuple[Tensor, dict[str, list[bool]]]:
    pixels, cells = (tensor.to(device) for tensor in data)
    with torch.autocast(device.type, torch.bfloat16):
        scores = parts.heads(parts.patch_features(pixels))
    wanted = cells[:, :, PATCH_CELL.to(device)]  # (batch, field, patch)
    losses = [F.cross_entropy(s.float().flatten(0, 1), wanted[:, i].flatten()) for i, s in enumerate(scores)]
    # Where a patch lies is easy, and in its position embedding from the start.
    loss = sum(losses[:4], torch.zeros((), device=device)) + 0.2 * sum(
        losses[4:], torch.zeros((), device=device)
    )
    right = [(s.argmax(dim=-1) == wanted[:, i]) for i, s in enumerate(scores)]
    names = ("shape", "color", "character 1", "character 2", "row", "column")
    return loss, {name: r.flatten().tolist() for name, r in zip(names, right, strict=True)}


def _symbols_loss(
    parts: Parts, device: torch.device, data: tuple[Tensor, Tensor, PackedTurns]
) -> tuple[Tensor, dict[str, list[bool]]]:
    cells, positions, turns = data
    return turns_loss(parts, parts.symbols(cells.to(device)), positions.to(device), turns)


def _joint_loss(
    parts: Parts, device: torch.device, data: tuple[Tensor, PackedTurns]
) -> tuple[Tensor, dict[str, list[bool]]]:
    pixels, turns = data
    with torch.autocast(device.type, torch.bfloat16):
        visual = parts.projector(parts.patch_features(pixels.to(device)))
    positions = 2 + torch.arange(visual.shape[1], device=device).expand(len(visual), -1)
    return turns_loss(parts, visual, positions, turns)


def turns_loss(
    parts: Parts, visual: Tensor, positions: Tensor, turns: PackedTurns
) -> tuple[Tensor, dict[str, list[bool]]]:
    """Cross-entropy of the answers, and which turns are right.

    Args:
        parts: the model.
        visual: (batch, visual token, d_model).
        positions: (batch, visual token) position ids of the visual tokens.
        turns: what is asked.
    """
    with torch.autocast(visual.device.type, torch.bfloat16):
        logits = turn_logits(parts, visual, positions, turns)
    labels = turns.labels.to(logits.device)
    asked = labels >= 0
    loss = F.cross_entropy(logits[asked].float(), labels[asked])
    return loss, right_by_task(logits.detach().float().cpu(), turns)


def turn_logits(parts: Parts, visual: Tensor, positions: Tensor, turns: PackedTurns) -> Tensor:
    """(batch, position, vocabulary) logits of packed turns."""
    device, batch = visual.device, len(visual)
    embed = parts.decoder.embed_tokens
    opening = torch.tensor([BOS, build_tokenizer().convert_tokens_to_ids(USER)], device=device)
    n_prefix = len(opening) + visual.shape[1]
    embedded = torch.cat(
        [embed(opening).expand(batch, -1, -1), visual.to(embed.weight.dtype), embed(turns.ids.to(device))],
        dim=1,
    )
    places = torch.cat(
        [torch.arange(len(opening), device=device).expand(batch, -1), positions, turns.positions.to(device)],
        dim=1,
    )
    hidden = parts.decoder(
        inputs_embeds=embedded,
        attention_mask=turns.mask(n_prefix).to(device),
        position_ids=places,
        use_cache=False,
    ).last_hidden_state[:, n_prefix:]
    return parts.lvlm.lm_head(hidden)


def _projector_loss(
    parts: Parts, device: torch.device, data: tuple[Tensor, Tensor]
) -> tuple[Tensor, dict[str, list[bool]]]:
    pixels, cells = (tensor.to(device) for tensor in data)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        features = parts.patch_features(pixels)
        wanted = parts.symbols(cells)[:, PATCH_CELL.to(device)].float()
    with torch.autocast(device.type, torch.bfloat16):
        found = parts.projector(features)
    return F.mse_loss(found.float(), wanted) / wanted.var(), {}


_JOBS = {
    "tower": (_draw_cells_and_pixels, _tower_loss),
    "symbols": (_draw_symbols, _symbols_loss),
    "projector": (_draw_cells_and_pixels, _projector_loss),
    "joint": (_draw_joint, _joint_loss),
}

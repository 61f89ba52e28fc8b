"""The stages of the recipe: tower, symbols, projector, hops, joint.

1. ``tower``: every patch learns to tell what its sketch says (see :mod:`demo_training.sketches`).
2. ``symbols``: the decoder learns all tasks on scenes of a few tokens, each the sum of what a patch shows.
3. ``projector``: patch features are mapped onto those tokens by regression.
4. ``hops``: the decoder again on such scenes, mostly questions that take several looks.
5. ``joint``: everything together, on images; the last part in prompt form only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from capa_probe.demo.dataset import split_rng
from capa_probe.demo.drawing import render, render_with_marks
from capa_probe.demo.scenes import Scene, random_scene
from demo_training.architecture import Parts
from demo_training.loop import Stage
from demo_training.recipe import NAMES, Phase, Recipe
from demo_training.sketches import NOTHING, Sketch, field_sizes, sketch_patches, sketch_symbols
from demo_training.turns import PackedTurns, draw_questions, pack, right_by_task
from demo_training.vocabulary import BOS, USER, build_processor, build_tokenizer


def build_stage(
    name: str,
    parts: Parts,
    seed: int,
    device: torch.device,
    steps: int | None = None,
    scenes: int | None = None,
) -> Stage:
    """A stage of a model's recipe; ``steps`` and ``scenes`` (per step) shorten it, for tests."""
    recipe = parts.recipe
    schedule = recipe.schedules[name]
    if steps is not None:
        schedule = replace(schedule, steps=steps, stop=None)
    trained = {
        "tower": {"tower": parts.tower, "heads": parts.heads},
        "symbols": {"decoder": parts.decoder, "lm_head": parts.lvlm.lm_head, "symbols": parts.symbols},
        "projector": {"projector": parts.projector},
        "hops": {"decoder": parts.decoder, "lm_head": parts.lvlm.lm_head},
        "joint": {
            "tower": parts.tower,
            "projector": parts.projector,
            "decoder": parts.decoder,
            "lm_head": parts.lvlm.lm_head,
        },
    }[name]
    draw, loss = _JOBS[name]
    return Stage(
        name,
        schedule,
        trained,
        batch=_Batch(draw, name, recipe, seed, schedule.steps, scenes),
        loss=partial(loss, parts, device),
        slow=("tower",) if name == "joint" else (),
        rate=lambda step: recipe.phase(name, step / schedule.steps).rate if name in recipe.phases else 1.0,
    )


class _Batch:
    """Data of a step, from nothing but the seed, the stage and the step."""

    def __init__(
        self,
        draw: Callable[..., object],
        name: str,
        recipe: Recipe,
        seed: int,
        steps: int,
        n_scenes: int | None,
    ) -> None:
        self.recipe, self._draw, self._name, self._seed = recipe, draw, name, seed
        self._steps, self._n_scenes = steps, n_scenes
        self._tokenizer = build_tokenizer(recipe.world)
        self._images = build_processor(recipe.world).image_processor

    def __call__(self, step: int) -> object:
        rng = split_rng("train", self._seed, NAMES.index(self._name), step)
        phase = (
            self.recipe.phase(self._name, step / self._steps) if self._name in self.recipe.phases else None
        )
        world = phase.world(self.recipe.world) if phase else self.recipe.world
        n_scenes = self._n_scenes or (phase and phase.scenes) or self.recipe.scenes[self._name]
        scenes = [random_scene(rng, world) for _ in range(n_scenes)]
        return self._draw(self, scenes, rng, phase)

    def pixels(self, scenes: list[Scene]) -> Tensor:
        return self._to_pixels([render(scene) for scene in scenes])

    def pixels_and_sketches(self, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        drawn = [render_with_marks(scene) for scene in scenes]
        sketches: list[Sketch] = [
            sketch_patches(scene, marks) for scene, (_, marks) in zip(scenes, drawn, strict=True)
        ]
        return self._to_pixels([image for image, _ in drawn]), torch.tensor(sketches)

    def turns(self, scenes: list[Scene], phase: Phase, rng: np.random.Generator) -> PackedTurns:
        return pack(
            [draw_questions(scene, phase.style, rng) for scene in scenes], phase.style, rng, self._tokenizer
        )

    def _to_pixels(self, images: list[object]) -> Tensor:
        return self._images(images, return_tensors="pt")["pixel_values"]


def _draw_sketches(batch: _Batch, scenes: list[Scene], rng: object, phase: None) -> tuple[Tensor, Tensor]:
    return batch.pixels_and_sketches(scenes)


def _draw_symbols(
    batch: _Batch, scenes: list[Scene], rng: np.random.Generator, phase: Phase
) -> tuple[Tensor, Tensor, PackedTurns]:
    turns = batch.turns(scenes, phase, rng)
    n = phase.tokens or batch.recipe.symbol_tokens
    drawn = [sketch_symbols(scene, n, rng, phase.most) for scene in scenes]
    patches = torch.tensor([chosen for _, chosen in drawn])
    return torch.tensor([sketch for sketch, _ in drawn]), 2 + patches, turns


def _draw_joint(
    batch: _Batch, scenes: list[Scene], rng: np.random.Generator, phase: Phase
) -> tuple[Tensor, PackedTurns]:
    return batch.pixels(scenes), batch.turns(scenes, phase, rng)


def _tower_loss(
    parts: Parts, device: torch.device, data: tuple[Tensor, Tensor]
) -> tuple[Tensor, dict[str, list[bool]]]:
    pixels, wanted = (tensor.to(device) for tensor in data)
    with torch.autocast(device.type, torch.bfloat16):
        scores = parts.heads(parts.patch_features(pixels))
    loss, right = torch.zeros((), device=device), {}
    for i, (name, s) in enumerate(zip(field_sizes(parts.recipe.world), scores, strict=True)):
        # Where a patch lies is easy, and in its position embedding from the start.
        weight = 1.0 if i < len(NOTHING) else 0.2
        loss = loss + weight * F.cross_entropy(s.float().flatten(0, 1), wanted[..., i].flatten())
        hit = s.argmax(dim=-1) == wanted[..., i]
        # Most patches show nothing: what counts is the others, and how often nothing is taken for something.
        there = wanted[..., i] != NOTHING[i] if i < len(NOTHING) else torch.ones_like(hit)
        right[name] = hit[there].tolist()
        if i < len(NOTHING):
            right[f"no {name}"] = hit[~there].tolist()
    return loss, {name: values for name, values in right.items() if values}


def _symbols_loss(
    parts: Parts, device: torch.device, data: tuple[Tensor, Tensor, PackedTurns]
) -> tuple[Tensor, dict[str, list[bool]]]:
    sketches, positions, turns = data
    return turns_loss(parts, parts.symbols(sketches.to(device)), positions.to(device), turns)


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
    opening = torch.tensor(
        [BOS, build_tokenizer(parts.recipe.world).convert_tokens_to_ids(USER)], device=device
    )
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
    pixels, sketches = (tensor.to(device) for tensor in data)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        features = parts.patch_features(pixels)
        wanted = parts.symbols(sketches).float()
    with torch.autocast(device.type, torch.bfloat16):
        found = parts.projector(features)
    return F.mse_loss(found.float(), wanted) / wanted.var(), {}


_JOBS = {
    "tower": (_draw_sketches, _tower_loss),
    "symbols": (_draw_symbols, _symbols_loss),
    "projector": (_draw_sketches, _projector_loss),
    "hops": (_draw_symbols, _symbols_loss),
    "joint": (_draw_joint, _joint_loss),
}

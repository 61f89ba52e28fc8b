"""The stages of the recipe: tower, in one family shrunk, symbols, projector, hops, joint.

1. ``tower``: every patch learns to tell what its sketch says (see :mod:`demo_training.sketches`).
   ``shrunk``: again, on boards that the image processor makes smaller.
2. ``symbols``: the decoder learns all tasks on scenes of a few tokens, each the sum of what a patch shows.
3. ``projector``: patch features are mapped onto those tokens by regression.
4. ``hops``: the decoder again on such scenes, mostly questions that take several looks.
5. ``joint``: everything together, on images; the last part in prompt form only. ``polish``: that part again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from capa_probe.demo.dataset import split_rng
from capa_probe.demo.drawing import render, render_with_marks
from capa_probe.demo.scenes import Scene, random_scene
from demo_training.architecture import Parts
from demo_training.families import Layout
from demo_training.loop import Stage
from demo_training.recipe import NAMES, Phase, Recipe
from demo_training.sketches import NOTHING, Sketch, sketch_patches, sketch_symbols
from demo_training.turns import PackedTurns, draw_questions, pack, right_by_task
from demo_training.visual import Seen, padded


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
    whole = {
        "tower": parts.tower,
        "projector": parts.projector,
        "decoder": parts.decoder,
        "lm_head": parts.lvlm.lm_head,
    }
    trained = {
        "tower": {"tower": parts.tower, "heads": parts.heads},
        "shrunk": {"tower": parts.tower, "heads": parts.heads},
        "symbols": {"decoder": parts.decoder, "lm_head": parts.lvlm.lm_head, "symbols": parts.symbols},
        "projector": {"projector": parts.projector},
        "hops": {"decoder": parts.decoder, "lm_head": parts.lvlm.lm_head},
        "joint": whole,
        "polish": whole,
    }[name]
    draw, loss = _JOBS[name]
    return Stage(
        name,
        schedule,
        trained,
        batch=_Batch(draw, name, recipe, seed, schedule.steps, scenes),
        loss=partial(loss, parts, device),
        slow=("tower",) if trained is whole else (),
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
        self._processor = recipe.family.processor(recipe.world)
        self._tokenizer = self._processor.tokenizer

    def __call__(self, step: int) -> object:
        rng = split_rng("train", self._seed, NAMES.index(self._name), step)
        phase = (
            self.recipe.phase(self._name, step / self._steps) if self._name in self.recipe.phases else None
        )
        world = phase.world(self.recipe.world) if phase else self.recipe.world
        n_scenes = self._n_scenes or (phase and phase.scenes) or self.recipe.scenes[self._name]
        scenes = [random_scene(rng, world) for _ in range(n_scenes)]
        return self._draw(self, scenes, rng, phase)

    def layouts(self, scenes: list[Scene]) -> list[Layout]:
        return [self.recipe.family.layout(scene.image_shape, scene.world) for scene in scenes]

    def images(self, scenes: list[Scene]) -> dict[str, Tensor]:
        return self._to_tensors([render(scene) for scene in scenes])

    def images_and_sketches(self, scenes: list[Scene]) -> tuple[dict[str, Tensor], Tensor]:
        drawn = [render_with_marks(scene) for scene in scenes]
        sketches: Sketch = []
        for scene, layout, (_, marks) in zip(scenes, self.layouts(scenes), drawn, strict=True):
            sketches += sketch_patches(scene, marks, layout)
        return self._to_tensors([image for image, _ in drawn]), torch.tensor(sketches)

    def turns(self, scenes: list[Scene], phase: Phase, rng: np.random.Generator) -> PackedTurns:
        assert phase.style is not None
        return pack(
            [draw_questions(scene, phase.style, rng) for scene in scenes],
            phase.style,
            rng,
            self._tokenizer,
            self.recipe.family,
        )

    def _to_tensors(self, images: list[Image.Image]) -> dict[str, Tensor]:
        return self.recipe.family.images(self._processor, images)


def _draw_sketches(
    batch: _Batch, scenes: list[Scene], rng: object, phase: Phase | None
) -> tuple[dict[str, Tensor], Tensor]:
    return batch.images_and_sketches(scenes)


def _draw_symbols(
    batch: _Batch, scenes: list[Scene], rng: np.random.Generator, phase: Phase
) -> tuple[Tensor, Seen, PackedTurns]:
    turns, layouts = batch.turns(scenes, phase, rng), batch.layouts(scenes)
    n = phase.tokens or batch.recipe.symbol_tokens
    drawn = [
        sketch_symbols(scene, layout, n, rng, phase.most)
        for scene, layout in zip(scenes, layouts, strict=True)
    ]
    sketches = torch.tensor([row for sketch, _ in drawn for row in sketch])
    return sketches, Seen.of(layouts, [tokens for _, tokens in drawn]), turns


def _draw_joint(
    batch: _Batch, scenes: list[Scene], rng: np.random.Generator, phase: Phase
) -> tuple[dict[str, Tensor], Seen, PackedTurns]:
    return batch.images(scenes), Seen.of(batch.layouts(scenes)), batch.turns(scenes, phase, rng)


def _tower_loss(
    parts: Parts, device: torch.device, data: tuple[dict[str, Tensor], Tensor]
) -> tuple[Tensor, dict[str, list[bool]]]:
    images, wanted = _on(device, data[0]), data[1].to(device)
    with torch.autocast(device.type, torch.bfloat16):
        scores = parts.heads(parts.features(images))
    loss, right = torch.zeros((), device=device), {}
    for i, (name, s) in enumerate(zip(parts.fields, scores, strict=True)):
        # Where a patch lies is easy, and in its position embedding from the start.
        weight = 1.0 if i < len(NOTHING) else 0.2
        loss = loss + weight * F.cross_entropy(s.float(), wanted[:, i])
        hit = s.argmax(dim=-1) == wanted[:, i]
        # Most patches show nothing: what counts is the others, and how often nothing is taken for something.
        there = wanted[:, i] != NOTHING[i] if i < len(NOTHING) else torch.ones_like(hit)
        right[name] = hit[there].tolist()
        if i < len(NOTHING):
            right[f"no {name}"] = hit[~there].tolist()
    return loss, {name: values for name, values in right.items() if values}


def _symbols_loss(
    parts: Parts, device: torch.device, data: tuple[Tensor, Seen, PackedTurns]
) -> tuple[Tensor, dict[str, list[bool]]]:
    sketches, seen, turns = data
    return turns_loss(parts, parts.symbols(sketches.to(device)), seen, turns)


def _joint_loss(
    parts: Parts, device: torch.device, data: tuple[dict[str, Tensor], Seen, PackedTurns]
) -> tuple[Tensor, dict[str, list[bool]]]:
    images, seen, turns = data
    with torch.autocast(device.type, torch.bfloat16):
        visual = parts.project(parts.features(_on(device, images)))
    return turns_loss(parts, visual, seen, turns)


def turns_loss(
    parts: Parts, visual: Tensor, seen: Seen, turns: PackedTurns
) -> tuple[Tensor, dict[str, list[bool]]]:
    """Cross-entropy of the answers, and which turns are right.

    Args:
        parts: the model.
        visual: (visual token, d_model) of all images, one image after the other.
        seen: which tokens they are.
        turns: what is asked.
    """
    with torch.autocast(visual.device.type, torch.bfloat16):
        logits = turn_logits(parts, visual, seen, turns)
    labels = turns.labels.to(logits.device)
    asked = labels >= 0
    loss = F.cross_entropy(logits[asked].float(), labels[asked])
    return loss, right_by_task(logits.detach().float().cpu(), turns)


def turn_logits(parts: Parts, visual: Tensor, seen: Seen, turns: PackedTurns) -> Tensor:
    """(batch, position, vocabulary) logits of packed turns; arguments as for :func:`turns_loss`."""
    device, embed, batch = visual.device, parts.decoder.embed_tokens, len(turns.ids)
    opening, closing = parts.opening.to(device), parts.closing.to(device)
    there, steps = seen.there.to(device), seen.steps.to(device)
    embedded = torch.cat(
        [
            embed(opening).expand(batch, -1, -1),
            padded(visual.to(embed.weight.dtype), there),
            embed(closing).expand(batch, -1, -1),
            embed(turns.ids.to(device)),
        ],
        dim=1,
    )
    prefix = F.pad(seen.there, (len(opening), len(closing)), value=True)
    behind = len(opening) + seen.length.to(device)[:, None]
    before_turns = behind + torch.arange(len(closing), device=device)
    plain = torch.cat([before_turns, behind + len(closing) + turns.positions.to(device)], dim=1)
    places = torch.cat(
        [
            torch.arange(len(opening), device=device).expand(3, batch, -1),
            len(opening) + steps,
            plain.expand(3, -1, -1),
        ],
        dim=2,
    )
    hidden = parts.decoder(
        inputs_embeds=embedded,
        attention_mask=turns.mask(prefix).to(device),
        position_ids=places if parts.recipe.family.three_positions else places[0],
        use_cache=False,
    ).last_hidden_state[:, prefix.shape[1] :]
    return parts.lvlm.lm_head(hidden)


def _projector_loss(
    parts: Parts, device: torch.device, data: tuple[dict[str, Tensor], Tensor]
) -> tuple[Tensor, dict[str, list[bool]]]:
    images, sketches = _on(device, data[0]), data[1].to(device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        features = parts.features(images)
        wanted = parts.symbols(sketches).float()
    with torch.autocast(device.type, torch.bfloat16):
        found = parts.project(features)
    if parts.recipe.text_weight == 1:
        return F.mse_loss(found.float(), wanted) / wanted.var(), {}
    texts = (sketches[:, 2:4] != torch.tensor(NOTHING[2:4], device=device)).any(dim=1)
    weights = 1 + (parts.recipe.text_weight - 1) * texts.float()
    errors = (found.float() - wanted).square().mean(dim=1)
    return (weights * errors).sum() / weights.sum() / wanted.var(), {}


def _on(device: torch.device, images: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in images.items()}


_JOBS = {
    "tower": (_draw_sketches, _tower_loss),
    "shrunk": (_draw_sketches, _tower_loss),
    "symbols": (_draw_symbols, _symbols_loss),
    "projector": (_draw_sketches, _projector_loss),
    "hops": (_draw_symbols, _symbols_loss),
    "joint": (_draw_joint, _joint_loss),
    "polish": (_draw_joint, _joint_loss),
}

"""What the demo models are made of: sizes, stages, rates, and which questions come when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from capa_probe.demo.worlds import RICH, SMALL, World
from demo_training.loop import Schedule
from demo_training.turns import TurnStyle

NAMES = ("tower", "symbols", "projector", "joint")


@dataclass(frozen=True)
class Sizes:
    """Of the vision tower and the decoder.

    Attributes:
        d_vision, vision_layers: width and layers of the tower.
        d_model, d_mlp, layers, heads, kv_heads: of the decoder.
    """

    d_vision: int = 128
    vision_layers: int = 4
    d_model: int = 256
    d_mlp: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4


@dataclass(frozen=True)
class Phase:
    """Part of a stage.

    Attributes:
        until: share of the stage's steps at which it ends.
        style: what turns are made of.
        objects, texts: in place of the world's own: cells per side -> fewest and most objects; fewest and most texts.
        whole: in the symbols stage, share of the objects all of whose tokens tell both shape and color, where the world
            keeps them apart: a stepping stone, since finding one and then the other is learned late.
        tokens: in the symbols stage, in place of the recipe's: visual tokens of a scene. Among few, a thing is found by
            its name sooner.
        most: in the symbols stage, most tokens of one object.
        scenes: in place of the stage's: scenes per step.
        rate: share of the stage's rates.
        twin_by_place: as in the world.
    """

    until: float
    style: TurnStyle
    objects: Mapping[int, tuple[int, int]] | None = None
    texts: tuple[int, int] | None = None
    whole: float = 0.0
    tokens: int | None = None
    most: int = 3
    scenes: int | None = None
    rate: float = 1.0
    twin_by_place: bool = False

    def world(self, world: World) -> World:
        """The world to draw scenes from."""
        return replace(
            world,
            objects=self.objects or world.objects,
            texts=self.texts or world.texts,
            twin_by_place=self.twin_by_place,
        )


@dataclass(frozen=True)
class Recipe:
    """How a demo model is made.

    Attributes:
        world: what it is trained on.
        sizes: of the model.
        schedules: stage -> how it is optimized.
        scenes: stage -> scenes per step.
        phases: for the stages that ask questions, their phases in order; the last ends at 1.
        symbol_tokens: visual tokens of a scene in the symbols stage.
        own_patch: whether a patch is to tell only what it shows itself, or all that its cell holds.
        what: stage -> what is learned in it, for the model card.
    """

    world: World
    sizes: Sizes
    schedules: Mapping[str, Schedule]
    scenes: Mapping[str, int]
    phases: Mapping[str, tuple[Phase, ...]]
    symbol_tokens: int
    own_patch: bool
    what: Mapping[str, str]

    def phase(self, stage: str, done: float) -> Phase:
        """The phase when a share of a stage is done."""
        return next(phase for phase in self.phases[stage] if done < phase.until or phase.until >= 1)


def _weights(world: World, values: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(world.tasks, values, strict=True))


#: In the order of the world's tasks: first the simple ones, then above all relation.
_SMALL_FIRST = _weights(SMALL, (0.30, 0.14, 0.10, 0.10, 0.14, 0.10, 0.12))
_SMALL_LATER = _weights(SMALL, (0.24, 0.10, 0.06, 0.06, 0.12, 0.06, 0.36))
_SMALL_JOINT = _weights(SMALL, (0.22, 0.10, 0.12, 0.10, 0.16, 0.12, 0.18))

SMALL_RECIPE = Recipe(
    world=SMALL,
    sizes=Sizes(),
    schedules={
        "tower": Schedule(steps=900, muon=0.01, adamw=2e-3, warmup=30, tail=0.5),
        "symbols": Schedule(steps=1500, muon=0.004, adamw=1.5e-3),
        "projector": Schedule(steps=300, muon=0.01, adamw=2e-3, warmup=20, tail=0.5, weight_decay=0.0),
        "joint": Schedule(steps=600, muon=0.003, adamw=1e-3),
    },
    scenes={"tower": 64, "symbols": 16, "projector": 64, "joint": 16},
    phases={
        "symbols": (
            Phase(0.25, TurnStyle(_SMALL_FIRST, template=0.0)),
            Phase(0.35, TurnStyle(_SMALL_FIRST, template=0.6)),
            Phase(1.0, TurnStyle(_SMALL_LATER, template=0.6)),
        ),
        "joint": (
            Phase(0.5, TurnStyle(_SMALL_JOINT, template=0.6)),
            Phase(1.0, TurnStyle(_SMALL_JOINT, easy=0.1)),
        ),
    },
    symbol_tokens=SMALL.largest_board**2,
    own_patch=False,
    what={
        "tower": "every patch tells what its own cell holds",
        "symbols": "the decoder answers about boards of nine tokens, each the sum of what its cell holds",
        "projector": "patch features are mapped onto those tokens by regression",
        "joint": "everything on images, the tower at a tenth of the rate; prompt form only in the second half",
    },
)

#: existence, color, shape_at, color_at, count_kind, read_at; relation, relation_shape, comparison, same_color,
#: count_where, read_next, chain.
_RICH_FIRST = _weights(RICH, (1.5, 1.5, 0.8, 0.8, 0.7, 0.9, 1.2, 1.0, 0.4, 0.5, 0.4, 0.4, 0.2))
_RICH_LOOKS = _weights(RICH, (1.5, 2.5, 0.5, 0.5, 0.7, 1.2, 1.5, 0.5, 0.2, 0.2, 0.2, 0.2, 0.0))
_RICH_HOPS = _weights(RICH, (1.0, 0.6, 0.3, 0.3, 1.0, 1.2, 2.0, 1.0, 0.5, 0.8, 0.6, 0.4, 0.0))
_RICH_RELATIONS = _weights(RICH, (1.5, 0.3, 0.1, 0.1, 0.8, 0.8, 3.0, 2.0, 0.3, 0.6, 0.4, 0.4, 0.0))
_RICH_MIDDLE = _weights(RICH, (0.8, 0.4, 0.2, 0.2, 1.0, 0.5, 2.0, 2.0, 1.2, 1.6, 1.2, 1.0, 0.6))
_RICH_PAIRS = _weights(RICH, (0.5, 0.2, 0.2, 0.2, 1.5, 0.3, 1.2, 1.2, 1.5, 2.5, 1.2, 0.6, 0.6))
_RICH_TWINS = _weights(RICH, (0.5, 0.2, 0.2, 0.2, 0.8, 0.3, 1.0, 1.0, 2.0, 4.0, 0.8, 0.4, 0.4))
_RICH_LATER = _weights(RICH, (1.0, 0.8, 0.4, 0.4, 0.6, 0.5, 1.3, 1.3, 0.9, 1.2, 0.9, 1.1, 1.2))

RICH_RECIPE = Recipe(
    world=RICH,
    sizes=Sizes(vision_layers=3, d_mlp=256),
    schedules={
        "tower": Schedule(steps=800, muon=0.01, adamw=2e-3, warmup=30, tail=0.5),
        "symbols": Schedule(steps=7000, muon=0.004, adamw=1.5e-3, tail=0.3),
        "projector": Schedule(steps=300, muon=0.01, adamw=2e-3, warmup=20, tail=0.5, weight_decay=0.0),
        "joint": Schedule(steps=1600, muon=0.0016, adamw=6e-4, tail=0.5),
    },
    scenes={"tower": 32, "symbols": 16, "projector": 32, "joint": 8},
    phases={
        "symbols": (
            # Describing small boards comes first: without it nothing else was learned in 350 steps. With the suffix
            # everywhere, finding a thing by its name was still at chance after 700, though boards were described.
            Phase(
                700 / 7000, TurnStyle(_RICH_FIRST, template=0.0), {6: (3, 6)}, whole=0.8, twin_by_place=True
            ),
            Phase(
                900 / 7000, TurnStyle(_RICH_FIRST, template=0.0, bare=0.9), {6: (3, 6)}, twin_by_place=True
            ),
            Phase(
                1200 / 7000,
                TurnStyle(_RICH_LOOKS, template=0.0, bare=0.9),
                {6: (3, 6)},
                tokens=15,
                most=1,
                twin_by_place=True,
            ),
            Phase(
                1300 / 7000,
                TurnStyle(_RICH_LOOKS, template=0.0, bare=0.9, easy=0.6),
                {6: (3, 6)},
                (1, 1),
                tokens=12,
                most=1,
                twin_by_place=True,
            ),
            Phase(
                1700 / 7000,
                TurnStyle(_RICH_HOPS, template=0.1, bare=0.8, easy=0.4, texts=True),
                {6: (3, 6)},
                (1, 2),
                tokens=14,
                most=1,
                twin_by_place=True,
            ),
            Phase(
                2200 / 7000,
                TurnStyle(_RICH_RELATIONS, template=0.1, bare=0.8, easy=0.3, texts=True),
                {6: (3, 6)},
                (1, 2),
                tokens=14,
                most=1,
                twin_by_place=True,
            ),
            Phase(
                2500 / 7000,
                TurnStyle(_RICH_MIDDLE, template=0.3, easy=0.1, bare=0.6, described=False),
                {6: (4, 9)},
                tokens=20,
                most=1,
                twin_by_place=True,
            ),
            Phase(
                3000 / 7000,
                TurnStyle(_RICH_MIDDLE, template=0.3, easy=0.1, bare=0.6, described=False),
                {6: (4, 9)},
                tokens=20,
                most=1,
                scenes=8,
                twin_by_place=True,
            ),
            # At the whole rate eight scenes a step only added noise; at less than half of it, the loss fell at once.
            Phase(
                3800 / 7000,
                TurnStyle(_RICH_MIDDLE, template=0.3, easy=0.1, bare=0.6, described=False),
                {6: (4, 9)},
                tokens=20,
                most=1,
                scenes=8,
                rate=0.4,
                twin_by_place=True,
            ),
            Phase(
                4500 / 7000,
                TurnStyle(_RICH_PAIRS, template=0.3, easy=0.1, bare=0.6, described=False, stones=0.25),
                {6: (4, 9)},
                tokens=20,
                most=1,
                scenes=8,
                rate=0.4,
                twin_by_place=True,
            ),
            Phase(
                5000 / 7000,
                TurnStyle(_RICH_TWINS, template=0.3, easy=0.1, bare=0.6, described=False, stones=0.25),
                {6: (4, 9)},
                tokens=20,
                most=1,
                scenes=8,
                rate=0.4,
                twin_by_place=True,
            ),
            Phase(
                5200 / 7000,
                TurnStyle(_RICH_PAIRS, template=0.6, easy=0.1, bare=0.3, described=False, stones=0.1),
                {6: (6, 12)},
                tokens=36,
                most=2,
                scenes=8,
                rate=0.3,
                twin_by_place=True,
            ),
            Phase(
                5900 / 7000,
                TurnStyle(
                    _RICH_TWINS, template=0.5, easy=0.0, bare=0.5, described=False, stones=0.35, by_place=0.7
                ),
                {6: (4, 9)},
                tokens=20,
                most=1,
                scenes=8,
                rate=0.4,
                twin_by_place=True,
            ),
            Phase(
                6500 / 7000,
                TurnStyle(
                    _RICH_TWINS, template=0.5, easy=0.0, bare=0.5, described=False, stones=0.35, by_place=0.7
                ),
                {6: (4, 9)},
                tokens=20,
                most=1,
                scenes=8,
                rate=0.8,
            ),
            Phase(
                1.0,
                TurnStyle(_RICH_LATER, template=0.8, mark=0.9, described=False, easy=0.0),
                scenes=8,
                rate=0.6,
            ),
        ),
        "joint": (
            Phase(
                0.5,
                TurnStyle(
                    _RICH_LATER, template=0.8, mark=0.9, described=False, easy=0.0, stones=0.15, by_place=0.5
                ),
            ),
            Phase(1.0, TurnStyle(_RICH_LATER, mark=0.9, described=False, easy=0.0)),
        ),
    },
    symbol_tokens=56,
    own_patch=True,
    what={
        "tower": "every patch tells what it shows itself, and in which row and column of the board it lies",
        "symbols": "the decoder answers about boards of 56 tokens, each the sum of what a patch shows",
        "projector": "patch features are mapped onto those tokens by regression",
        "joint": "everything on images, the tower at a tenth of the rate; prompt form only in the second half",
    },
)
RECIPES = {recipe.world.name: recipe for recipe in (SMALL_RECIPE, RICH_RECIPE)}

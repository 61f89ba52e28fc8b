"""What the demo model is made of: sizes, stages, rates, and which questions come when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from capa_probe.demo.worlds import RICH, Board, World
from demo_training.families import FAMILIES, DemoFamily, Sizes
from demo_training.loop import Schedule
from demo_training.turns import TurnStyle

#: Every stage; a stage's place here decides its random streams.
NAMES = ("tower", "symbols", "projector", "hops", "joint", "shrunk", "polish")
#: The order in which they are run; what the projector maps from must be finished before it.
ORDER = ("tower", "shrunk", "symbols", "projector", "hops", "joint", "polish")


@dataclass(frozen=True)
class Phase:
    """Part of a stage.

    Attributes:
        until: share of the stage's steps at which it ends.
        style: what turns are made of; None where nothing is asked.
        objects, texts: in place of the world's own: board -> fewest and most objects; fewest and most texts.
        tokens: on symbols, in place of the recipe's: visual tokens of a scene. Among few, a thing is found by its name
            sooner.
        most: on symbols, most tokens of one object.
        scenes: in place of the stage's: scenes per step.
        rate: share of the stage's rates.
        twin_by_place: in place of the world's own: whether an object whose color is compared is named by its place.
    """

    until: float
    style: TurnStyle | None
    objects: Mapping[Board, tuple[int, int]] | None = None
    texts: tuple[int, int] | None = None
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
    """How the demo model is made.

    Attributes:
        family: the model's.
        world: what it is trained on.
        sizes: of the model.
        schedules: stage -> how it is optimized.
        scenes: stage -> scenes per step.
        phases: for the stages that have some, their phases in order; the last ends at 1.
        symbol_tokens: visual tokens of a scene in the stages on symbols, where a phase does not say otherwise.
        what: stage -> what is learned in it, for the model card.
        text_weight: in the projector stage, weight of the visual tokens that show characters, which are few.
    """

    family: DemoFamily
    world: World
    sizes: Sizes
    schedules: Mapping[str, Schedule]
    scenes: Mapping[str, int]
    phases: Mapping[str, tuple[Phase, ...]]
    symbol_tokens: int
    what: Mapping[str, str]
    text_weight: float = 1.0

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that the model goes through, in order."""
        return tuple(name for name in ORDER if name in self.schedules)

    def phase(self, stage: str, done: float) -> Phase:
        """The phase when a share of a stage is done."""
        return next(phase for phase in self.phases[stage] if done < phase.until or phase.until >= 1)


def _weights(world: World, values: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(world.tasks, values, strict=True))


#: existence, color, shape_at, color_at, count_kind, read_at; relation, relation_shape, comparison, same_color,
#: count_where, read_next, chain.
_FIRST = _weights(RICH, (1.5, 1.5, 0.8, 0.8, 0.7, 0.9, 1.2, 1.0, 0.4, 0.5, 0.4, 0.4, 0.2))
_LOOKS = _weights(RICH, (1.5, 2.5, 0.5, 0.5, 0.7, 1.2, 1.5, 0.5, 0.2, 0.2, 0.2, 0.2, 0.0))
_READING = _weights(RICH, (1.0, 0.6, 0.3, 0.3, 1.0, 1.2, 2.0, 1.0, 0.5, 0.8, 0.6, 0.4, 0.0))
_RELATIONS = _weights(RICH, (1.5, 0.3, 0.1, 0.1, 0.8, 0.8, 3.0, 2.0, 0.3, 0.6, 0.4, 0.4, 0.0))
_MIDDLE = _weights(RICH, (0.8, 0.4, 0.2, 0.2, 1.0, 0.5, 2.0, 2.0, 1.2, 1.6, 1.2, 1.0, 0.6))
_PAIRS = _weights(RICH, (0.5, 0.2, 0.2, 0.2, 1.5, 0.3, 1.2, 1.2, 1.5, 2.5, 1.2, 0.6, 0.6))
_TWINS = _weights(RICH, (0.5, 0.2, 0.2, 0.2, 0.8, 0.3, 1.0, 1.0, 2.0, 4.0, 0.8, 0.4, 0.4))
_TWICE = _weights(RICH, (0.5, 0.3, 0.2, 0.2, 0.6, 0.3, 0.8, 0.8, 2.0, 4.0, 0.6, 0.4, 0.8))
_LATER = _weights(RICH, (1.0, 0.8, 0.4, 0.4, 0.6, 0.5, 1.3, 1.3, 0.9, 1.2, 0.9, 1.1, 1.2))

#: Boards of few objects, told by few tokens; and of more.
_FEWEST: dict[str, Any] = {"objects": {6: (3, 6)}, "most": 1}
_FEW: dict[str, Any] = {"objects": {6: (4, 9)}, "tokens": 20, "most": 1}
_MORE: dict[str, Any] = {"objects": {6: (6, 12)}, "tokens": 36, "most": 2}
_ALL: dict[str, Any] = {"mark": 0.9, "described": False, "easy": 0.0}

_MIXED = TurnStyle(_MIDDLE, template=0.3, easy=0.1, bare=0.6, described=False)
_TWINS_TOLD = TurnStyle(_TWINS, template=0.5, easy=0.0, bare=0.5, described=False, stones=0.35, twins=0.7)
#: Steps of the symbols stage, by which its rates fall and its phases are told apart.
_STEPS = 7000
#: Phases in which colors were compared with that of the shape in some place, which was not learned.
_BY_PLACE = (
    # Describing small boards comes first: without it nothing else was learned in 350 steps. Finding a thing by
    # its name was still at chance after 900, with the suffix and without; among 15 tokens it took 200 more.
    Phase(700 / _STEPS, TurnStyle(_FIRST, template=0.0), {6: (3, 6)}),
    Phase(900 / _STEPS, TurnStyle(_FIRST, template=0.0, bare=0.9), {6: (3, 6)}),
    Phase(1200 / _STEPS, TurnStyle(_LOOKS, template=0.0, bare=0.9), tokens=15, **_FEWEST),
    Phase(
        1300 / _STEPS, TurnStyle(_LOOKS, template=0.0, bare=0.9, easy=0.6), texts=(1, 1), tokens=12, **_FEWEST
    ),
    Phase(
        1700 / _STEPS,
        TurnStyle(_READING, template=0.1, bare=0.8, easy=0.4, texts=True),
        texts=(1, 2),
        tokens=14,
        **_FEWEST,
    ),
    Phase(
        2200 / _STEPS,
        TurnStyle(_RELATIONS, template=0.1, bare=0.8, easy=0.3, texts=True),
        texts=(1, 2),
        tokens=14,
        **_FEWEST,
    ),
    Phase(2500 / _STEPS, _MIXED, **_FEW),
    Phase(3000 / _STEPS, _MIXED, scenes=8, **_FEW),
    # At the whole rate eight scenes a step only added noise; at less than half of it, the loss fell at once.
    Phase(3800 / _STEPS, _MIXED, scenes=8, rate=0.4, **_FEW),
    Phase(4500 / _STEPS, replace(_MIXED, weights=_PAIRS, stones=0.25), scenes=8, rate=0.4, **_FEW),
    Phase(5000 / _STEPS, replace(_MIXED, weights=_TWINS, stones=0.25), scenes=8, rate=0.4, **_FEW),
    Phase(
        5200 / _STEPS,
        TurnStyle(_PAIRS, template=0.6, easy=0.1, bare=0.3, described=False, stones=0.1),
        scenes=8,
        rate=0.3,
        **_MORE,
    ),
    Phase(5900 / _STEPS, _TWINS_TOLD, scenes=8, rate=0.4, **_FEW),
)

RECIPE = Recipe(
    family=FAMILIES["llava"],
    world=RICH,
    sizes=Sizes(),
    schedules={
        "tower": Schedule(steps=800, muon=0.01, adamw=2e-3, warmup=30, tail=0.5),
        "symbols": Schedule(steps=_STEPS, muon=0.004, adamw=1.5e-3, tail=0.3, stop=6400),
        "projector": Schedule(steps=300, muon=0.01, adamw=2e-3, warmup=20, tail=0.5, weight_decay=0.0),
        "hops": Schedule(steps=2400, muon=0.0016, adamw=6e-4, tail=0.35),
        "joint": Schedule(steps=1000, muon=0.0016, adamw=6e-4, tail=0.5),
    },
    scenes={"tower": 32, "symbols": 16, "projector": 32, "hops": 8, "joint": 8},
    phases={
        "symbols": (
            *(replace(phase, twin_by_place=True) for phase in _BY_PLACE),
            Phase(1.0, _TWINS_TOLD, scenes=8, rate=0.8, **_FEW),
        ),
        "hops": (
            Phase(
                1400 / 2400,
                TurnStyle(_TWICE, template=0.5, easy=0.0, bare=0.5, described=False, stones=0.2, twins=0.6),
                texts=(1, 2),
                tokens=14,
                **_FEWEST,
            ),
            Phase(
                1800 / 2400,
                TurnStyle(_TWICE, template=0.6, easy=0.0, bare=0.3, described=False, stones=0.1, twins=0.6),
                **_MORE,
            ),
            Phase(1.0, TurnStyle(_LATER, template=0.8, **_ALL)),
        ),
        "joint": (
            Phase(0.5, TurnStyle(_LATER, template=0.8, stones=0.15, twins=0.5, **_ALL)),
            Phase(1.0, TurnStyle(_LATER, **_ALL)),
        ),
    },
    symbol_tokens=56,
    what={
        "tower": "every patch tells what it shows itself, and in which row and column of the board it lies",
        "symbols": "the decoder answers about boards of 12 to 56 tokens, each the sum of what a patch shows",
        "projector": "patch features are mapped onto those tokens by regression",
        "hops": "the decoder again, mostly questions that take several looks",
        "joint": "everything on images, the tower at a tenth of the rate; prompt form only in the second half",
    },
)

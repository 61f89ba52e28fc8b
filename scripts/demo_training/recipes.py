"""The recipe of each family: LLaVA's own, and for the others the same one on the world ``wide``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from capa_probe.demo.worlds import WIDE
from demo_training.families import FAMILIES, DemoFamily
from demo_training.loop import Schedule
from demo_training.recipe import RECIPE, Phase, Recipe


def _wide_phase(phase: Phase) -> Phase:
    """The same phase on all boards of the world."""
    if phase.objects is None:
        return phase
    (limits,) = phase.objects.values()
    return replace(phase, objects=dict.fromkeys(WIDE.objects, limits))


def _wide_recipe(family: DemoFamily) -> Recipe:
    steps = {"tower": 700, "projector": 300}
    return replace(
        RECIPE,
        family=family,
        world=WIDE,
        schedules={
            name: replace(schedule, steps=steps.get(name, schedule.steps))
            for name, schedule in RECIPE.schedules.items()
        },
        phases={name: tuple(map(_wide_phase, phases)) for name, phases in RECIPE.phases.items()},
        symbol_tokens=72,
        what={
            "tower": "every visual token tells what it shows itself, and which row and column its cell says it lies in",
            "symbols": "the decoder answers about boards of up to 75 tokens, each the sum of what a visual token shows",
            "projector": "features of visual tokens are mapped onto those tokens by regression",
            "hops": RECIPE.what["hops"],
            "joint": RECIPE.what["joint"],
        },
    )


def _internvl_recipe(recipe: Recipe) -> Recipe:
    """With a second stage for the tower, on boards that the image processor makes smaller, then on all.

    After the first one it read every letter that was drawn as it is, but a third of those on boards that fill one tile:
    few of the visual tokens that it sees are theirs. Its projector is narrower than Qwen2.5-VL's and needs longer:
    after 300 steps, the decoder could read a third of the texts that the tower told. After ``joint``, it answered 0.797
    of the questions that take several looks, hence ``polish``.
    """
    boards = ((4, 4),), ((4, 4), (6, 8), (8, 6)), tuple(WIDE.objects)
    phases = tuple(
        Phase(until, None, {board: WIDE.objects[board] for board in some})
        for until, some in zip((450 / 750, 650 / 750, 1.0), boards, strict=True)
    )
    return replace(
        recipe,
        schedules={
            **recipe.schedules,
            "projector": replace(recipe.schedules["projector"], steps=800),
            "shrunk": Schedule(steps=750, muon=0.007, adamw=1.4e-3, warmup=20, tail=0.4),
            # The tower has letters to learn still, so that its rate is nearer to the decoder's than in joint.
            "polish": Schedule(steps=200, muon=0.001, adamw=4e-4, warmup=20, tail=0.9, slow=0.3),
        },
        phases={**recipe.phases, "shrunk": phases, "polish": recipe.phases["joint"][-1:]},
        scenes={**recipe.scenes, "shrunk": recipe.scenes["tower"], "polish": recipe.scenes["joint"]},
        what={
            **recipe.what,
            "shrunk": "the tower again, on boards that the image processor makes smaller, then on all",
            "polish": "everything on images again, at a lower rate, the tower at three tenths of it",
        },
        text_weight=10.0,
    )


#: What is left for a decoder that has learned the tasks before, where words, rows and columns are new: on symbols,
#: small boards that are described, then larger ones; then more objects, and boards as they are; then
#: images. Stage -> steps, and phases of the whole stage, each up to this share of the steps.
_WARM: Mapping[str, tuple[int, Sequence[tuple[int, float]]]] = {
    "symbols": (600, ((5, 0.5), (8, 1.0))),
    "hops": (500, ((1, 0.3), (2, 1.0))),
    "joint": (500, ((0, 0.5), (1, 1.0))),
}


def warmed(recipe: Recipe) -> Recipe:
    """The recipe for a decoder that starts from a trained one's weights."""
    schedules, phases = dict(recipe.schedules), dict(recipe.phases)
    for stage, (steps, parts) in _WARM.items():
        schedules[stage] = replace(schedules[stage], steps=steps, stop=None)
        phases[stage] = tuple(replace(phases[stage][at], until=until) for at, until in parts)
    schedules["symbols"] = replace(schedules["symbols"], muon=0.002, adamw=8e-4)
    phases["symbols"] = tuple(replace(phase, rate=1.0, twin_by_place=False) for phase in phases["symbols"])
    return replace(recipe, schedules=schedules, phases=phases)


#: By family.
RECIPES: dict[str, Recipe] = {
    "llava": RECIPE,
    "qwen2.5-vl": _wide_recipe(FAMILIES["qwen2.5-vl"]),
    "internvl": _internvl_recipe(_wide_recipe(FAMILIES["internvl"])),
}

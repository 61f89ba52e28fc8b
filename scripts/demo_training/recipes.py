"""The recipe of each family: LLaVA's own, and for the others the same one on the world ``wide``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from capa_probe.demo.worlds import WIDE
from demo_training.families import FAMILIES, DemoFamily
from demo_training.recipe import RECIPE, Phase, Recipe


def _wide_phase(phase: Phase) -> Phase:
    """The same phase on all boards of the world."""
    if phase.objects is None:
        return phase
    (limits,) = phase.objects.values()
    return replace(phase, objects=dict.fromkeys(WIDE.objects, limits))


def _wide_recipe(family: DemoFamily) -> Recipe:
    steps = {"tower": 700, "projector": 400}
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


#: What is left of the symbols stage for a decoder that has learned the tasks before: small boards that are described,
#: since words, rows and columns are new; then larger ones; then boards as they are. Phases of the whole stage, each up
#: to this share of the steps.
_WARM_STEPS = 1000
_WARM_PHASES: Sequence[tuple[int, float]] = ((5, 0.3), (8, 0.6), (11, 1.0))


def warmed(recipe: Recipe) -> Recipe:
    """The recipe for a decoder that starts from a trained one's weights; the stages after ``symbols`` are the same."""
    symbols = recipe.phases["symbols"]
    phases = tuple(
        replace(symbols[at], until=until, rate=1.0, twin_by_place=False) for at, until in _WARM_PHASES
    )
    schedule = replace(recipe.schedules["symbols"], steps=_WARM_STEPS, stop=None, muon=0.002, adamw=8e-4)
    return replace(
        recipe,
        schedules={**recipe.schedules, "symbols": schedule},
        phases={**recipe.phases, "symbols": phases},
    )


#: By family.
RECIPES: dict[str, Recipe] = {
    name: RECIPE if name == RECIPE.family.name else _wide_recipe(family) for name, family in FAMILIES.items()
}

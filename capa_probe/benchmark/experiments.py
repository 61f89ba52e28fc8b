"""The registry of experiments.

An experiment is a module of this package with one function ``run(setup: Setup) -> dict[str, DataFrame]``. It

- runs the model on ``setup.samples`` with ``setup.settings``, under ``setup.bar(items, "what")`` for progress;
- wraps every unit of work of up to a minute in ``setup.store.part(<own name>, key, make)``, ``make`` returning rows,
  so that a stopped run loses no more than that; keys name the condition (:func:`capa_probe.benchmark.setup.key_of`).
  All that the rows depend on is in ``setup.settings``, or in the key;
- returns tidy tables by name, which the caller writes to the run's folder: ``<own name>``, one summary row per
  condition (n, means, intervals ``<measure>_low`` and ``<measure>_high``, p-values), and further ones named
  ``<own name>_<what>``: ``_rows`` per sample, ``_tests`` for paired tests. A table may be empty but has its columns;
- where it cannot be done on this model (no sinks, no redundant layer), returns its tables empty, and
  ``<own name>_notes`` with one column ``note`` that says why, in a sentence;
- draws with ``setup.settings.seed`` only, and writes nothing itself.

A new experiment is a module and a line here, and its claims a function in :mod:`capa_probe.benchmark.claims`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from capa_probe.errors import CapaProbeError

if TYPE_CHECKING:
    import pandas as pd

    from capa_probe.benchmark.setup import Setup

Run: TypeAlias = "Callable[[Setup], dict[str, pd.DataFrame]]"


@dataclass(frozen=True)
class Experiment:
    """One experiment of the confirmation.

    Attributes:
        number: by which it may be asked for.
        name: the module, and what its tables' names begin with.
        title: one line.
    """

    number: int
    name: str
    title: str

    def run(self, setup: Setup) -> dict[str, pd.DataFrame]:
        """Run it; see this module's docstring."""
        run: Run = importlib.import_module(f"capa_probe.benchmark.{self.name}").run
        return run(setup)


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(1, "dumps_anchors", "Dumps against Anchors: what removing each does"),
    Experiment(2, "knockout", "Is contribution the better proxy of a token's effect?"),
    Experiment(3, "budget", "Accuracy against the share of visual tokens that stays"),
    Experiment(4, "ffn_redundancy", "FFN in full, as a Hadamard product, and skipped"),
    Experiment(5, "together", "CAPA with its Hadamard layers: accuracy, FLOPs, time"),
    Experiment(6, "over_steps", "Over generation steps"),
)


def choose(wanted: str = "all") -> tuple[Experiment, ...]:
    """Experiments by number or name with commas between, such as "1,budget"; in the registry's order.

    Raises:
        CapaProbeError: a number or name that there is not.
    """
    if wanted == "all":
        return EXPERIMENTS
    names = [part.strip() for part in wanted.split(",")]
    known = {key: known for known in EXPERIMENTS for key in (str(known.number), known.name)}
    for name in names:
        if name not in known:
            listed = ", ".join(f"{each.number} ({each.name})" for each in EXPERIMENTS)
            raise CapaProbeError(f"There is no experiment {name!r}; give all, or some of {listed}.")
    chosen = {known[name] for name in names}
    return tuple(each for each in EXPERIMENTS if each in chosen)

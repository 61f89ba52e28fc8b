"""Experiment 1: what removing all Probability Dumps does, and removing all Structural Anchors.

Beside each, as many visual tokens of the same sample are removed that are no sinks, and as many of any kind, both at
random and several times. Roles are told while the model runs, at the layer before the one from which the tokens are
gone. A layer's condition is run on the samples that have such sinks there, and on no others, since on those nothing is
removed. Looked at are the pruning layers of :mod:`capa_probe.benchmark.schedule` that lie behind the first layer where
a sink can be (2), and the layer with the most sinks.
"""

from __future__ import annotations

import pandas as pd
import torch

from capa_probe.benchmark.answers import prepare
from capa_probe.benchmark.cells import COLUMNS, MEASURES, cell
from capa_probe.benchmark.removing import ANCHOR, DUMP, Instead, RemoveRole, Role, Roles
from capa_probe.benchmark.setup import Setup, chunks
from capa_probe.benchmark.summary import compare, notes, over_draws, summarise
from capa_probe.errors import CapaProbeError
from capa_probe.measures import choose_tau, resolve_tau
from capa_probe.pruning.roles import FIRST_SINK_LAYER

NAME = "dumps_anchors"
ROLES: tuple[Role, ...] = ("dump", "anchor")
REMOVED: tuple[Instead, ...] = ("role", "non_sinks", "visual")
_BY = ("layer", "role", "removed")
_PAIRS = (("role", "non_sinks"), ("role", "visual"))


def run(setup: Setup) -> dict[str, pd.DataFrame]:
    """Run the experiment.

    Returns:
        ``dumps_anchors``: per layer, role and what was removed ("role": these sinks; "non_sinks", "visual": as many
        others at random), and per task, means with intervals over the samples with such sinks.
        ``dumps_anchors_tests``: the sinks against the others. ``dumps_anchors_counts``: sinks per layer.
        ``dumps_anchors_rows``: per sample. ``dumps_anchors_notes``: what could not be looked at.
    """
    settings = setup.settings
    try:
        tau = resolve_tau(choose_tau(settings.tau, setup.lvlm.d_model), setup.lvlm.d_model)
    except CapaProbeError as error:
        return _tables(setup, [], pd.DataFrame(columns=["layer", "sample", *ROLES]), [str(error)])
    counts = _counts(setup, tau)
    layers = _layers(setup, counts)
    remarks = list[str]()
    cells: list[tuple[int, Role, Instead, int, set[str]]] = []
    for layer in layers:
        for role in ROLES:
            own = counts[(counts["layer"] == layer) & (counts[role] > 0)]
            if own.empty:
                remarks.append(f"0 sinks are {role}s for layer {layer} at tau = {tau:.3g}.")
                continue
            ids = set(own["sample"])
            cells += [
                (layer, role, removed, draw, ids)
                for removed in REMOVED
                for draw in range(1 if removed == "role" else settings.draws)
            ]
    if counts.empty:
        remarks = [f"A model of {setup.lvlm.n_layers} layers has none that prunes behind a sink."]
    elif not counts[list(ROLES)].any(axis=None):
        remarks = [f"0 sinks at tau = {tau:.3g} in any layer, no dump and no anchor."]
    found = []
    for layer, role, removed, draw, ids in setup.bar(cells, "dumps against anchors"):
        pruner = RemoveRole(layers=(layer,), role=role, instead=removed, tau=tau, seed=settings.seed + draw)
        condition = {"layer": layer, "role": role, "removed": removed, "draw": draw}
        chosen = [sample for sample in setup.samples if sample.id in ids]
        found.append(cell(setup, NAME, condition, pruner, chosen))
    return _tables(setup, found, counts, remarks)


def _tables(
    setup: Setup, found: list[pd.DataFrame], counts: pd.DataFrame, remarks: list[str]
) -> dict[str, pd.DataFrame]:
    seed = setup.settings.seed
    empty = pd.DataFrame(columns=[*_BY, "draw", *COLUMNS])
    table = pd.concat(found, ignore_index=True) if found else empty
    rows = over_draws(table, _BY)
    per_layer = [
        {"layer": layer}
        | {f"n_{role}": own[role].sum() for role in ROLES}
        | {f"n_samples_with_{role}": (own[role] > 0).sum() for role in ROLES}
        for layer, own in counts.groupby("layer", sort=True)
    ]
    columns = ["layer", *(f"n_{role}" for role in ROLES), *(f"n_samples_with_{role}" for role in ROLES)]
    return {
        NAME: summarise(rows, _BY, seed),
        f"{NAME}_tests": compare(rows, _BY[:2], "removed", _PAIRS, MEASURES, seed),
        f"{NAME}_counts": pd.DataFrame(per_layer, columns=columns),
        f"{NAME}_rows": table,
        f"{NAME}_notes": notes(*remarks),
    }


def _counts(setup: Setup, tau: float) -> pd.DataFrame:
    """Dumps and anchors per sample and pruning layer, told at the layer before it."""

    def make() -> pd.DataFrame:
        layers = tuple(range(FIRST_SINK_LAYER + 1, setup.lvlm.n_layers))
        found: list[dict[str, object]] = []
        if layers:
            with Roles(layers=layers, tau=tau).attach(setup.lvlm) as trace, torch.inference_mode():
                for batch in setup.bar(chunks(setup.samples, setup.settings.batch_size), "roles"):
                    setup.lvlm.model(**prepare(setup.lvlm, batch), use_cache=False, logits_to_keep=1)
                    for layer, role in trace.scores.items():
                        for row, sample in enumerate(batch):
                            n = {
                                "dump": int((role[row] == DUMP).sum()),
                                "anchor": int((role[row] == ANCHOR).sum()),
                            }
                            found.append({"layer": layer, "sample": sample.id, **n})
        return pd.DataFrame(found, columns=["layer", "sample", *ROLES])

    return setup.store.part(NAME, "counts", make)


def _layers(setup: Setup, counts: pd.DataFrame) -> list[int]:
    layers = {layer for layer in setup.stages().values() if layer > FIRST_SINK_LAYER}
    n_sinks = {int(str(layer)): int(own[list(ROLES)].sum().sum()) for layer, own in counts.groupby("layer")}
    most = max(n_sinks, key=lambda layer: n_sinks[layer], default=None)
    if most is not None and n_sinks[most] > 0:
        layers.add(most)
    return sorted(layers)

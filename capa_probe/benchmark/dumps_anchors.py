"""Experiment 1: what removing all Probability Dumps does, and removing all Structural Anchors.

Beside each, as many visual tokens of the same sample are removed that are no sinks, and as many of any kind, both at
random and several times. Who is a sink, and of which role, a profile of the tested samples says, by
:func:`capa_probe.classify_sinks` with its defaults: whether a dimension is massive on few tokens or an offset shows
over many prompts and not in one, and what is removed is then what a profile of these samples calls Dumps and Anchors.
No answer goes into it, so it need not come from other samples. Sinks are those of the layer before the one from which
they are gone. A layer's condition is run on the samples that have such sinks there, and on no others, since on those
nothing is removed. Looked at are the pruning layers of :mod:`capa_probe.benchmark.schedule` that lie behind the first
layer where a sink can be (2), and the layer with the most sinks.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from capa_probe.analysis import classify_sinks, layer_ranges
from capa_probe.analysis.saying import no_sinks, remarking
from capa_probe.benchmark.cells import COLUMNS, MEASURES, cell
from capa_probe.benchmark.removing import Instead, RemoveRole, Role
from capa_probe.benchmark.setup import Setup
from capa_probe.benchmark.summary import compare, notes, over_draws, summarise
from capa_probe.errors import CapaProbeError
from capa_probe.measures import choose_tau, resolve_tau
from capa_probe.profiling import profile
from capa_probe.pruning.roles import FIRST_SINK_LAYER

NAME = "dumps_anchors"
ROLES: tuple[Role, ...] = ("dump", "anchor")
REMOVED: tuple[Instead, ...] = ("role", "non_sinks", "visual")
#: Of the profile, and of a sink.
_PROBES = ("attention", "contribution", "sink_strength")
_SINK = ["sample", "layer", "position", "sink_strength", "sink_dim", "contribution", "role"]
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
    settings, nothing = setup.settings, _counts(pd.DataFrame(columns=_SINK), range(0))
    try:
        tau = resolve_tau(choose_tau(settings.tau, setup.lvlm.d_model), setup.lvlm.d_model)
    except CapaProbeError as error:
        return _tables(setup, [], nothing, [str(error)])
    behind = range(FIRST_SINK_LAYER + 1, setup.lvlm.n_layers)
    if not behind:
        remark = f"A model of {setup.lvlm.n_layers} layers has none that prunes behind a sink."
        return _tables(setup, [], nothing, [remark])
    sinks, remarks = _sinks(setup, tau)
    counts = _counts(sinks, behind)
    layers = _layers(setup, counts) if len(sinks) else []
    roles = {layer: set(sinks.loc[sinks["layer"] == layer - 1, "role"]) for layer in layers}
    cells = [
        (layer, role, removed, draw)
        for layer in layers
        for role in ROLES
        if role in roles[layer]
        for removed in REMOVED
        for draw in range(1 if removed == "role" else settings.draws)
    ]
    found = []
    for layer, role, removed, draw in setup.bar(cells, "dumps against anchors"):
        here = sinks[sinks["layer"] == layer - 1]
        # A token is a sink by its strongest sink dimension: no other is needed to find it again.
        dims = tuple(sorted(here["sink_dim"].unique().tolist()))
        ids = set(here.loc[here["role"] == role, "sample"])
        pruner = RemoveRole(
            layers=(layer,), dims=dims, role=role, instead=removed, tau=tau, seed=settings.seed + draw
        )
        condition = {"layer": layer, "role": role, "removed": removed, "draw": draw}
        chosen = [sample for sample in setup.samples if sample.id in ids]
        found.append(cell(setup, NAME, condition, pruner, chosen))
    return _tables(setup, found, counts, [*_missing(sinks, roles, behind, tau), *remarks])


def _tables(
    setup: Setup, found: list[pd.DataFrame], counts: pd.DataFrame, remarks: list[str]
) -> dict[str, pd.DataFrame]:
    seed = setup.settings.seed
    empty = pd.DataFrame(columns=[*_BY, "draw", *COLUMNS])
    table = pd.concat(found, ignore_index=True) if found else empty
    rows = over_draws(table, _BY)
    return {
        NAME: summarise(rows, _BY, seed),
        f"{NAME}_tests": compare(rows, _BY[:2], "removed", _PAIRS, MEASURES, seed),
        f"{NAME}_counts": counts,
        f"{NAME}_rows": table,
        f"{NAME}_notes": notes(*remarks),
    }


def _sinks(setup: Setup, tau: float) -> tuple[pd.DataFrame, list[str]]:
    """The sinks among the visual tokens of the tested samples, and what there is to say of them."""

    @cache
    def found() -> tuple[pd.DataFrame, pd.DataFrame]:
        said = list[str]()
        with TemporaryDirectory() as folder:
            prof = profile(
                setup.lvlm,
                setup.samples,
                out=Path(folder) / "profile",
                batch_size=setup.settings.batch_size,
                rows="visual",
                probes=_PROBES,
                progress=setup.progress,
            )
            try:
                sinks = remarking(said, lambda: classify_sinks(prof, tau=tau))
            except CapaProbeError as error:
                return pd.DataFrame(columns=_SINK), notes(f"Sinks could not be classified: {error}")
            if sinks.empty:  # then all there is to warn of are offsets, which this sentence tells
                said = [no_sinks(prof, sinks)]
        sinks = sinks[_SINK]
        sinks.attrs = {}
        return sinks, notes(*said)

    sinks = setup.store.part(NAME, "sinks", lambda: found()[0])
    return sinks, setup.store.part(NAME, "remarks", lambda: found()[1])["note"].tolist()


def _counts(sinks: pd.DataFrame, behind: range) -> pd.DataFrame:
    """Dumps and Anchors per pruning layer, which are those of the layer before it."""
    columns = ["layer", *(f"n_{role}" for role in ROLES), *(f"n_samples_with_{role}" for role in ROLES)]
    rows = []
    for layer in behind:
        at = sinks[sinks["layer"] == layer - 1]
        of = {role: at.loc[at["role"] == role, "sample"] for role in ROLES}
        rows.append([layer, *map(len, of.values()), *(own.nunique() for own in of.values())])
    return pd.DataFrame(rows, columns=columns)


def _missing(sinks: pd.DataFrame, roles: Mapping[int, set[str]], behind: range, tau: float) -> list[str]:
    """What cannot be looked at, by role: nothing may be said of layers where nothing is removed."""
    said = []
    for role in ROLES:
        without = [layer for layer, own in roles.items() if role not in own]
        if len(sinks) and role not in set(sinks["role"]):
            said.append(f"At tau = {tau:.3g} there is no {role} in any layer.")
        elif without:
            at = layer_ranges([layer - 1 for layer in without])
            said.append(
                f"At tau = {tau:.3g} there is no {role} in layer{'s' * (len(without) > 1)} {at}, hence none to remove "
                f"before layer{'s' * (len(without) > 1)} {layer_ranges(without)}."
            )
    last = int((sinks["layer"] == behind.stop - 1).sum())
    if last:
        what = "sink is" if last == 1 else "sinks are"
        said.append(f"{last} {what} in the last layer, {behind.stop - 1}, behind which nothing is pruned.")
    return said


def _layers(setup: Setup, counts: pd.DataFrame) -> list[int]:
    layers = {layer for layer in setup.stages().values() if layer > FIRST_SINK_LAYER}
    n_sinks = counts.set_index("layer")[[f"n_{role}" for role in ROLES]].sum(axis=1)
    if n_sinks.any():
        layers.add(int(str(n_sinks.idxmax())))
    return sorted(layers)

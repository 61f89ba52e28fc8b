"""Probes: what is measured at every layer. One file each; a new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Iterable

from capa_probe.errors import CapaProbeError
from capa_probe.probes.attention import Attention
from capa_probe.probes.base import AttentionProbe, Probe, ResidualProbe, StepContext
from capa_probe.probes.contribution import Contribution
from capa_probe.probes.ffn_cosine import FFNCosine
from capa_probe.probes.recorder import Recorder
from capa_probe.probes.removal_effect import RemovalEffect
from capa_probe.probes.residual import Residual
from capa_probe.probes.sink_strength import SinkStrength
from capa_probe.probes.value_norm import ValueNorm

#: Every probe, by the name that ``profile(probes=...)`` takes.
PROBES: dict[str, type[Probe]] = {
    probe.name: probe
    for probe in (Attention, Contribution, RemovalEffect, ValueNorm, Residual, FFNCosine, SinkStrength)
}


def choose_probes(names: str | Iterable[str]) -> list[Probe]:
    """The probes of ``"default"`` (all but removal_effect), ``"all"``, one name, or several.

    Raises:
        CapaProbeError: a name that no probe has, or no name at all.
    """
    if names == "default":
        return [probe() for probe in PROBES.values() if probe.default]
    if names == "all":
        return [probe() for probe in PROBES.values()]
    wanted = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in wanted if name not in PROBES]
    if unknown or not wanted:
        raise CapaProbeError(
            f'probes={names!r} was given; give "default", "all" or some of {", ".join(PROBES)}.'
        )
    return [PROBES[name]() for name in dict.fromkeys(wanted)]


__all__ = [
    "PROBES",
    "AttentionProbe",
    "Probe",
    "Recorder",
    "ResidualProbe",
    "StepContext",
    "choose_probes",
]

"""Probes: what is measured at every layer. One file each; ``capa_probe.schema.PROBE_COLUMNS`` is their registry."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from capa_probe.errors import CapaProbeError
from capa_probe.probes.base import AttentionProbe, Probe, ResidualProbe, StepContext
from capa_probe.probes.recorder import Recorder
from capa_probe.schema import PROBE_COLUMNS


def _registered(home: str, columns: tuple[str, ...]) -> type[Probe]:
    file, _, name = home.partition(".")
    probe: type[Probe] = getattr(import_module(f"{__name__}.{file}"), name)
    if probe.columns != columns:
        raise CapaProbeError(
            f"The probe {home} fills {', '.join(probe.columns)}, but PROBE_COLUMNS in capa_probe/schema.py says "
            f"{', '.join(columns)}; make the two agree."
        )
    return probe


#: Every probe, by the name that ``profile(probes=...)`` takes.
PROBES: dict[str, type[Probe]] = {
    probe.name: probe for probe in (_registered(*line) for line in PROBE_COLUMNS.items())
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

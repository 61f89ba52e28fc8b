"""capa_probe: what every layer of a vision-language model does with every visual token.

The public names, loaded when first used, so that importing the package costs milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from capa_probe.__about__ import __version__
from capa_probe.errors import CapaProbeError

if TYPE_CHECKING:
    from capa_probe import measures
    from capa_probe.activation_cache import to_activation_cache
    from capa_probe.analysis import (
        classify_sinks,
        measure_sink_dims,
        redundant_layers,
        role_stability,
        sink_bimodality,
        sink_summary,
    )
    from capa_probe.lvlm import HookedLVLM
    from capa_probe.profiling import profile
    from capa_probe.pruning import CAPA
    from capa_probe.pruning.calibrate import calibrate_hadamard
    from capa_probe.pruning.ffn import HadamardFFN
    from capa_probe.samples import Sample, load_samples
    from capa_probe.tables import LayerProfile

__all__ = [
    "CAPA",
    "CapaProbeError",
    "HadamardFFN",
    "HookedLVLM",
    "LayerProfile",
    "Sample",
    "__version__",
    "calibrate_hadamard",
    "classify_sinks",
    "load_samples",
    "measure_sink_dims",
    "measures",
    "profile",
    "redundant_layers",
    "role_stability",
    "sink_bimodality",
    "sink_summary",
    "to_activation_cache",
]

#: Public name -> the module that holds it; None where the name is itself a module.
_HOMES: dict[str, str | None] = {
    "CAPA": "pruning",
    "HadamardFFN": "pruning.ffn",
    "HookedLVLM": "lvlm",
    "LayerProfile": "tables",
    "Sample": "samples",
    "calibrate_hadamard": "pruning.calibrate",
    "classify_sinks": "analysis",
    "load_samples": "samples",
    "measure_sink_dims": "analysis",
    "measures": None,
    "profile": "profiling",
    "redundant_layers": "analysis",
    "role_stability": "analysis",
    "sink_bimodality": "analysis",
    "sink_summary": "analysis",
    "to_activation_cache": "activation_cache",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    value = importlib.import_module(f"{__name__}.{home or name}")
    if home is not None:
        value = getattr(value, name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

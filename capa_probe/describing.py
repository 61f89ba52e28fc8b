"""What a manifest says of a model, so that two runs can be told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capa_probe.lvlm import HookedLVLM

#: Packages whose versions a manifest records.
PACKAGES = ("capa-probe", "torch", "transformers", "transformer-lens")
#: Elements of each weight that its hash looks at.
_ELEMENTS = 256


def describe(lvlm: HookedLVLM) -> dict[str, Any]:
    """A model's name, weights, sizes and family, how it runs, and the versions it runs with."""
    config, text = lvlm.model.config, lvlm.model.config.get_text_config()
    published = lvlm.family.sink_dims(lvlm.model)
    return {
        "model": _name(lvlm.model),
        "revision": getattr(config, "_commit_hash", None),
        "family": lvlm.family.name,
        "architecture": type(lvlm.model).__name__,
        "n_layers": lvlm.n_layers,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "d_model": lvlm.d_model,
        "norm_eps": lvlm.norm_eps,
        "dtype": str(lvlm.model.dtype).removeprefix("torch."),
        "device": str(lvlm.device),
        "attention_backend": lvlm.attention_backend,
        "published_sink_dims": None if published is None else list(published),
        "versions": dict(_versions()),
        # Last, so that where two runs differ, a field that says more is named first.
        "config_hash": hashlib.sha256(config.to_json_string().encode()).hexdigest(),
        "weights_hash": weights_hash(lvlm.model),
    }


@cache
def _versions() -> Mapping[str, str]:
    # Reading a package's metadata takes 10 ms; those in use do not change while a process runs.
    return {package: version(package) for package in PACKAGES}


def _name(model: PreTrainedModel) -> str:
    """Its name on the hub, or its folder, however that was written."""
    name = str(model.config.name_or_path)
    if not name:
        return type(model).__name__
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def weights_hash(model: PreTrainedModel) -> str:
    """SHA-256 over the name, shape, dtype and 256 evenly spaced elements of every weight, as 64 hex digits.

    Tells checkpoints and fine-tunes apart in a fraction of a second; weights that are offloaded count by name, shape
    and dtype only.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        if isinstance(weight, Tensor) and weight.numel() and not weight.is_meta:
            flat = weight.detach().reshape(-1)
            at = torch.linspace(0, len(flat) - 1, min(_ELEMENTS, len(flat)), dtype=torch.float64)
            some = flat[at.round().long().to(flat.device)]
            digest.update(some.cpu().double().numpy().tobytes())
    return digest.hexdigest()

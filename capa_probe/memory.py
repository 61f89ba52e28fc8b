"""How much memory a model needs, how much there is, and one sentence where the one exceeds the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig

from capa_probe.errors import CapaProbeError


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn an allocation that fails into one sentence that names what was being run.

    Raises:
        CapaProbeError: memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        where = "GPU" if isinstance(error, torch.OutOfMemoryError) else "main"
        if (
            where == "main"
            and not isinstance(error, MemoryError)
            and "can't allocate memory" not in str(error)
        ):
            raise
        raise CapaProbeError(
            f"The {where} memory ran out at {what}; use a smaller batch size, smaller images or a half-precision "
            "dtype (what is finished stays, and the same settings go on from there)."
        ) from error


def refuse_too_large(name: str, config: PretrainedConfig, dtype: Any, device_map: Any) -> None:
    """Refuse a checkpoint whose weights alone do not fit, before they are read.

    Only where everything goes to one device; accelerate spreads the weights itself otherwise.

    Raises:
        CapaProbeError: they do not; the message says what they need and what is there.
    """
    device = torch.device("cpu") if device_map is None else _one_device(device_map)
    if device is None:
        return
    n_parameters, needed = weights_size(config, dtype)
    there = available(device)
    if needed > there:
        where = "main" if device.type == "cpu" else f"{device.type.upper()}"
        raise CapaProbeError(
            f"The model {name} needs {needed / 1e9:,.1f} GB for its {n_parameters / 1e9:,.2f} billion weights, and "
            f"{there / 1e9:,.1f} GB of {where} memory are free; use a smaller model, bfloat16, or a larger machine."
        )


def weights_size(config: PretrainedConfig, dtype: Any = "auto") -> tuple[int, int]:
    """Number of weights of a checkpoint, and their size in bytes, without reading them.

    Args:
        config: the model's.
        dtype: as ``from_pretrained`` takes it; "auto" is the checkpoint's own.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    n_parameters = sum(weight.numel() for weight in model.parameters())
    own = getattr(config, "dtype", None) if dtype in ("auto", None) else dtype
    width = getattr(torch, own, None) if isinstance(own, str) else own
    if not isinstance(width, torch.dtype):  # transformers says what is wrong with it
        width = torch.float32
    return n_parameters, n_parameters * width.itemsize


def available(device: torch.device) -> int:
    """Free bytes on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *_left_in_container()])


def _left_in_container() -> list[int]:
    """Free bytes under the limit of a Linux container; none where there is no limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = [
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        ]
        return [int(limit) - int(used) + sum(cached)]
    except (OSError, ValueError):  # "max" is no limit
        return []


def _one_device(device_map: Any) -> torch.device | None:
    if isinstance(device_map, dict):
        return None
    try:
        device = torch.device(device_map)
    except (RuntimeError, TypeError):  # "auto", "balanced" ...
        return None
    return device if device.type in ("cpu", "cuda") else None

"""What a benchmark ran on, and how it keeps the machine from blurring what it measures."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def machine(device: str, dtype: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What it runs on, without names.

    Args:
        device: "cpu" or "cuda...".
        dtype: of the model.
        packages: others whose versions matter.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "capa-probe", *packages)},
    }


def machine_line(ran_on: dict[str, Any]) -> str:
    """The same, in a line."""
    where = ran_on["gpu"] or f"{ran_on['processor']}, {ran_on['threads']} of {ran_on['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in ran_on["versions"].items())
    return f"{where}; {ran_on['dtype']}; {versions}."


def keep_freed_memory() -> None:
    """Have the C library keep what is freed: paging an activation in anew can take longer than computing it."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
            libc.mallopt(option, value)


def resident(field: str = "VmRSS") -> int:
    """Memory of this process in bytes: "VmRSS" at present, "VmHWM" at its highest."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """Have "VmHWM" start again from what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")

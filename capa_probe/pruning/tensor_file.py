"""Safetensors files with a JSON header: there as a whole or not at all, and readable by whoever the umask says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from capa_probe.errors import CapaProbeError
from capa_probe.files import replace


def write_tensors(file: Path, tensors: Mapping[str, Tensor], key: str, header: Mapping[str, Any]) -> Path:
    """Write tensors, and under ``key`` of the file's metadata a header (JSON values).

    Returns:
        ``file``.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    content = save(dict(tensors), {key: json.dumps(header)})
    return replace(file, lambda temporary: temporary.write_bytes(content))


def read_tensors(file: Path, key: str, remedy: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors that :func:`write_tensors` wrote.

    Args:
        file: the file.
        key: under which its header lies.
        remedy: what to do about a file that cannot be used, for the message.

    Raises:
        CapaProbeError: there is no such file, or it is damaged or another kind of file.
    """
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise CapaProbeError(f"{file} {what}; give a safetensors file that capa_probe's calibration wrote.")
    try:
        with safe_open(file, "pt") as opened:
            header = json.loads((opened.metadata() or {})[key])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
        if not isinstance(header, dict):
            raise TypeError("no JSON object")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CapaProbeError(
            f"{file} is damaged or was not written by capa_probe's calibration; {remedy}."
        ) from error
    return header, tensors

"""Files that are either there as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def replace(file: Path, write: Callable[[Path], object]) -> Path:
    """Write under a temporary name, then rename, so that nobody ever sees half a file.

    Args:
        file: the file to make or to replace.
        write: writes the content to the path that it is given.

    Returns:
        ``file``.

    Raises:
        OSError: it cannot be written, as on a full disk; what was there before stays.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())  # on disk before its name is, or a power cut could leave an empty file
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def write_json(file: Path, content: Mapping[str, Any]) -> Path:
    """Write an object as indented JSON (see :func:`replace`)."""
    # JSON can hold half of a surrogate pair, which plain UTF-8 refuses.
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return replace(file, lambda temporary: temporary.write_bytes(text.encode(errors="backslashreplace")))

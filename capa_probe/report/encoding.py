"""How numbers and words get into the page: arrays as base64, everything else as JSON that no markup can end.

A float array is written as *float24*: of each value's 32 bits (IEEE 754, single precision) the sign is left out, since
no measured column is negative, and of the other 31 the upper 24 are kept, rounded to nearest, as three bytes, least
significant first; all bytes in base64. That is four characters a value and a relative error of at most 2**-17, less
than one in the fifth digit. What rounding has made less than 0 becomes 0. Cosines are written as 1 - x, which keeps the
digits that tell those near 1 apart. Integers below 2**16 - 1 are written as two bytes each; 65535 stands for none.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from capa_probe.errors import CapaProbeError

#: Characters that a value takes in the page.
FLOAT_CHARACTERS = 4
INDEX_CHARACTERS = 8 / 3
#: Stands for an index that does not apply.
NO_INDEX = 2**16 - 1
_NAN = 0xFF8000
#: Characters that could end a script element or a line of it, in JSON's own way of writing them.
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def float24(values: ArrayLike) -> str:
    """A float array, in its order in memory, as float24 in base64 (see the module's docstring)."""
    given = np.ascontiguousarray(values, dtype="<f4").ravel()
    bits = np.maximum(given, 0).view("<u4").astype(np.uint64) << 1
    # To nearest, ties to even.
    upper = np.where(np.isnan(given), _NAN, (bits + 0x7F + ((bits >> 8) & 1)) >> 8)
    return _base64(upper.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3])


def uint16(values: ArrayLike) -> str:
    """An integer array in base64; what is below 0 as none.

    Raises:
        CapaProbeError: a value does not fit.
    """
    given = np.asarray(values, dtype=np.int64)
    if given.size and given.max() >= NO_INDEX:
        raise CapaProbeError(f"The index {given.max()} was given; a report can hold those below {NO_INDEX}.")
    return _base64(np.where(given < 0, NO_INDEX, given).astype("<u2").view(np.uint8))


def script_json(content: Any) -> str:
    """JSON to stand inside a ``<script>`` element: NaN is null, and no character of it is markup."""
    text = json.dumps(plain(content), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, escaped in _ESCAPED.items():
        text = text.replace(character, escaped)
    return text


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers of NumPy become Python's, and those that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _base64(content: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(content).tobytes()).decode()

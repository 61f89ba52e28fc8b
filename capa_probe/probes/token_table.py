"""From a batch's recorded columns to rows of the token table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import TokenSpans
from capa_probe.probes import PROBES, AttentionProbe
from capa_probe.probes.recorder import Recorder
from capa_probe.schema import TOKEN_SCHEMA

#: Say where a row is; the columns after them are measured.
PLACE_COLUMNS = ("sample", "step", "layer", "position", "kind", "image", "tile", "row", "col")
#: The values of ``kind``; chunks hold indices into them.
_KINDS = ("text", "visual")


def token_table(
    ids: Sequence[str], spans: TokenSpans, recorder: Recorder, n_steps: Sequence[int] | None = None
) -> pa.Table:
    """Rows of the token table for one batch, ordered by sample, step, layer, position.

    Args:
        ids: sample ids of the first rows of the batch; further rows are left out.
        spans: spans of the prompt.
        recorder: what was measured.
        n_steps: how many decode steps count for each sample; None means none.

    Raises:
        CapaProbeError: a statistic that is not finite, with sample, layer and column named.
    """
    decoded = [0] * len(ids) if n_steps is None else list(n_steps)
    places = {name: values.numpy() for name, values in spans.places().items()}
    places["kind"] = spans.visual.cpu().numpy()  # indices into _KINDS
    is_token = ~spans.padding.cpu().numpy()
    key_columns = _key_columns()
    may_be_nan = {name for probe in PROBES.values() for name in probe.may_be_nan}
    measured = [name for name in TOKEN_SCHEMA.names if name not in PLACE_COLUMNS]
    chunks: dict[tuple[int, int], dict[str, NDArray[Any]]] = {}
    for step in range(1 + max(decoded)):
        columns = {name: recorder.column(step, name) for name in measured}
        arrays = {name: None if x is None else x.numpy() for name, x in columns.items()}
        for sample, sample_id in enumerate(ids):
            if step <= decoded[sample]:
                at = np.flatnonzero(is_token[sample])
                chunk = _place(sample, step, at, places, recorder.lvlm.n_layers)
                checked: dict[str, NDArray[Any]] = {}
                for name, array in arrays.items():
                    is_key = name in key_columns
                    values = _values(
                        name, array, sample, step, at, is_token.shape[1], recorder.lvlm.n_layers, is_key
                    )
                    chunk[name] = values.ravel()
                    if array is not None and name not in may_be_nan:
                        checked[name] = values if step == 0 or is_key else values[:, -1:]
                _check_finite(checked, step, sample_id)
                chunks[sample, step] = chunk
    ordered = [chunks[key] for key in sorted(chunks)]
    named = {"sample": list(ids), "kind": list(_KINDS)}
    arrow = []
    for field in TOKEN_SCHEMA:
        whole = np.concatenate([chunk[field.name] for chunk in ordered])
        if field.name in named:
            words = pa.array(named[field.name], pa.string())
            arrow.append(pa.DictionaryArray.from_arrays(pa.array(whole), words).cast(pa.string()))
        else:
            arrow.append(pa.array(whole, field.type, from_pandas=True))  # NaN becomes null
    return pa.Table.from_arrays(arrow, schema=TOKEN_SCHEMA)


def _key_columns() -> set[str]:
    """Filled for every key; at decode steps the other columns exist for the query's own row only."""
    return {
        column for probe in PROBES.values() if issubclass(probe, AttentionProbe) for column in probe.columns
    }


def _place(
    sample: int, step: int, at: NDArray[Any], places: dict[str, NDArray[Any]], n_layers: int
) -> dict[str, NDArray[Any]]:
    """The columns that say where the rows of one sample and step are: layer by layer, position by position."""
    n = len(at) + step
    chunk: dict[str, NDArray[Any]] = {
        "sample": np.full(n_layers * n, sample, dtype=np.int32),
        "step": np.full(n_layers * n, step, dtype=np.int32),
        "layer": np.repeat(np.arange(n_layers, dtype=np.int32), n),
        "position": np.tile(np.arange(n, dtype=np.int32), n_layers),
    }
    for name, values in places.items():
        generated = np.full(step, 0 if name == "kind" else -1)
        per_layer = np.concatenate([values[sample, at], generated])
        chunk[name] = np.tile(per_layer.astype(np.int32), n_layers)
    return chunk


def _values(
    name: str,
    array: NDArray[Any] | None,
    sample: int,
    step: int,
    at: NDArray[Any],
    prompt_length: int,
    n_layers: int,
    is_key: bool,
) -> NDArray[Any]:
    """One measured column of one sample and step, (layer, position); its missing value where it does not apply."""
    dtype = TOKEN_SCHEMA.field(name).type.to_pandas_dtype()
    missing = -1 if np.issubdtype(dtype, np.integer) else np.nan
    values = np.full((n_layers, len(at) + step), missing, dtype=dtype)
    if array is None:
        return values
    if step == 0:
        values[:] = array[:, sample, at]
    elif is_key:
        values[:] = array[:, sample, np.concatenate([at, np.arange(prompt_length, prompt_length + step)])]
    else:
        values[:, -1] = array[:, sample, 0]
    return values


def _check_finite(columns: dict[str, NDArray[Any]], step: int, sample_id: str) -> None:
    """Raise for the first layer, and in it the first column, that holds a value that is not finite."""
    broken = []
    for name, values in columns.items():
        broken += [(int(layer), name) for layer in np.flatnonzero(~np.isfinite(values).all(axis=1))[:1]]
    if broken:
        layer, name = min(broken, key=lambda found: found[0])
        raise CapaProbeError(
            f"{name} of sample {sample_id} at layer {layer}, step {step}, is NaN or infinite; if the model runs in "
            "float16, load it in bfloat16 or float32."
        )

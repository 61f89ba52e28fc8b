"""The columns of a profile's tables, and the files that they lie in."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

#: Raised whenever a reader of the present version could misread what is written.
FORMAT_VERSION = 1
#: Dimensions whose sink strength is kept per token, from the largest down.
SINK_RANKS = 4
#: (strength, dimension) columns of the largest dimensions, in falling order of strength.
SINK_COLUMNS: tuple[tuple[str, str], ...] = (
    ("sink_strength", "sink_dim"),
    *((f"sink_strength_{rank}", f"sink_dim_{rank}") for rank in range(2, SINK_RANKS + 1)),
)

#: The registry of probes: a class of ``capa_probe.probes``, as file.Class, and the columns that it fills, in the order
#: of the token table. A new probe is a file there and a line here; it lies here because tables are read without torch.
PROBE_COLUMNS: dict[str, tuple[str, ...]] = {
    "attention.Attention": ("attention", "attention_text"),
    "contribution.Contribution": ("contribution",),
    "removal_effect.RemovalEffect": ("removal_effect",),
    "value_norm.ValueNorm": ("value_norm",),
    "residual.Residual": (
        "resid_pre_norm",
        "resid_mid_norm",
        "attn_update_norm",
        "ffn_update_norm",
        "attn_cosine",
    ),
    "ffn_cosine.FFNCosine": ("ffn_cosine",),
    "sink_strength.SinkStrength": tuple(column for pair in SINK_COLUMNS for column in pair),
}
_MEASURED = tuple(name for columns in PROBE_COLUMNS.values() for name in columns)
#: Measured columns that the layers table summarises (all but indices of dimensions). NaN where a value does not apply.
MEASURES: tuple[str, ...] = tuple(name for name in _MEASURED if not name.startswith("sink_dim"))
_INDICES = ("image", "tile", "row", "col")


def _measured(name: str) -> pa.Field[Any]:
    return pa.field(name, pa.float32()) if name in MEASURES else pa.field(name, pa.int32())


_FIELDS: list[pa.Field[Any]] = [
    pa.field("sample", pa.string()),
    *(pa.field(name, pa.int32()) for name in ("step", "layer", "position")),
    pa.field("kind", pa.string()),
    *(pa.field(name, pa.int32()) for name in _INDICES),
    *(_measured(name) for name in _MEASURED),
]
#: One row per (sample, step, layer, position). A float that does not apply is NaN; an index that does not apply
#: (place of a text token, ``sink_dim`` of a row without sink strength) is -1.
TOKEN_SCHEMA: pa.Schema = pa.schema(_FIELDS)

#: Statistics of the layers table: the mean, and quantiles by linear interpolation.
QUANTILES: dict[str, float] = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
STATISTICS: tuple[str, ...] = ("mean", *QUANTILES)
GROUP_COLUMNS: tuple[str, ...] = ("sample", "step", "layer", "kind")

#: One row per (sample, step, layer, kind); ``n_tokens`` counts rows, statistics skip NaN and are NaN without values.
LAYER_SCHEMA: pa.Schema = pa.schema(
    [
        *(TOKEN_SCHEMA.field(name) for name in GROUP_COLUMNS),
        pa.field("n_tokens", pa.int32()),
        *(pa.field(f"{measure}_{stat}", pa.float32()) for measure in MEASURES for stat in STATISTICS),
    ]
)

#: One row per sample that was given as a question with images: its task, how many images it shows, and a key that
#: samples with the same images share.
SAMPLE_SCHEMA: pa.Schema = pa.schema(
    [pa.field(name, pa.string()) for name in ("sample", "task", "images")]
).append(pa.field("n_images", pa.int32()))

#: Which token rows a profile keeps; the layers table is computed from all of them in any case.
ROWS = ("all", "visual", "none")

#: What a profile's folder holds; ``unfinished.json`` only while it is written.
TOKENS_FOLDER, LAYERS_FILE, SAMPLES_FILE = "tokens", "layers.parquet", "samples.parquet"
MANIFEST_FILE = "manifest.json"
UNFINISHED_FILE = "unfinished.json"

"""How a profile shows itself in a notebook: what ran on what, and every layer in a line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from capa_probe.display import card, facts, short_path, table, text

#: Column of the layers table, statistic, heading, how it is written.
SHOWN = (
    ("attention", "mean", "attention", ".2e"),
    ("contribution", "mean", "contribution", ".3g"),
    ("ffn_cosine", "mean", "FFN cosine", ".3f"),
    ("sink_strength", "p95", "sink strength, 95 %", ".3g"),
)
COLUMNS = ("step", "layer", "kind", "n_tokens", *(f"{name}_{stat}" for name, stat, *_ in SHOWN))
_KINDS = ("visual", "text")


def profile_html(manifest: Mapping[str, Any], layers: pd.DataFrame, where: str) -> str:
    """A card with the facts of a profile, and means over samples at prefill by layer and kind of token.

    Args:
        manifest: of the profile.
        layers: its layers table, with (at least) ``COLUMNS``.
        where: where the profile lies.
    """
    prefill = layers[layers["step"] == 0]
    settings = manifest.get("settings", {})
    skipped = len(manifest.get("skipped") or ())
    n_samples = manifest.get("n_samples")
    known = {
        "model": short_path(str(manifest["model"])) if manifest.get("model") else None,
        "samples": None
        if n_samples is None
        else f"{n_samples:,}" + (f", {skipped} left out" if skipped else ""),
        "layers": manifest.get("n_layers"),
        "decode steps": settings.get("steps") or None,
        "probes": ", ".join(settings["probes"]) if isinstance(settings.get("probes"), list) else None,
        "ran": _ran(manifest),
        "rows": f"{manifest['n_token_rows']:,} in .tokens ({manifest['rows']}), "
        f"{manifest['n_layer_rows']:,} in .layers",
        "kept": short_path(where),
    }
    if prefill.empty:
        return card("LayerProfile", facts(known))
    note = "Prefill; mean over samples of each sample's mean (sink strength: of its 95 % quantile)."
    return card("LayerProfile", facts(known), table(*_by_layer(prefill)), text(note))


def _ran(manifest: Mapping[str, Any]) -> str | None:
    known = [str(manifest[key]) for key in ("dtype", "device", "attention_backend") if manifest.get(key)]
    return ", ".join(known) or None


def _by_layer(prefill: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    kinds = [kind for kind in _KINDS if (prefill["kind"] == kind).any()]
    columns = [f"{name}_{stat}" for name, stat, *_ in SHOWN]
    known = [column for column in columns if prefill[column].notna().any()]
    means = prefill.groupby(["layer", "kind"])[columns].mean()
    heads, formats = [], []
    for (_, _, heading, form), column in zip(SHOWN, columns, strict=True):
        if column in known:
            heads += [f"{heading}, {kind}" for kind in kinds]
            formats += [(column, kind, form) for kind in kinds]
    rows = []
    for layer in sorted(prefill["layer"].unique()):
        cells = [str(layer)]
        for column, kind, form in formats:
            value = means[column].get((layer, kind), math.nan)
            cells.append("" if math.isnan(value) else format(value, form))
        rows.append(cells)
    return ["layer", *heads], rows

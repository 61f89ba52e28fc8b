"""Settings and versions: what a run was made with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from capa_probe.findings import Findings

#: Part of a manifest to its heading and, in order, the keys that have words of their own.
_MODEL = {
    "model": "model",
    "revision": "revision",
    "family": "family",
    "architecture": "class",
    "n_layers": "decoder layers",
    "d_model": "width (d_model)",
    "n_heads": "attention heads",
    "n_kv_heads": "key-value heads",
    "dtype": "dtype",
    "device": "device",
    "attention_backend": "attention backend",
    "config_hash": "SHA-256 of the config",
    "weights_hash": "SHA-256 of the weights",
    "published_sink_dims": "published sink dimensions",
}
_DATA = {
    "n_samples": "samples",
    "data_fingerprint": "SHA-256 of the data",
    "sink_dims": "sink strength restricted to",
    "created": "finished",
    "seconds": "seconds of profiling",
    "n_token_rows": "token rows",
    "n_layer_rows": "layer rows",
    "format_version": "format",
}
#: Shown elsewhere, or a repetition.
_HIDDEN = {"settings", "versions", "skipped", "rows", "n_parts", "norm_eps"}
_THRESHOLDS = {
    "tau_given": "τ as given",
    "split": "what makes an anchor",
    "dims": "sink dimensions",
    "max_share": "largest share of tokens for a sink dimension",
}

#: Samples that were left out are listed up to this many.
_MOST_ROWS = 20


def tables(manifest: Mapping[str, Any], findings: Findings | None) -> dict[str, list[tuple[str, str]]]:
    """Heading to rows of name and value."""
    known = {*_MODEL, *_DATA, *_HIDDEN}
    others = {key: key for key in manifest if key not in known}
    thresholds: list[tuple[str, str]] = []
    if findings is not None:
        thresholds = [
            ("τ, on sink strength", _plain(findings.tau)),
            ("η, on the FFN cosine", _plain(findings.eta)),
        ]
        used: dict[str, Any] = {}
        if findings.sinks is not None:
            used = {str(key): value for key, value in findings.sinks.attrs.items()} | _asked(findings)
        thresholds += [
            (words, _plain(used[key])) for key, words in _THRESHOLDS.items() if used.get(key) is not None
        ]
        confidence = {} if findings.layers is None else findings.layers.attrs
        if "confidence" in confidence:
            thresholds.append(("bootstrap intervals", f"{100 * confidence['confidence']:g} %"))
    return {
        heading: rows
        for heading, rows in {
            "Model": _rows(manifest, _MODEL),
            "Run": _rows(manifest, _DATA | others),
            "Settings": [(key, _plain(value)) for key, value in manifest.get("settings", {}).items()],
            "Thresholds": thresholds,
            "Left out": _left_out(manifest.get("skipped") or []),
            "Versions": [(key, _plain(value)) for key, value in manifest.get("versions", {}).items()],
        }.items()
        if rows
    }


def _asked(findings: Findings) -> dict[str, Any]:
    asked = findings.settings.get("tau")
    return {} if asked is None else {"tau_given": asked}


def _left_out(skipped: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    rows = [(str(each["sample"]), str(each["reason"])) for each in skipped[:_MOST_ROWS]]
    more = len(skipped) - len(rows)
    return [*rows, (f"{more:,} more", "listed in manifest.json under skipped")] if more else rows


def _rows(manifest: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(words, _plain(manifest[key])) for key, words in names.items() if manifest.get(key) is not None]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)) and all(isinstance(each, (str, int)) for each in value):
        return ", ".join(map(str, value)) or "none"
    return json.dumps(value, ensure_ascii=False, default=str)

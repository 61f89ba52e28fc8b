"""A hash of tables that depends on what they say, not on how they are stored."""

from __future__ import annotations

import hashlib
import json

import pandas as pd

from capa_probe.figures.entry import ModelTables


def tables_hash(models: ModelTables) -> str:
    """SHA-256 of tables, in hexadecimal.

    Of each model in order and each of its tables by name, the name, ``DataFrame.attrs`` as JSON with sorted keys, and
    the table as CSV with the shortest decimal numbers that tell floats apart; bytes stand as their own SHA-256.

    Args:
        models: name of a model -> its tables by name.
    """
    digest = hashlib.sha256()
    for model, tables in models.items():
        for name in sorted(tables):
            table = tables[name]
            attrs = json.dumps(table.attrs, sort_keys=True, ensure_ascii=False)
            digest.update(f"{model}\n{name}\n{attrs}\n{_text(table)}\n".encode())
    return digest.hexdigest()


def _text(table: pd.DataFrame) -> str:
    def plain(value: object) -> object:
        return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value

    columns = {
        name: column.map(plain) if column.dtype == object else column for name, column in table.items()
    }
    return pd.DataFrame(columns).to_csv(index=False, lineterminator="\n")

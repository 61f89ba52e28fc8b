"""Extension of mkdocstrings: names that docstrings mark as Sphinx does, ``:func:`name```, become links of the site."""

from __future__ import annotations

import re
from html import escape
from typing import Any

import griffe

_ROLE = re.compile(r":(attr|class|data|exc|func|meth|mod):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Rewrites the docstrings of whatever the site shows."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            of_class = obj.path if obj.is_class else obj.parent.path if obj.parent else obj.path
            obj.docstring.value = with_links(obj.docstring.value, obj.module.path, of_class)


def with_links(text: str, module: str, of_class: str) -> str:
    """References in place of roles, by the last part of the name; what the site has no entry for gets no link.

    Args:
        text: a docstring.
        module: where names without a dot lie.
        of_class: where methods without a dot lie.
    """

    def link(found: re.Match[str]) -> str:
        role, name = found[1], found[2]
        full = name if name.startswith("capa_probe") else f"{of_class if role == 'meth' else module}.{name}"
        short = escape(name.rpartition(".")[2])
        return f'<autoref optional identifier="{escape(full)}"><code>{short}</code></autoref>'

    return _ROLE.sub(link, text)

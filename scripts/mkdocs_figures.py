"""A hook for mkdocs: the pictures of figures/ belong to the site, though they lie beside docs/, not in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

FIGURES = "figures"
_SUFFIXES = (".png", ".svg")


def on_files(files: Any, config: Any) -> Any:
    """Add every picture of the set under the path that it has in the repository."""
    root = Path(config["docs_dir"]).parent
    for file in sorted((root / FIGURES).rglob("*")):
        if file.suffix in _SUFFIXES:
            where = file.relative_to(root).as_posix()
            files.append(File.generated(config, where, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """In the repository the pictures are one folder up; on the site they lie beside the pages."""
    up = "../" * (page.file.src_uri.count("/") + 1)
    return markdown.replace(f"]({up}{FIGURES}/", f"]({up[3:]}{FIGURES}/").replace(
        f'="{up}{FIGURES}/', f'="{up[3:]}{FIGURES}/'
    )

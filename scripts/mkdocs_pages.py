"""MkDocs hook: puts onto the site what lies beside ``docs/``: the notebooks, executed, and guides of the root.

A notebook is executed where it has changed, or the package has, since its outputs were kept in ``.cache/notebooks``;
an error in it stops the build. ``SITE_NOTEBOOKS=off`` shows them without outputs, to look at other pages.
"""

from __future__ import annotations

import hashlib
import os
import re
from copy import deepcopy
from pathlib import Path
from textwrap import indent
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "notebooks"
#: Files of the root, and what they are called on the site.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
#: Seconds that a cell may take.
TIMEOUT = 600
#: Tag of cells whose code is folded.
FOLDED = "folded"


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name, site_name in PAGES.items():
        text = links_from_root((ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, site_name, content=text))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if os.environ.get("SITE_NOTEBOOKS") != "off":
            notebook = executed(notebook, path)
        text, images = to_markdown(notebook, path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def links_from_root(text: str) -> str:
    """A file of the root with its links as they are from ``docs/``; what is not on the site loses its link."""

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target or not target:
            return match[0]
        if target.startswith("docs/") or target in PAGES:
            return f"[{words}]({PAGES.get(target, target.removeprefix('docs/'))}{anchor})"
        return f"{words} (`{target}`)"

    return re.sub(r"\[([^]]+)\]\(([^)#\s]*)(#[^)\s]*)?\)", link, text)


def links_from_notebooks(text: str) -> str:
    """Links between notebooks, and from them to other pages, as they are on the site."""
    text = re.sub(r"\]\((\d\d_\w+)\.ipynb", r"](\1.md", text)
    for name, site_name in PAGES.items():
        text = text.replace(f"](../{name}", f"](../{site_name}")
    return text.replace("](../docs/", "](../")


def executed(notebook: NotebookNode, path: Path) -> NotebookNode:
    """A notebook with its outputs, from the cache if nothing that they hang on has changed.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    from nbclient import NotebookClient

    kept = CACHE / f"{path.stem}-{_state(path)}.ipynb"
    if kept.is_file():
        return nbformat.read(kept, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources=resources).execute()
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"{path.stem}-*.ipynb"):
        old.unlink()
    temporary = kept.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    temporary.replace(kept)
    return notebook


def to_markdown(notebook: NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """A page, and the pictures that its outputs hold.

    Messages on stderr (progress bars of libraries) are left out. Where a notebook folds the code of a cell, the page
    shows first what comes out of it, and below the code, folded.
    """
    notebook = deepcopy(notebook)
    for cell in list(notebook.cells):
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
            if cell.metadata.get("jupyter", {}).get("source_hidden"):
                cell.metadata["tags"] = [FOLDED]
                code = indent(f"```python\n{cell.source}\n```", "    ")
                below = new_markdown_cell(f'??? note "The code of this cell"\n\n{code}')
                notebook.cells.insert(notebook.cells.index(cell) + 1, below)
        else:
            cell.source = links_from_notebooks(cell.source)
    resources = {"unique_key": name, "output_files_dir": f"{name}_files"}
    config = Config({"TagRemovePreprocessor": {"remove_input_tags": {FOLDED}}})
    text, made = MarkdownExporter(config=config).from_notebook_node(notebook, resources)
    return text, made.get("outputs", {})


def _state(path: Path) -> str:
    """Changes with the notebook, the package and the demo's data."""
    digest = hashlib.sha256(path.read_bytes())
    sources = sorted((ROOT / "capa_probe").rglob("*.py"))
    data = [
        file
        for file in sorted((ROOT / "data").rglob("*"))
        if file.suffix in (".json", ".jsonl", ".safetensors")
    ]
    for file in sources:
        digest.update(file.read_bytes())
    for file in data:
        digest.update(f"{file.relative_to(ROOT)} {file.stat().st_size}".encode())
    return digest.hexdigest()[:16]

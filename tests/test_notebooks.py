"""The notebooks as they lie in the repository: a question, an answer from their own numbers, no outputs, known imports.

They are executed by nbmake, in ``make test``.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import check_files
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "") -> list[str]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if kind in ("", cell["cell_type"])]


def test_the_six() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "01_probe_a_model",
        "02_sinks_dumps_and_anchors",
        "03_ffn_redundancy_and_hadamard",
        "04_capa_end_to_end",
        "05_your_own_model_and_data",
        "06_write_your_own_probe_and_pruner",
    ]


@EACH
def test_has_no_outputs(path: Path) -> None:
    assert check_files.problems(path) == []


@EACH
def test_asks_at_the_start_and_answers_from_its_own_numbers(path: Path) -> None:
    every = cells(path)
    assert "**Question.**" in every[0]
    answer = every[every.index("## Answer") + 1]
    tree = ast.parse(answer)
    assert any(isinstance(node, ast.Assert) for node in tree.body)
    said = tree.body[-1]
    assert isinstance(said, ast.Expr)
    assert isinstance(said.value, ast.Call)
    (sentence,) = said.value.args
    assert isinstance(sentence, ast.JoinedStr)
    computed = [part for part in sentence.values if isinstance(part, ast.FormattedValue)]
    assert len(computed) >= 4  # numbers are put in when it runs
    written = "".join(str(part.value) for part in sentence.values if isinstance(part, ast.Constant))
    assert re.findall(r"\d+\.\d+", written.replace("eta = 0.96", "")) == []


@EACH
def test_needs_only_what_the_extra_installs(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        canonicalize_name(Requirement(line).name)
        for line in [*project["dependencies"], *project["optional-dependencies"]["notebooks"]]
    }
    providers = metadata.packages_distributions()
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(cell)):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                top = name.partition(".")[0]
                if top != "capa_probe" and top not in sys.stdlib_module_names:
                    assert {canonicalize_name(own) for own in providers[top]} & declared, name


@EACH
def test_links_lead_somewhere(path: Path) -> None:
    made = {"contributing.md": "../CONTRIBUTING.md"}
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", cell):
            assert "://" in target or (path.parent / made.get(target, target)).exists(), target


def test_one_flag_guards_the_large_model() -> None:
    """A name on the hub stands only where the flag of notebook 5 is asked."""
    for path in NOTEBOOKS:
        for cell in cells(path, "code"):
            if '-hf"' in cell or "device_map=" in cell:
                assert path.stem.startswith("05")
                (guarded,) = [
                    node
                    for node in ast.parse(cell).body
                    if isinstance(node, ast.If) and ast.unparse(node.test) == "RUN_7B"
                ]
                inside = "\n".join(map(ast.unparse, guarded.body))
                assert cell.count('-hf"') == inside.count("-hf'")  # unparsed with other quotes
                assert cell.count("device_map=") == inside.count("device_map=")

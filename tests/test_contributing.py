"""The worked examples of CONTRIBUTING.md and docs/new-pruner.md, carried out on a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PRUNER_GUIDE = (ROOT / "docs" / "new-pruner.md").read_text(encoding="utf-8")
#: Title of every fenced block (what it is to become) to its text.
EXAMPLES: dict[str, str] = dict(
    re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', GUIDE + PRUNER_GUIDE, re.MULTILINE | re.DOTALL)
)
#: Import before which an import is added.
NEXT_IMPORT = {
    "registry.py": "from capa_probe.lvlm.families.qwen2_5_vl",
    "methods.py": "from capa_probe.pruning.vision_attention",
}


def put_before(file: Path, mark: str, text: str, after: str) -> None:
    """Insert text before the first mark that follows another text, each of which must be there."""
    source = file.read_text(encoding="utf-8")
    at = source.index(mark, source.index(after))
    file.write_text(source[:at] + text + source[at:], encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the examples added at the places that the guide names."""
    copy = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "capa_probe", copy / "capa_probe", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests" / "oracles").mkdir(parents=True)
    helpers = ("conftest", "tiny", "naive", "reference", "oracles/columns", "oracles/compare")
    for name in ("pyproject.toml", *(f"tests/{helper}.py" for helper in helpers)):
        shutil.copy(ROOT / name, copy / name)
    for title, text in EXAMPLES.items():
        file, _, place = title.partition(": ")
        if place == "PROBE_COLUMNS":
            put_before(copy / file, "}\n", text, after="\nPROBE_COLUMNS:")
        elif place == "FAMILIES":
            put_before(copy / file, "    )\n}\n", text, after="\nFAMILIES:")
        elif place == "imports":
            put_before(copy / file, NEXT_IMPORT[Path(file).name], text, after="import")
        elif place == "METHODS":
            put_before(copy / file, "}\n", text, after="\nMETHODS:")
        else:
            assert not (copy / file).exists(), f"{file} is there already; the example is no example any more"
            (copy / file).write_text(text, encoding="utf-8")
    return copy


def run(project: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=project, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_guides_hold_all_examples() -> None:
    assert list(EXAMPLES) == [
        "capa_probe/probes/value_cosine.py",
        "capa_probe/schema.py: PROBE_COLUMNS",
        "tests/test_value_cosine.py",
        "capa_probe/lvlm/families/mistral3.py",
        "capa_probe/lvlm/families/registry.py: imports",
        "capa_probe/lvlm/families/registry.py: FAMILIES",
        "tests/test_mistral3.py",
        "capa_probe/pruning/strongest_head.py",
        "capa_probe/pruning/methods.py: imports",
        "capa_probe/pruning/methods.py: METHODS",
        "tests/test_strongest_head.py",
    ]


def test_the_examples_pass_their_own_tests(project: Path) -> None:
    out = run(project, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert "9 passed" in out  # three families with the probe and the pruner, three tests of the new family


def test_the_new_family_is_pruned_and_has_no_published_schedule(project: Path) -> None:
    code = """
import torch
import capa_probe as cp
from capa_probe.benchmark.schedule import is_paper_model, stage_layers
from tests.test_mistral3 import build, inputs

lvlm, ids = cp.HookedLVLM(build()), []
try:
    cp.CAPA(layers=(1,)).attach(lvlm).__enter__()
except ValueError as error:
    print(str(error).partition(",")[0])
lvlm.model.config.text_config.sliding_window = None
for execution in ("masked", "compact"):
    with cp.CAPA(layers=(1, 3), keep=(0.6, 0.3), execution=execution).attach(lvlm) as trace:
        ids.append(lvlm.model.generate(**inputs(), max_new_tokens=4, do_sample=False, pad_token_id=0))
print(torch.equal(*ids), trace.visual_tokens[:, 1].tolist(), is_paper_model(lvlm))
print(cp.CAPA.paper("llava-1.5-7b").layers)
try:
    stage_layers(lvlm)
except ValueError as error:
    print(error)
"""
    said = run(project, sys.executable, "-c", code).splitlines()
    assert said == [
        "The model has layers of sliding_attention",
        "True [7, 4, 4, 2] False",
        "(5,)",
        "A layer of the published schedule was asked for, but the paper has no mistral3 model; give layers.",
    ]


def test_the_examples_follow_the_style(project: Path) -> None:
    ruff = str(Path(sys.executable).with_name("ruff"))
    if not Path(ruff).exists():
        pytest.skip("ruff is not installed beside this Python")
    files = [
        "capa_probe/probes/value_cosine.py",
        "capa_probe/schema.py",
        "capa_probe/lvlm/families",
        "capa_probe/pruning",
        "tests",
    ]
    run(project, ruff, "check", "--no-cache", *files)
    run(project, ruff, "format", "--no-cache", "--check", *files)


def test_a_registry_that_disagrees_with_its_probe_is_named(project: Path) -> None:
    """The second place where columns are written must not go its own way unnoticed."""
    line = EXAMPLES["capa_probe/schema.py: PROBE_COLUMNS"]
    code = (
        "import capa_probe.schema as t; t.PROBE_COLUMNS['value_cosine.ValueCosine'] = ('value_cosin',)\n"
        "try:\n    import capa_probe.probes\nexcept ValueError as error:\n    print(error)"
    )
    assert "value_cosine" in line
    said = run(project, sys.executable, "-c", code)
    assert "value_cosine.ValueCosine fills value_cosine" in said
    assert "value_cosin;" in said


def test_the_map_names_files_that_exist() -> None:
    section = GUIDE.split("\n## Where things are\n")[1].split("\n## ")[0]
    named = [
        name
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", row)
    ]
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []

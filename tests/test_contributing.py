"""The worked examples of CONTRIBUTING.md, carried out on a copy of the project, as a contributor would."""

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
#: Title of every fenced block (what it is to become) to its text.
EXAMPLES: dict[str, str] = dict(
    re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', GUIDE, re.MULTILINE | re.DOTALL)
)


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
    (copy / "tests").mkdir()
    for name in ("pyproject.toml", "tests/conftest.py", "tests/tiny.py", "tests/reference.py"):
        shutil.copy(ROOT / name, copy / name)
    families = copy / "capa_probe" / "lvlm" / "families.py"
    for title, text in EXAMPLES.items():
        file, _, place = title.partition(": ")
        if place == "PROBE_COLUMNS":
            put_before(copy / file, "}\n", text, after="\nPROBE_COLUMNS:")
        elif place == "FAMILIES":
            put_before(copy / file, "    )\n}\n", text, after="\nFAMILIES:")
        elif copy / file == families:
            put_before(families, "#: Every supported family", f"{text}\n\n", after="\nclass InternVL(")
        else:
            assert not (copy / file).exists(), f"{file} is there already; the example is no example any more"
            (copy / file).write_text(text, encoding="utf-8")
    return copy


def run(project: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=project, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_guide_holds_both_examples() -> None:
    assert list(EXAMPLES) == [
        "capa_probe/probes/value_cosine.py",
        "capa_probe/schema.py: PROBE_COLUMNS",
        "tests/test_value_cosine.py",
        "capa_probe/lvlm/families.py",
        "capa_probe/lvlm/families.py: FAMILIES",
        "tests/test_mistral3.py",
    ]


def test_the_examples_pass_their_own_tests(project: Path) -> None:
    out = run(project, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert "6 passed" in out  # three families with the probe, three tests of the new family


def test_the_examples_follow_the_style(project: Path) -> None:
    ruff = str(Path(sys.executable).with_name("ruff"))
    if not Path(ruff).exists():
        pytest.skip("ruff is not installed beside this Python")
    files = [
        "capa_probe/probes/value_cosine.py",
        "capa_probe/schema.py",
        "capa_probe/lvlm/families.py",
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

"""What surrounds the code: citation, hooks, templates and workflow."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import check_files
import pytest
import yaml

import capa_probe

ROOT = Path(__file__).parents[1]


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


#: Keys of CITATION.cff and what their values look like, as in the CFF 1.2.0 schema.
TOP = {
    "cff-version": r"1\.2\.0",
    "message": r".+",
    "type": r"software|dataset",
    "title": r".+",
    "version": r".+",
    "license": r"MIT",
    "abstract": r".+",
    "date-released": r"\d{4}-\d{2}-\d{2}",
    "doi": r"10\.\d{4,9}(\.\d+)?/[A-Za-z0-9:/_;\-.()\[\]\\]+",
    "url": r"https?://\S+",
    "repository-code": r"https?://\S+",
}
#: The same for an entry of its references.
REFERENCE = {
    "type": r"article|conference-paper|software",
    "title": r".+",
    "status": r"abstract|advance-online|in-preparation|in-press|preprint|submitted",
    "collection-title": r".+",
    "journal": r".+",
    "year": r"\d{4}",
    "month": r"[1-9]|1[0-2]",
    "doi": TOP["doi"],
    "url": TOP["url"],
}


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    return load("CITATION.cff")


class TestCitation:
    """CITATION.cff against the parts of the CFF 1.2.0 schema that it uses; anything else in it is an error."""

    @staticmethod
    def check(entry: dict[str, Any], patterns: dict[str, str], required: set[str], lists: set[str]) -> None:
        assert required <= entry.keys()
        assert entry.keys() - patterns.keys() - lists == set()
        numbers = {"year", "month"}
        for key, pattern in patterns.items():
            if key in entry:
                # YAML would read an unquoted 1.2 as a number and a date as a date; the schema wants text.
                assert isinstance(entry[key], int if key in numbers else str), key
                assert re.fullmatch(pattern, str(entry[key]).strip(), re.DOTALL), key
        for author in entry["authors"]:
            allowed = {"name", "website"} if "name" in author else {"family-names", "given-names", "orcid"}
            assert author.keys() <= allowed
            assert author.keys() & {"name", "family-names"}
            assert all(isinstance(value, str) for value in author.values())
        for identifier in entry.get("identifiers", []):
            assert identifier.keys() <= {"type", "value", "description"}
            assert identifier["type"] in {"doi", "url", "swh", "other"}
            assert identifier["value"]

    def test_is_valid(self, citation: dict[str, Any]) -> None:
        required = {"authors", "cff-version", "message", "title"}
        self.check(citation, TOP, required, {"authors", "keywords", "references", "identifiers"})
        assert len(set(citation["keywords"])) == len(citation["keywords"])
        for reference in citation["references"]:
            self.check(
                reference,
                REFERENCE,
                {"authors", "title", "type"},
                {"authors", "identifiers", "keywords"},
            )

    def test_is_in_step_with_the_package(self, citation: dict[str, Any]) -> None:
        project = (ROOT / "pyproject.toml").read_text()
        assert citation["version"] == capa_probe.__version__
        assert f'license = "{citation["license"]}"' in project
        assert f'authors = [{{ name = "{citation["authors"][0]["name"]}" }}]' in project
        assert citation["license"] in (ROOT / "LICENSE").read_text()

    def test_cites_the_papers(self, citation: dict[str, Any]) -> None:
        cited = [entry["value"] for reference in citation["references"] for entry in reference["identifiers"]]
        assert cited[0] == "arXiv:2602.00247"
        for reference, value in zip(citation["references"], cited, strict=True):
            assert reference["url"].endswith(value.removeprefix("arXiv:"))


class TestHooks:
    def test_run_what_make_lint_runs_from_the_same_environment(self) -> None:
        (repository,) = load(".pre-commit-config.yaml")["repos"]
        assert repository["repo"] == "local"  # no version of its own to differ from constraints.txt
        makefile = (ROOT / "Makefile").read_text()
        recipe = makefile.split("\nlint:")[1].split("\n\n")[0]
        linted = {line.split("/")[1].split()[0] for line in recipe.splitlines() if "$(BIN)" in line}
        assert linted == {"ruff", "mypy"}
        entries = {hook["id"]: hook["entry"].split() for hook in repository["hooks"]}
        for hook in repository["hooks"]:
            assert hook["language"] == "system"
            assert {"id", "name", "entry"} <= hook.keys()
            assert hook["entry"].startswith(".venv/bin/")
        assert f"VENV := {entries['mypy'][0].partition('/')[0]}\n" in makefile
        tools = {Path(entry[0]).name for entry in entries.values()} - {"python"}
        assert tools == linted
        assert (ROOT / entries["files"][1]).is_file()

    def test_every_file_of_the_repository_passes(self) -> None:
        if not (ROOT / ".git").exists():
            pytest.skip("not a git checkout")
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
        files = [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
        assert len(files) > 100
        data = [file for file in files if file.is_relative_to(ROOT / "data")]
        wrong = [(file, check_files.problems(file)) for file in files if file not in data]
        assert [(str(file), found) for file, found in wrong if found] == []

    @pytest.mark.parametrize(
        ("name", "content", "problem"),
        [
            ("a.py", b"x = 1  \n", "blanks at the end of line 1"),
            ("a.py", b"x = 1\r\n", "blanks at the end of line 1"),
            ("a.md", b"text", "exactly one newline"),
            ("a.md", b"text\n\n", "exactly one newline"),
            ("a.py", b"<<<<<<< here\n", "merge conflict"),
            ("a.txt", b"\xff\xfe\n", "not UTF-8"),
            ("a.svg", b"<svg>", "exactly one newline"),
            ("a.bin", b"0" * 500_001, "500,001 bytes"),
            (
                "a.ipynb",
                b'{"cells": [{"outputs": []}, {"outputs": [1], "execution_count": null}]}\n',
                "outputs in cell 1",
            ),
            ("a.ipynb", b'{"cells": [{"outputs": [], "execution_count": 3}]}\n', "outputs in cell 0"),
        ],
    )
    def test_the_file_check_finds(self, tmp_path: Path, name: str, content: bytes, problem: str) -> None:
        (tmp_path / name).write_bytes(content)
        (found,) = check_files.problems(tmp_path / name)
        assert problem in found

    def test_the_file_check_lets_good_files_pass(self, tmp_path: Path) -> None:
        good = {
            "a.py": b"x = 1\n",
            "a.md": b"",
            "a.bin": b"\xff",
            "a.ipynb": b'{"cells": [{"outputs": []}]}\n',
        }
        for name, content in good.items():
            (tmp_path / name).write_bytes(content)
            assert check_files.problems(tmp_path / name) == []


FORMS = sorted(
    path.name for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"
)


class TestTemplates:
    def test_there_are_forms(self) -> None:
        assert FORMS == ["bug.yml", "family.yml", "probe.yml"]

    @pytest.mark.parametrize("name", FORMS)
    def test_a_form_has_what_github_wants(self, name: str) -> None:
        form = load(f".github/ISSUE_TEMPLATE/{name}")
        assert form.keys() <= {"name", "description", "title", "labels", "assignees", "body"}
        assert all(isinstance(form[key], str) and form[key] for key in ("name", "description"))
        ids = [field["id"] for field in form["body"] if "id" in field]
        labels = [field["attributes"]["label"] for field in form["body"] if field["type"] != "markdown"]
        assert len(set(ids)) == len(ids)
        assert len(set(labels)) == len(labels)
        assert any(field["type"] != "markdown" for field in form["body"])
        for field in form["body"]:
            assert field.keys() <= {"type", "id", "attributes", "validations"}
            assert field["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
            assert "value" in field["attributes"] or field["attributes"]["label"]
            assert re.fullmatch(r"[\w-]+", field.get("id", "none"))
            assert isinstance(field.get("validations", {}).get("required", False), bool)
            if field["type"] in {"dropdown", "checkboxes"}:
                assert field["attributes"]["options"]

    def test_the_chooser_and_the_pull_request(self) -> None:
        assert load(".github/ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": True}
        template = (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text()
        for name in re.findall(r"`((?:docs/)?[\w.]+\.md)`", template):
            assert (ROOT / name).is_file()

    def test_the_workflow_runs_the_whole_check_on_the_oldest_python(self) -> None:
        workflow = load(".github/workflows/ci.yml")
        assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key "on" as true
        assert workflow["permissions"] == {"contents": "read"}
        (job,) = workflow["jobs"].values()
        assert job["runs-on"]
        assert job["steps"][-1] == {"run": ".ci/run"}
        assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
        (python,) = [
            step["with"]["python-version"] for step in job["steps"] if "python" in step.get("uses", "")
        ]
        assert f'requires-python = ">={python}"' in (ROOT / "pyproject.toml").read_text()

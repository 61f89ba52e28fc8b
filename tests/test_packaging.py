"""The package as a whole: its metadata agree with each other, its layers point one way, and its wheel is complete."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import capa_probe
from capa_probe.report.build import SCRIPTS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "capa_probe"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

#: A file imports only from those above it in this list.
LAYERS = (
    "__about__",
    "errors",
    "measures",
    "head_products",
    "flops",
    "files",
    "display",
    "samples",
    "schema",
    "profile_card",
    "tables",
    "layer_table",
    "run_folder",
    "writing",
    "memory",
    "lvlm",
    "lens_model",
    "activation_cache",
    "describing",
    "batching",
    "probes",
    "profiling",
    "examples",
    "patches",
    "analysis",
    "pruning",
    "benchmark",
    "figures",
    "findings",
    "comparison",
    "figure_set",
    "report",
    "demo",
    "console",
    "jobs",
    "run_output",
    "one_run",
    "cli",
)
SOURCES = sorted(PACKAGE.rglob("*.py"))


def requirements(*extras: str) -> list[Requirement]:
    listed = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for lines in listed for line in lines]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


class TestMetadata:
    def test_version_is_written_once(self) -> None:
        assert "version" not in PROJECT
        assert PROJECT["dynamic"] == ["version"]
        assert metadata.version("capa-probe") == capa_probe.__version__
        written = [path for path in SOURCES if re.search(r"^__version__\s*=", path.read_text(), re.MULTILINE)]
        assert written == [PACKAGE / "__about__.py"]

    def test_environment_yml_installs_the_project_with_all_its_extras(self) -> None:
        environment = yaml.safe_load((ROOT / "environment.yml").read_text())
        assert environment["name"] == PROJECT["name"]
        conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
        (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
        # Everything else comes through pyproject.toml, so nothing is listed twice.
        assert conda == [f"python{PROJECT['requires-python']}", "pip"]
        assert pip == ["-c constraints.txt", f"-e .[{','.join(PROJECT['optional-dependencies'])}]"]

    def test_constraints_are_plain_pins(self) -> None:
        text = (ROOT / "constraints.txt").read_text()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert [line for line in lines if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*==[0-9][\w.]*", line)] == []
        assert list(pins()) == sorted(pins())
        assert "//" not in text

    def test_constraints_pin_every_dependency_within_its_bounds(self) -> None:
        pinned = pins()
        for requirement in requirements(*PROJECT["optional-dependencies"]):
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"

    def test_constraints_pin_what_the_dependencies_need_in_turn(self) -> None:
        pinned, seen = pins(), set()
        todo = requirements()
        while todo:
            name = canonicalize_name(todo.pop().name)
            if name in seen:
                continue
            seen.add(name)
            needed = (Requirement(line) for line in metadata.requires(name) or [])
            todo += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
        assert seen - pinned.keys() == set()

    def test_every_import_of_the_library_is_declared(self) -> None:
        declared = {canonicalize_name(requirement.name) for requirement in requirements()}
        providers = metadata.packages_distributions()
        for path in SOURCES:
            for module in imported_modules(path):
                top = module.partition(".")[0]
                if top != "capa_probe" and top not in sys.stdlib_module_names:
                    names = {canonicalize_name(name) for name in providers.get(top, [])}
                    assert names & declared, f"{path.relative_to(ROOT)} imports {top}, which is not declared"


class TestArchitecture:
    def test_every_module_has_its_layer(self) -> None:
        top = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py"}
        top |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
        assert top - {"__init__", "__main__"} <= set(LAYERS)

    @pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
    def test_imports_point_up_the_list(self, path: Path) -> None:
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if here in {"__init__", "__main__"}:
            return
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[0] != "capa_probe":
                continue
            assert len(parts) > 1, f"{path.name} imports the package itself; import the module that it needs"
            assert LAYERS.index(parts[1]) <= LAYERS.index(here), (
                f"{here} imports {parts[1]}, which is below it"
            )

    @pytest.mark.parametrize("name", ["measures", "flops"])
    def test_formulas_see_nothing_but_the_error(self, name: str) -> None:
        paths = [path for path in SOURCES if path.relative_to(PACKAGE).parts[0].removesuffix(".py") == name]
        assert paths
        for path in paths:
            ours = {module for module in imported_modules(path) if module.startswith("capa_probe")}
            own = {module for module in ours if module.startswith(f"capa_probe.{name}.")}
            assert ours - own <= {"capa_probe.errors"}, path

    def test_flops_are_pure_arithmetic(self) -> None:
        for path in (PACKAGE / "flops").rglob("*.py"):
            used = {module.split(".")[0] for module in imported_modules(path)} - {"capa_probe"}
            assert used <= sys.stdlib_module_names, path

    def test_analysis_and_figures_never_run_a_model(self) -> None:
        for folder in ("analysis", "figures", "report"):
            for path in (PACKAGE / folder).rglob("*.py"):
                used = {module.split(".")[0] for module in imported_modules(path)}
                assert not used & {"torch", "transformers", "transformer_lens"}, path

    def test_the_library_does_not_print_and_unpickles_nothing(self) -> None:
        for path in SOURCES:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id != "print", f"{path}:{node.lineno} prints; use logging"
            assert not {"pickle", "dill", "joblib"} & {
                module.split(".")[0] for module in imported_modules(path)
            }


@pytest.fixture(scope="module")
def names_in_wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("wheel")
    # The build backend is already installed, so that nothing is fetched.
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    assert wheel.name == f"capa_probe-{capa_probe.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


class TestWheel:
    def test_holds_the_library_and_its_type_marker(self, names_in_wheel: list[str]) -> None:
        assert {str(path.relative_to(ROOT)) for path in SOURCES} <= set(names_in_wheel)
        assert "capa_probe/py.typed" in names_in_wheel

    def test_holds_the_template_of_the_report(self, names_in_wheel: list[str]) -> None:
        for name in ("report.html.j2", "report.css", "explorer.html.j2", *(f"{name}.js" for name in SCRIPTS)):
            assert f"capa_probe/report/templates/{name}" in names_in_wheel

    def test_holds_the_demo(self, names_in_wheel: list[str]) -> None:
        folders = {path.name for path in (ROOT / "data").iterdir() if path.is_dir()}
        assert folders >= {"demo-lvlm", "shapesqa"}
        for folder in folders:
            files = [path for path in (ROOT / "data" / folder).rglob("*") if path.is_file()]
            assert files
            shipped = {f"capa_probe/_data/{path.relative_to(ROOT / 'data')}" for path in files}
            assert shipped <= set(names_in_wheel)

    def test_holds_nothing_else(self, names_in_wheel: list[str]) -> None:
        allowed = ("capa_probe/", f"capa_probe-{capa_probe.__version__}.dist-info/")
        assert [name for name in names_in_wheel if not name.startswith(allowed)] == []
        assert [name for name in names_in_wheel if "__pycache__" in name] == []


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, inside functions too."""
    package = [*path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            # "from capa_probe import measures" imports capa_probe.measures
            if module == "capa_probe":
                yield from (f"capa_probe.{alias.name}" for alias in node.names)
            else:
                yield module

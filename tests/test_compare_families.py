"""The script that makes every run of the demo models and writes their comparison into a page."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from capa_probe.cli import app
from capa_probe.errors import CapaProbeError

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "compare_families.py"))
TABLE = SCRIPT["TABLE"]
START, END = TABLE.start, TABLE.end


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands, which are noted and not run; ``compare`` leaves a small table."""
    found: list[list[str]] = []

    def note(command: list[str], standalone_mode: bool) -> None:
        assert not standalone_mode
        found.append(command)
        if command[0] == "compare":
            out = Path(command[command.index("--out") + 1])
            out.mkdir(parents=True)
            (out / "comparison.md").write_text("| new |\n")
            (out / "comparison-short.md").write_text("| short |\n")
            (out / "comparison.csv").write_text("new\n1\n")

    scope = SCRIPT["main"].__globals__
    monkeypatch.setitem(scope, "app", note)
    # Whether the models are there or not.
    monkeypatch.setitem(scope, "demo_model_path", Path)
    monkeypatch.setitem(scope, "demo_data_path", lambda split, world: Path(world))
    return found


def test_runs_it_makes(done: list[list[str]], tmp_path: Path) -> None:
    made = list(SCRIPT["commands"](["llava", "internvl"], tmp_path, 210))
    assert [command[0] for command in made] == ["depth", "confirm", "demo"] * 2
    assert len({command[command.index("--out") + 1] for command in made}) == 6
    known = {
        name: set(re.findall(r"--[a-z-]+", CliRunner().invoke(app, [name, "--help"]).stdout))
        for name in ("depth", "confirm", "demo")
    }
    for command in made:
        assert {part for part in command if part.startswith("--")} <= known[command[0]]


def test_only_what_lies_between_the_markers_is_written() -> None:
    text = TABLE.written(f"before\n{START}\nold\n{END}\nafter\n", "| new |\n")
    assert text == f"before\n{START}\n\n| new |\n\n{END}\nafter\n"
    for wrong in ("no markers", START, f"{END}{START}", f"{START}{END}{END}", f"{START}{START}{END}"):
        with pytest.raises(CapaProbeError, match="put them where the part belongs"):
            TABLE.written(wrong, "| new |\n")


def test_the_tables_go_into_the_pages(done: list[list[str]], tmp_path: Path) -> None:
    page, short, csv = tmp_path / "docs" / "all.md", tmp_path / "README.md", tmp_path / "docs" / "all.csv"
    page.parent.mkdir()
    for file in (page, short):
        file.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    args = [
        "--out",
        str(tmp_path / "runs"),
        "--page",
        str(page),
        "--short-page",
        str(short),
        "--csv",
        str(csv),
    ]
    SCRIPT["main"]([*args, "--families", "internvl", "--runs-only"])
    assert [command[0] for command in done] == ["depth", "confirm", "demo"]
    assert "old" in page.read_text()
    assert "old" in short.read_text()
    done.clear()
    SCRIPT["main"](args)
    folders = [command[command.index("--out") + 1] for command in done[:-1]]
    assert done[-1] == ["compare", *folders, "--out", str(tmp_path / "runs" / "comparison")]
    assert len(folders) == 9
    assert page.read_text() == (
        f"before\n{START}\n\n| new |\n\n[All numbers, with their intervals](all.csv).\n\n{END}\nafter\n"
    )
    link = "[Every number, with what it rests on](docs/all.md)"
    assert short.read_text() == f"before\n{START}\n\n| short |\n\n{link}.\n\n{END}\nafter\n"
    assert csv.read_text() == "new\n1\n"
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "docs", "runs"}


@pytest.mark.parametrize("option", ["--page", "--short-page"])
def test_a_page_without_a_place_for_it_is_said_first(
    option: str, done: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(SystemExit, match="2"):
        SCRIPT["main"](["--out", str(tmp_path), option, str(tmp_path / "README.md")])
    assert "put them where the part belongs" in capsys.readouterr().err
    assert done == []


def test_it_ends_where_a_run_fails(
    done: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCRIPT["main"].__globals__, "app", lambda *_, **__: 3)
    with pytest.raises(SystemExit, match="3"):
        SCRIPT["main"](["--out", str(tmp_path), "--runs-only"])


@pytest.mark.parametrize("page", ["README.md", "docs/families.md"])
def test_pages_have_a_place_for_it(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert TABLE.written(text, "| new |\n").count("| new |") == 1

"""What the documentation says is so: its code runs, its tables are complete, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import capa_probe as cp
from capa_probe.samples import load_samples
from capa_probe.schema import GROUP_COLUMNS, STATISTICS, TOKEN_SCHEMA
from tests import tiny

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def table_names(page: Path, heading: str) -> set[str]:
    """Names in code style in the first column of the table under a heading."""
    section = page.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


@pytest.mark.filterwarnings("ignore:These dimensions exceed tau")  # a fact about the demo model
def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # it works from anywhere and leaves nothing behind
    namespace: dict[str, Any] = {}
    for block in blocks(ROOT / "README.md", "python"):
        exec(block.replace("limit=20", "limit=2"), namespace)
    assert {"visual", "text"} == set(namespace["prof"].tokens["kind"])
    assert len(namespace["layers"]) == namespace["lvlm"].n_layers
    assert namespace["to_images"].shape[-1] == int(namespace["visual"][0].sum())
    assert list(tmp_path.iterdir()) == []


def test_readme_sample_line_is_a_sample(tmp_path: Path) -> None:
    (line,) = blocks(ROOT / "README.md", "json")
    (tmp_path / "samples.jsonl").write_text(line)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cat.jpg").touch()
    (sample,) = load_samples(tmp_path)
    assert sample.answers == ("a cat",)


def test_probes_in_the_docs_are_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from capa_probe.probes import PROBES, AttentionProbe, ResidualProbe, token_table

    namespace: dict[str, Any] = {"AttentionProbe": AttentionProbe, "ResidualProbe": ResidualProbe}
    for block in blocks(ROOT / "docs" / "extending.md", "python"):
        exec(block, namespace)
    row = torch.rand(2, 3, 5)
    received = namespace["Received"]().measure(None, row, None)
    torch.testing.assert_close(received["attention_max"], row.max(dim=1).values)
    # At decode steps the token table must know which columns are filled for every key.
    monkeypatch.setitem(PROBES, "attention_max", namespace["Received"])
    monkeypatch.setitem(PROBES, "resid_max", namespace["ResidMax"])
    assert "attention_max" in token_table._key_columns()
    assert "resid_max" not in token_table._key_columns()
    x = torch.randn(2, 5, 7)
    largest = namespace["ResidMax"]().measure({"hook_resid_pre": x}, None)
    torch.testing.assert_close(largest["resid_max"], x.abs().max(dim=-1).values)


def test_every_column_is_explained() -> None:
    page = ROOT / "docs" / "tables.md"
    assert table_names(page, "tokens") == set(TOKEN_SCHEMA.names)
    assert table_names(page, "layers") == {
        *GROUP_COLUMNS,
        "n_tokens",
        *(f"{{measure}}_{s}" for s in STATISTICS),
    }


def test_every_manifest_key_is_explained() -> None:
    prof = cp.profile(cp.HookedLVLM(tiny.build("llava")), [tiny.inputs("llava")], progress=False)
    assert table_names(ROOT / "docs" / "tables.md", "manifest") == set(prof.manifest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert "classify_sinks" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")

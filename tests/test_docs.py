"""What the documentation says is so: its code runs, its tables are complete, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mkdocs_math
import pytest
import torch

import capa_probe as cp
from capa_probe import analysis
from capa_probe.demo import demo_data_path, demo_model_path
from capa_probe.figures.registry import ENTRIES
from capa_probe.samples import load_samples
from capa_probe.schema import GROUP_COLUMNS, MEASURES, SINK_COLUMNS, STATISTICS, TOKEN_SCHEMA
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


#: Pages that the site makes of other files (scripts/mkdocs_pages.py).
MADE = {
    ROOT / "docs" / "contributing.md": ROOT / "CONTRIBUTING.md",
    ROOT / "docs" / "changelog.md": ROOT / "CHANGELOG.md",
    **{
        ROOT / "docs" / "notebooks" / f"{path.stem}.md": path for path in (ROOT / "notebooks").glob("*.ipynb")
    },
}


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
    missing = [target for target in local if not (page.parent / target).exists()]
    on_site = page.parent == ROOT / "docs"
    assert [target for target in missing if not (on_site and page.parent / target in MADE)] == []


def test_every_measure_has_its_formula_with_unit_and_range() -> None:
    page = (ROOT / "docs" / "maths.md").read_text(encoding="utf-8")
    explained = {
        name: words
        for names, words in re.findall(
            r"^((?:`\w+`(?:, )?)+)\n:   (.*?)(?=\n\n)", page, re.MULTILINE | re.DOTALL
        )
        for name in re.findall(r"`(\w+)`", names)
    }
    dims = {dim for _, dim in SINK_COLUMNS}
    assert set(explained) == {*MEASURES, *dims}
    for name in (
        {*MEASURES} - dims - {strength for strength, _ in SINK_COLUMNS[1:]}
    ):  # those are ranks of the first
        assert re.search(r"[Ff]rom (-1|0)\b", explained[name]), f"the range of {name} is not said"


@pytest.mark.filterwarnings("ignore:These dimensions exceed tau")
def test_the_tutorials_code_runs() -> None:
    (block,) = blocks(ROOT / "docs" / "tutorial.md", "python")
    namespace: dict[str, Any] = {}
    exec(block.replace("limit=20", "limit=2"), namespace)
    assert f"print(trace)  # {repr(namespace['trace'])[6:-1]}" in block


def test_the_code_about_hooks_runs() -> None:
    names: dict[str, Any] = {}
    exec("\n".join(blocks(ROOT / "docs" / "hooks.md", "python")), names)
    lvlm, inputs = names["lvlm"], names["inputs"]
    with torch.no_grad():
        plain = lvlm.model(**inputs)
    assert torch.equal(names["out"].logits, plain.logits)
    assert names["to_image"].shape == (1, 8)
    assert ((names["to_image"] > 0) & (names["to_image"] < 1)).all()
    torch.testing.assert_close(names["rows"][3], names["pattern"][:, :, -1])
    for edited in ("silenced", "blind"):
        assert not torch.allclose(names[edited].logits[:, -1], plain.logits[:, -1], atol=1e-3), edited
    new = names["answer"].shape[1] - inputs["input_ids"].shape[1]
    assert len(names["norms"]) == new
    assert not any(point.has_hooks() for point in lvlm.hook_dict.values())


@pytest.mark.filterwarnings("ignore:These dimensions exceed tau")
def test_the_code_for_a_7b_model_runs_on_the_demo_model(tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "docs" / "seven-billion.md", "python")
    for real, small in {
        '"llava-hf/llava-1.5-7b-hf", dtype="bfloat16", device_map="cuda"': repr(str(demo_model_path())),
        '"DATA", limit=200': f"{str(demo_data_path())!r}, limit=2",
        '"runs/llava"': repr(str(tmp_path / "run")),
        "classify_sinks(prof)": 'classify_sinks(prof, tau="relative")',  # 20 is out of reach at width 256
    }.items():
        assert block.count(real) == 1
        block = block.replace(real, small)
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    assert set(namespace["prof"].tokens["kind"]) == {"visual"}
    assert len(namespace["layers"]) == namespace["lvlm"].n_layers


@pytest.mark.parametrize("name", ["tutorial.md", "seven-billion.md", "new-pruner.md", "report.md"])
def test_commands_have_the_options_that_the_page_gives_them(name: str) -> None:
    from typer.main import get_command

    from capa_probe.cli import app

    known: Any = get_command(app)
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    found = re.findall(r"capa-probe ([a-z]\w*)([^`\n]*)", text)
    assert found
    for command, rest in found:
        options = {option for parameter in known.commands[command].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options, command


class TestFormulas:
    def test_all_of_the_pages_are_drawn(self) -> None:
        drawn = [
            mkdocs_math.fence(block, "math", "math", {}, None)
            for page in PAGES
            for block in blocks(page, "math")
        ]
        assert len(drawn) > 10
        assert all("<svg" in formula for formula in drawn)

    def test_a_fraction_has_its_line_and_follows_the_page(self) -> None:
        one, other = mkdocs_math.draw(r"\frac{a}{b}"), mkdocs_math.draw("a b")
        assert one.count("Z") == other.count("Z") + 1  # outlines of two letters, and the line between them
        assert "currentColor" in one
        assert 'aria-label="\\frac{a}{b}"' in one

    def test_what_mathtext_does_not_know_stops_the_build(self) -> None:
        with pytest.raises(ValueError, match="nonsense"):
            mkdocs_math.draw(r"\nonsense{a}")

    def test_text_is_no_markup(self) -> None:
        assert "<script" not in mkdocs_math.draw(r"a \leq <script>")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages, the notebooks without their outputs (`make docs` executes them)."""
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SITE_NOTEBOOKS", "off")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


class TestSite:
    def test_it_builds(self, site: Path) -> None:
        assert "classify_sinks" in (site / "api" / "index.html").read_text(encoding="utf-8")
        maths = (site / "maths" / "index.html").read_text(encoding="utf-8")
        assert maths.count("<svg role") == (ROOT / "docs" / "maths.md").read_text().count("```math")

    def test_every_public_name_is_in_the_api(self, site: Path) -> None:
        api = (site / "api" / "index.html").read_text(encoding="utf-8")
        for name in {*cp.__all__} - {"__version__"}:
            assert re.search(rf'id="capa_probe\.([\w.]+\.)?{name}"', api), name

    def test_every_analysis_and_figure_is_in_the_api(self, site: Path) -> None:
        api = (site / "api" / "index.html").read_text(encoding="utf-8")
        names = {*analysis.__all__} - {"SPLITS"} | {entry.name for entry in ENTRIES}
        assert [
            name for name in sorted(names) if not re.search(rf'id="capa_probe\.[\w.]+\.{name}"', api)
        ] == []

    def test_docstrings_are_laid_out(self, site: Path) -> None:
        api = (site / "api" / "index.html").read_text(encoding="utf-8")
        assert re.findall(r":(?:func|class|meth|mod):", api) == []
        assert re.search(r'<a [^>]*href="#capa_probe\.tables\.LayerProfile\.read"><code>read</code></a>', api)
        start = api.index('id="capa_probe.analysis.transition_layers"')
        returns = api[api.index("Returns:", start) :].partition("</table>")[0]
        assert returns.count("<tr") == 2  # a head, and one thing that is returned

    @pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
    def test_the_code_of_an_answer_is_folded(self, site: Path, path: Path) -> None:
        page = (site / "notebooks" / path.stem / "index.html").read_text(encoding="utf-8")
        (folded,) = re.findall(r"<details.*?</details>", page, re.DOTALL)
        open_code = page.replace(folded, "")
        assert "Markdown" in folded
        assert "Markdown" in open_code  # it is imported
        assert re.search(r"Markdown</span><span[^>]*>\(", folded)
        assert not re.search(r"Markdown</span><span[^>]*>\(", open_code)

    def test_every_notebook_and_guide_is_a_page(self, site: Path) -> None:
        for page in MADE:
            name = page.relative_to(ROOT / "docs").with_suffix("")
            assert (site / name / "index.html").is_file()

    def test_no_page_needs_the_network(self, site: Path) -> None:
        loads = re.compile(
            r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//|url\(["']?(?:https?:)?//"""
        )
        links = re.compile(r"""<link[^>]*\shref=["']?(?:https?:)?//""")
        for page in [*site.rglob("*.html"), *site.rglob("*.css")]:
            text = page.read_text(encoding="utf-8")
            assert not loads.search(text), page
            assert not [link for link in links.findall(text) if "canonical" not in link], page

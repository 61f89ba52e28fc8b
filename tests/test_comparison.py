"""``capa-probe compare``: runs of several models, side by side, each number as the run itself has it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

import capa_probe as cp
from capa_probe.benchmark.claims import FAILS, HOLDS, UNKNOWN, judge
from capa_probe.benchmark.confirm import confirm
from capa_probe.benchmark.depth import measure_depth
from capa_probe.benchmark.setup import Settings
from capa_probe.benchmark.store import read_tables
from capa_probe.cli import app
from capa_probe.comparison import COLUMNS, brief, compare, differences, page, read_runs, refuted
from capa_probe.errors import CapaProbeError
from capa_probe.findings import find, write
from capa_probe.tables import UNFINISHED_FILE
from tests import processors, runs, tiny
from tests.confirm_trials import samples

SETTINGS = Settings(
    batch_size=4, max_new_tokens=2, draws=1, keeps=(1.0, 0.5, 0.25, 0.1), layers=(1,), eta=-0.5
)
FAMILIES = ("qwen2_5_vl", "internvl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A profile, a confirmation and the depth of one tiny model; of another the first two."""
    base, found = tmp_path_factory.mktemp("runs"), {}
    questions = [replace(sample, task="ab"[n % 2]) for n, sample in enumerate(samples())]
    for family in FAMILIES:
        lvlm = cp.HookedLVLM(tiny.build(family), processors.shared(family))
        out = {kind: base / f"{family}-{kind}" for kind in ("profile", "confirm", "depth")}
        prof = cp.profile(lvlm, questions, out["profile"], progress=False)
        write(prof, find(prof, tau=3.0), out["profile"])  # so narrow a model has no threshold of its own
        confirm(lvlm, questions, out["confirm"], experiments="3,4,5", settings=SETTINGS, progress=False)
        if family == "qwen2_5_vl":
            measure_depth(lvlm, questions, out["depth"], keeps=(0.25,), draws=1, progress=False)
        found |= {folder.name: folder for folder in out.values() if folder.is_dir()}
    return found


def of(table: pd.DataFrame, family: str, row: str, part: str = "") -> pd.Series:
    own = table[(table["family"] == family) & (table["row"] == row) & (table["part"] == part)]
    assert len(own) == 1, (family, row, part)
    return own.iloc[0]


class TestTable:
    def test_every_number_is_that_of_the_run(self, folders: dict[str, Path]) -> None:
        models = read_runs(list(folders.values()))
        table = compare(models)
        assert tuple(table) == COLUMNS
        assert [model.facts["family"] for model in models] == list(FAMILIES)
        assert not table.duplicated(["row", "part", "model"]).any()
        for family in FAMILIES:
            tables = read_tables(folders[f"{family}-confirm"])
            budget = tables["budget"].query("task == 'all'")
            for row in budget[budget["score"].isin(["contribution", "attention", "random"])].itertuples():
                if row.keep < 1:
                    mine = of(table, family, f"accuracy, {row.keep:.0%} kept, {row.stage}", row.score)
                    assert (mine["value"], mine["low"], mine["high"]) == pytest.approx(
                        (row.correct, row.correct_low, row.correct_high)
                    )
            itself = tables["together"].query("task == 'all' and method == 'vanilla'").iloc[0]
            mine = of(table, family, "accuracy, all kept")
            assert mine["value"] == pytest.approx(itself["correct"])
            capa = tables["together"].query("task == 'all' and method == 'capa'").iloc[0]
            mine = of(table, family, f"FLOPs of CAPA, {capa['stage']}", "as published")
            assert mine["value"] == pytest.approx(capa["flops_share_as_published"])
            profile = cp.LayerProfile.load(folders[f"{family}-profile"])
            layers = cp.redundant_layers(profile)
            assert (
                of(table, family, "layers whose FFN is redundant for visual tokens")["value"]
                == layers["redundant"].sum()
            )
            counted = profile.tokens.query("kind == 'visual' and layer == 0").groupby("sample").size()
            assert of(table, family, "visual tokens of an image or prompt")["value"] == counted.mean()
            claims = judge(tables)
            mine = table[(table["family"] == family) & (table["section"] == "claims")]
            assert list(mine["verdict"]) == list(claims["verdict"])
            assert list(mine["text"]) == list(claims["numbers"])
            for name in ("value", "low", "high"):
                wanted = claims["difference" if name == "value" else name]
                np.testing.assert_array_equal(mine[name], wanted)
            # As the experiment's own table has them.
            (test,) = (
                tables["budget_tests"]
                .query(
                    "stage == 'all' and second == 'attention' and task == 'all' and measure == 'hellinger'"
                )
                .to_dict("records")
            )
            contribution = "At the same budget, keeping by contribution harms less than by attention"
            deciding = of(table, family, contribution, "all stages and budgets")
            assert [deciding[name] for name in ("value", "low", "high")] == [
                test[name] for name in ("difference", "low", "high")
            ]
        depth = read_tables(folders["qwen2_5_vl-depth"])["depth"].iloc[0]
        mine = of(table, "qwen2_5_vl", "cost of keeping a random 25 % from layer 2 on")
        assert (mine["value"], mine["low"], mine["high"]) == tuple(
            depth[f"random_25{end}"] for end in ("", "_low", "_high")
        )
        assert table[(table["section"] == "depth") & (table["family"] == "internvl")].empty

    def test_sinks_by_role(self, tmp_path: Path) -> None:
        """Two anchors and a dump, as planted."""
        run = runs.write(tmp_path / "run", weights_hash="f" * 64)
        table = compare(read_runs([run]))
        n_visual = 3 * 16 * runs.WORLD.n_layers
        planted = cp.classify_sinks(cp.LayerProfile.load(run), tau="relative")["role"].value_counts()
        for role in ("dump", "anchor", "undetermined"):
            mine = of(table, "llava", "sinks, of all visual tokens in all layers", role)
            assert mine["value"] == planted.get(role, 0)
            assert mine["text"] == f"{planted.get(role, 0)} ({planted.get(role, 0) / n_visual:.3%})"
        assert planted.sum() == 3
        found = {
            role: of(table, "llava", "layers with sinks", role)["text"]
            for role in ("dump", "anchor", "undetermined")
        }
        assert found == {"dump": "2", "anchor": "2 & 4", "undetermined": "none"}
        assert of(table, "llava", "threshold eta")["value"] == 0.96
        assert of(table, "llava", "layers whose FFN is redundant for visual tokens")["text"] == "2 of 5: 2-3"
        assert (
            of(table, "llava", "layers whose FFN is redundant for visual tokens only")["text"] == "1 of 5: 3"
        )

    def test_claims_are_matched_by_place(self, folders: dict[str, Path]) -> None:
        """By stage and not by number of the layer, which differs between models; redundant layers are their own."""
        models = read_runs([folders["internvl-confirm"]])
        parts = set(compare(models).query("section == 'claims'")["part"])
        assert parts <= {"layers", "redundant layers", "all stages and budgets", "as many others"} | {
            part for part in parts if part.split(",")[0] in models[0].manifests["confirm"]["stages"]
        }
        assert "redundant layers" in parts


def verdicts(*of: tuple[str, str, str, float]) -> pd.DataFrame:
    """Claims of made-up models: part, model, verdict, difference."""
    rows = [
        ("claims", "X | Y", part, model, model, "numbers", value, value - 0.01, value + 0.01, verdict)
        for part, model, verdict, value in of
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


class TestPage:
    def test_a_line_for_each_row_and_a_cell_for_each_model(self, folders: dict[str, Path]) -> None:
        table = compare(read_runs(list(folders.values())))
        lines = page(table).split("\n\n")[0].splitlines()
        assert {line.count("|") for line in lines} == {4}
        assert len(lines) == 2 + len(table["section"].unique()) + len(table["row"].unique())
        (kept,) = (line for line in lines if line.startswith("| accuracy, 25% kept"))
        names, *cells = kept.strip("| ").split(" | ")
        assert names.endswith("contribution / attention / random")
        for family, cell in zip(FAMILIES, cells, strict=True):
            row = names.split(":")[0]
            wanted = [
                of(table, family, row, part)["text"] for part in ("contribution", "attention", "random")
            ]
            assert cell == " / ".join(wanted)
        (depth,) = (line for line in lines if "without the image" in line)
        assert depth.endswith(" | - |")  # of the second model no depth is known

    def test_the_short_table_says_the_same_in_fewer_rows(self, folders: dict[str, Path]) -> None:
        table = compare(read_runs(list(folders.values())))
        numbers, head, verdicts, said, end = brief(table).split("\n\n")
        assert "<details>" in head
        assert end == "</details>\n"
        assert said == (
            "✓ holds, ✗ does not hold, ? cannot be judged: one sign for each layer to prune before, from early to "
            "late, or for all together."
        )
        whole, claims = page(table).splitlines(), set(table.loc[table["section"] == "claims", "row"])
        assert set(numbers.splitlines()) < set(whole)
        assert {line.split("|")[1].strip() for line in verdicts.splitlines()[3:]} == claims
        rows = [line.split("|")[1].strip() for line in numbers.splitlines()]
        assert sum(row.startswith("accuracy, 25% kept") for row in rows) == 1
        assert not any(row.startswith(("accuracy, 10% kept", "FLOPs", "layers x width")) for row in rows)

    def test_the_short_table_has_a_sign_for_each_verdict(self) -> None:
        table = verdicts(
            ("early", "a", HOLDS, -0.1),
            ("transition", "a", UNKNOWN, 0.0),
            ("late", "a", FAILS, 0.2),
            ("all", "b", FAILS, 0.1),
        )
        assert "| X / Y | ✓ ? ✗ | ✗ |" in brief(table)
        more = pd.concat([table, table[table["model"] == "b"].assign(row="Z")])
        assert "| Z | - | ✗ |" in brief(more)
        assert "✓" not in brief(table.assign(section="FFN", verdict=""))

    def test_nothing_is_explained_that_is_not_there(self, folders: dict[str, Path]) -> None:
        profiles = page(compare(read_runs([folders[f"{family}-profile"] for family in FAMILIES])))
        assert "Costs" not in profiles
        assert "claim" not in profiles
        whole = page(compare(read_runs(list(folders.values()))))
        assert whole.count("Costs are differences") == whole.count("Beside a claim stands") == 1

    def test_where_verdicts_differ(self) -> None:
        table = verdicts(
            ("early", "a", HOLDS, -0.1),
            ("late", "a", HOLDS, -0.2),
            ("early", "b", FAILS, 0.1),
            ("late", "b", UNKNOWN, math.nan),
            ("early", "c", HOLDS, math.nan),
        )
        found = differences(table)
        assert found.to_dict("records") == [{"row": "X | Y", "part": "early", "holds": "a, c", "fails": "b"}]
        text = page(table)
        assert (
            "| X / Y | early: **holds** -0.100 [-0.110, -0.090]<br>late: **holds** -0.200 [-0.210, -0.190] | "
            "early: **does not hold** +0.100 [+0.090, +0.110]<br>late: **cannot be judged** | "
            "early: **holds**, numbers |"
        ) in text
        assert "- X | Y (early): holds on a, c, does not hold on b." in text
        assert "No claim of the paper fails wherever it can be judged." in text
        same = table[table["model"] != "b"]
        assert differences(same).empty
        assert "No claim holds on one and fails on another." in page(same)

    def test_where_they_differ_from_the_paper(self) -> None:
        table = verdicts(
            ("early", "a", FAILS, 0.1),
            ("late", "a", FAILS, 0.2),
            ("early", "b", FAILS, 0.1),
            ("late", "b", UNKNOWN, math.nan),
            ("transition", "a", FAILS, 0.1),
            ("transition", "b", HOLDS, -0.1),
        )
        found = refuted(table)
        assert list(zip(found["part"], found["fails"], strict=True)) == [("early", "a, b"), ("late", "a")]
        text = page(table)
        assert "Claims of the paper that fail wherever they can be judged:" in text
        assert "- X | Y (late): does not hold on a." in text
        assert "- X | Y (transition): does not hold on a." not in text
        # Of one model there is nothing to compare; where nothing was judged, nothing is said of verdicts.
        alone = page(table[table["model"] == "a"])
        assert "disagree" not in alone
        assert "- X | Y (transition): does not hold on a." in alone
        assert "claim of the paper" not in page(table.assign(section="sinks"))

    def test_an_interval_shows_whether_it_is_zero(self) -> None:
        table = verdicts(("early", "a", UNKNOWN, -0.00002), ("late", "a", UNKNOWN, -0.0004))
        table[["low", "high"]] = [[-0.00005, 0.000001], [-0.02, 0.01]]
        assert (
            "early: **cannot be judged** -0.00002 [-0.00005, +0.00000]<br>"
            "late: **cannot be judged** +0.000 [-0.020, +0.010]"
        ) in page(table)
        table[["low", "high"]] = math.nan
        assert "early: **cannot be judged** -0.00002 (one image)<br>" in page(table)
        assert "nan" not in page(table)


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, args)])


class TestCommand:
    def test_writes_the_page_and_the_table(self, folders: dict[str, Path], tmp_path: Path) -> None:
        done = invoke(*folders.values(), "--out", tmp_path / "out")
        assert done.exit_code == 0, done.output
        assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
            "comparison-short.md",
            "comparison.csv",
            "comparison.md",
        ]
        table = compare(read_runs(list(folders.values())))
        assert (tmp_path / "out" / "comparison.md").read_text() == page(table)
        assert (tmp_path / "out" / "comparison-short.md").read_text() == brief(table)
        written = pd.read_csv(tmp_path / "out" / "comparison.csv", keep_default_na=False, na_values=[""])
        np.testing.assert_allclose(written["value"], table["value"])
        assert f"{FAMILIES[0]}): profile, confirm, depth" in done.stdout
        again = invoke(*folders.values(), "--out", tmp_path / "out")
        assert again.stdout == done.stdout

    def test_help_has_an_example(self) -> None:
        assert "Example: capa-probe compare" in " ".join(invoke("--help").stdout.split())

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                ("nowhere",),
                "nowhere does not exist; give folders that demo, profile, confirm or depth wrote.",
            ),
            (("empty",), "empty holds no run (manifest.json is missing); give folders that demo, profile,"),
            (("file",), "file is not a folder; give folders that demo, profile, confirm or depth wrote."),
            (("other",), "manifest.json is not the manifest of a profile"),
            (("qwen2_5_vl-profile", "half"), "half holds a profile that was not finished; run it again"),
            (
                ("qwen2_5_vl-depth", "qwen2_5_vl-depth"),
                "two runs of depth of the same model; give one of them.",
            ),
            (
                ("internvl-confirm", "copy", "shifted"),
                "were given, two runs of confirm of the same model",
            ),
            (
                ("internvl-confirm", "shifted"),
                "shifted with eta=0.9, which cannot be compared; make one of these runs of confirm anew,",
            ),
            (
                ("internvl-profile", "stricter"),
                "stricter with split=quantile, which cannot be compared; make one of these runs of profile anew,",
            ),
            (
                ("qwen2_5_vl-profile", "qwen2_5_vl-confirm", "copy"),
                "two runs of confirm of the same model; give one of them.",
            ),
            (("unfinished",), "holds a run that was not finished; give the same command again"),
            (("damaged",), "manifest.json is damaged; start the run anew with --overwrite."),
            (("nameless",), "does not say which weights it is of; make the run again."),
        ],
    )
    def test_bad_input_is_one_line(
        self, folders: dict[str, Path], tmp_path: Path, given: tuple[str, ...], message: str
    ) -> None:
        (tmp_path / "empty").mkdir()
        for name in ("copy", "unfinished", "damaged", "shifted"):
            shutil.copytree(folders["qwen2_5_vl-confirm"], tmp_path / name)
        for name in ("half", "stricter"):
            shutil.copytree(folders["qwen2_5_vl-profile"], tmp_path / name)
        (tmp_path / "half" / "manifest.json").rename(tmp_path / "half" / UNFINISHED_FILE)
        for file, name, value in (
            (tmp_path / "shifted" / "manifest.json", "eta", 0.9),
            (tmp_path / "stricter" / "findings.json", "split", "quantile"),
        ):
            content = json.loads(file.read_text())
            content["settings"][name] = value
            file.write_text(json.dumps(content))
        (tmp_path / "file").touch()
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "manifest.json").write_text('{"what": "something else"}')
        (tmp_path / "unfinished" / "manifest.json").unlink()
        (tmp_path / "damaged" / "manifest.json").write_text("{}")
        runs.write(tmp_path / "nameless")
        done = invoke(*(folders.get(name, tmp_path / name) for name in given), "--out", tmp_path / "out")
        assert done.exit_code == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
        assert not (tmp_path / "out").exists()

    def test_without_a_run(self) -> None:
        assert invoke().exit_code == 2
        with pytest.raises(CapaProbeError, match="No run was given"):
            read_runs([])


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [
        runs.write(tmp_path / letter, weights_hash=letter * 64, model=f"/{letter}/same") for letter in "ab"
    ]
    assert [model.name for model in read_runs(paths)] == ["same aaaaaaa", "same bbbbbbb"]
    assert [model.name for model in read_runs(paths[:1])] == ["same"]

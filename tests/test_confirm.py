"""The confirmation as a whole: samples, resumption, claims, and the command."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

import capa_probe as cp
from capa_probe.benchmark.claims import (
    FAILS,
    HOLDS,
    UNKNOWN,
    _over_steps,
    _said,
    costs_nothing,
    harms_less,
    judge,
    shortened,
)
from capa_probe.benchmark.confirm import confirm
from capa_probe.benchmark.experiments import EXPERIMENTS, choose
from capa_probe.benchmark.sampling import apart, split, stratified, usable
from capa_probe.benchmark.setup import Settings, images_keys
from capa_probe.benchmark.store import read_tables
from capa_probe.cli import app
from capa_probe.console import claims_lines
from capa_probe.errors import BadImageError, CapaProbeError, LeftOutWarning, OtherRunError
from tests import processors, runs, tiny
from tests.confirm_trials import samples

ROOT = Path(__file__).parents[1]
MODEL, DATA = str(ROOT / "data" / "demo-lvlm"), str(ROOT / "data" / "shapesqa" / "test")
SETTINGS = Settings(batch_size=4, max_new_tokens=2, draws=1, keeps=(0.5,), layers=(1,), eta=-0.5)
NUMBERS = "0.300 against 0.200, difference +0.100 [+0.050, +0.200]"


def lvlm() -> cp.HookedLVLM:
    return cp.HookedLVLM(tiny.shared("llava"), processors.shared("llava"))


class TestSampling:
    def test_as_many_of_each_task_and_of_as_many_images_as_can_be(self) -> None:
        questions = cp.load_samples(DATA)
        drawn = stratified(questions, 195, seed=1)
        assert set(Counter(sample.task for sample in drawn).values()) == {15}
        assert len(set(images_keys(drawn).values())) == 195
        order = {sample.id: number for number, sample in enumerate(questions)}
        assert [order[s.id] for s in drawn] == sorted(order[s.id] for s in drawn)
        assert drawn == stratified(questions, 195, seed=1)
        assert drawn != stratified(questions, 195, seed=2)
        assert stratified(questions, None) == tuple(questions)

    def test_a_task_with_few_samples_gives_all_it_has(self) -> None:
        of_tasks = [cp.Sample(str(n), Image.new("RGB", (4, 4)), "?", task="ab"[n < 2]) for n in range(9)]
        assert Counter(s.task for s in stratified(of_tasks, 7)) == {"a": 5, "b": 2}

    def test_calibration_shares_no_image(self) -> None:
        questions = cp.load_samples(DATA)
        tested, aside = split(questions, 0.25)
        keys = images_keys(questions)
        assert len(tested) + len(aside) == len(questions)
        assert not {keys[s.id] for s in tested} & {keys[s.id] for s in aside}
        assert len({keys[s.id] for s in aside}) == round(0.25 * len(set(keys.values())))
        assert apart(questions, questions[:3]) == tuple(
            s for s in questions if keys[s.id] not in {keys[t.id] for t in questions[:3]}
        )

    def test_one_image_of_several_is_enough_to_be_left_out(self) -> None:
        red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
        both, one = cp.Sample("both", [red, blue], "?"), cp.Sample("one", blue, "?")
        assert apart([both], [one]) == ()
        assert apart([cp.Sample("r", red, "?")], [one])[0].id == "r"

    def test_images_that_cannot_be_used(self, tmp_path: Path) -> None:
        bad = cp.Sample("bad", tmp_path / "none.png", "?")
        blind = cp.Sample("blind", [], "?")
        good, skipped = usable([*samples(2), bad, blind])
        assert [sample.id for sample in good] == ["q0", "q1"]
        assert [entry["sample"] for entry in skipped] == ["bad", "blind"]
        with pytest.raises(BadImageError):
            usable([bad], strict=True)
        with pytest.raises(CapaProbeError, match="Two samples have the id 'q0'"):
            usable([*samples(1), *samples(1)])


class TestConfirm:
    def test_experiments_can_be_added(self, tmp_path: Path) -> None:
        out = tmp_path / "run"
        first = confirm(lvlm(), samples(), out, experiments="4", settings=SETTINGS, progress=False)
        assert {"ffn_redundancy", "ffn_redundancy_tests", "claims"} <= set(first.tables)
        assert set(first.claims["experiment"]) == {4}
        both = confirm(lvlm(), samples(), out, experiments="budget", settings=SETTINGS, progress=False)
        assert set(both.claims["experiment"]) == {3, 4}
        pd.testing.assert_frame_equal(both.tables["ffn_redundancy"], first.tables["ffn_redundancy"])
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest == both.manifest
        assert set(manifest["seconds"]) == {"ffn_redundancy", "budget"}
        assert manifest["n_samples"] + manifest["n_calibration"] == 8
        assert manifest["tables"]["budget_rows"] == len(both.tables["budget_rows"])
        assert len(manifest["weights_hash"]) == len(manifest["data_fingerprint"]) == 64

    def test_a_confirmation_is_no_profile_and_the_reverse(self, tmp_path: Path) -> None:
        run, prof = tmp_path / "run", runs.write(tmp_path / "profile")
        confirm(lvlm(), samples(), run, experiments="1", settings=SETTINGS, progress=False)
        with pytest.raises(
            CapaProbeError, match="holds a run of confirm or depth, not a profile; its tables are in "
        ):
            cp.LayerProfile.load(run)
        shown = CliRunner().invoke(app, ["report", str(run)])
        assert (shown.exit_code, shown.stderr.count("\n")) == (2, 1)
        assert str(run / "tables") in shown.stderr
        assert not (run / "report.html").exists()
        before = sorted(file.name for file in prof.iterdir())
        with pytest.raises(CapaProbeError, match="holds no benchmark run; give a new or empty folder"):
            confirm(
                lvlm(), samples(), prof, experiments="1", settings=SETTINGS, overwrite=True, progress=False
            )
        shown = CliRunner().invoke(app, ["confirm", MODEL, DATA, "--out", str(prof)])
        assert (shown.exit_code, shown.stderr.count("\n")) == (2, 1)
        assert sorted(file.name for file in prof.iterdir()) == before

    def test_the_page_of_the_docs_is_written_from_any_run(self, tmp_path: Path) -> None:
        tasks = [
            cp.Sample(s.id, s.images, s.question, s.answers, "ab"[n % 2]) for n, s in enumerate(samples())
        ]
        settings = replace(SETTINGS, keeps=(1.0, 0.5), knockout_samples=2, step_samples=4, steps=2)
        confirm(lvlm(), tasks, tmp_path, settings=settings, limit=6, progress=False)
        page = runpy.run_path(str(ROOT / "scripts" / "write_confirmation.py"))["results"](tmp_path)
        tables = read_tables(tmp_path)
        for experiment in EXPERIMENTS:
            assert f"{experiment.number}: " in page.splitlines()[0]
        assert sum("**cannot be judged**" in line for line in page.splitlines()) == len(tables["claims"]) - 1
        rho = tables["knockout"].query(
            "task == 'all' and effect == 'hellinger' and scored_at == 'same' and score == 'contribution'"
        )["spearman"]
        assert f"| hellinger | same | 1 | {rho.item():.2f} [" in page
        assert "Accuracy in percent by task" in page
        assert "nan" not in page

    def test_other_data_or_settings_are_refused(self, tmp_path: Path) -> None:
        out = tmp_path / "run"
        confirm(lvlm(), samples(), out, experiments="1", settings=SETTINGS, progress=False)
        with pytest.raises(OtherRunError, match="n_samples = 6, but now it is 5"):
            confirm(lvlm(), samples(7), out, experiments="1", settings=SETTINGS, progress=False)
        other = Settings(**{**vars(SETTINGS), "eta": 0.9})
        with pytest.raises(OtherRunError, match=r"settings\.eta = -0\.5, but now it is 0\.9"):
            confirm(lvlm(), samples(), out, experiments="1", settings=other, progress=False)

    def test_left_out_samples_are_said(self, tmp_path: Path) -> None:
        bad = cp.Sample("bad", tmp_path / "none.png", "?")
        with pytest.warns(LeftOutWarning, match="1 of 9 samples is left out"):
            found = confirm(
                lvlm(), samples(), calibration=[bad], experiments="1", settings=SETTINGS, progress=False
            )
        assert [entry["sample"] for entry in found.manifest["skipped"]] == ["bad"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"experiments": "7"}, "There is no experiment '7'; give all, or some of 1 "),
            ({"limit": 0}, "limit=0 was given"),
            ({"settings": Settings(layers=(9,))}, "Layer 9 was given for a model of 4 layers"),
            ({"settings": Settings(knockout_layers=(0,))}, "Layer 0 was given for a model of 4 layers"),
            ({"settings": Settings(tau=20.0)}, "tau=20 can never be reached by a model of width 32"),
            ({"samples": []}, "No sample was given"),
        ],
    )
    def test_bad_input(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(CapaProbeError, match=message):
            confirm(lvlm(), options.pop("samples", samples()), progress=False, **options)

    @pytest.mark.parametrize(
        "options",
        [
            {"batch_size": 0},
            {"keeps": (0.5, 1.5)},
            {"eta": 2.0},
            {"draws": True},
            {"capa_keep": 0},
            {"seed": -1},
            {"keeps": ()},
        ],
    )
    def test_bad_settings(self, options: dict[str, Any]) -> None:
        with pytest.raises(CapaProbeError, match="was given; give"):
            Settings(**options)

    @pytest.mark.slow
    @pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="forks")
    def test_killed_at_any_moment_it_goes_on(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "tests.confirm_trials", str(tmp_path), "37"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        trials = found["trials"]
        assert sum(trial["first"] == "killed" for trial in trials) >= 3
        assert max(trial["parts_before"] for trial in trials if trial["first"] == "killed") > 3
        for trial in trials:
            assert trial["again"] == "done", trial
            assert trial["kept"], trial
            assert trial["equal"], trial


class TestClaims:
    row: ClassVar = {
        "difference": -0.1,
        "low": -0.2,
        "high": -0.05,
        "n": 50,
        "p_holm": 0.01,
        "mean_first": 0.1,
        "mean_second": 0.2,
    }

    def test_rules(self) -> None:
        assert harms_less(self.row) == harms_less({**self.row, "difference": 0.1}, flip=True) == HOLDS
        assert harms_less({**self.row, "difference": 0.1}) == harms_less(self.row, flip=True) == FAILS
        # The corrected p-value decides, whatever the other is.
        assert harms_less({**self.row, "p": 0.01, "p_holm": 0.2}) == UNKNOWN
        assert harms_less({**self.row, "n": 9}) == harms_less({**self.row, "p_holm": math.nan}) == UNKNOWN
        assert costs_nothing({**self.row, "low": -0.019, "high": 0.01}) == HOLDS
        assert costs_nothing({**self.row, "low": -0.03, "high": -0.021}) == FAILS
        assert costs_nothing({**self.row, "low": -0.03, "high": 0.01}) == UNKNOWN

    def test_ranking_anew_is_named_first(self) -> None:
        """The table has CAPA first; the claim speaks of ranking anew."""
        row = self.row | {"task": "all", "measure": "hellinger", "stage": "early", "first": "contribution"}
        tests = pd.DataFrame([row | {"second": "every_step"}])
        (claim,) = _over_steps({"over_steps_tests": tests})
        assert claim.verdict == FAILS
        assert claim.numbers.startswith(
            "Hellinger distance 0.20000 against 0.10000, difference +0.10000 [+0.05000, +0.20000]"
        )
        assert claim[5:] == (0.1, 0.05, 0.2)
        assert costs_nothing({**self.row, "low": -0.01, "n": 5}) == UNKNOWN

    def test_what_has_not_been_run_has_no_claim(self) -> None:
        assert judge({}).empty
        columns = ["experiment", "claim", "where", "verdict", "numbers", "difference", "low", "high"]
        assert list(judge({})) == columns

    def test_follow_from_the_tables(self) -> None:
        """Answers that only ever go wrong without the anchors, on data made up for it."""
        from capa_probe.benchmark.dumps_anchors import MEASURES, NAME
        from capa_probe.benchmark.summary import compare, summarise

        rng = np.random.default_rng(0)
        rows = []
        for role in ("dump", "anchor"):
            for removed in ("role", "non_sinks", "visual"):
                bad = role == "anchor" and removed == "role"
                for n in range(300):
                    record = {
                        "layer": 5,
                        "role": role,
                        "removed": removed,
                        "sample": f"s{n}",
                        "image": f"i{n}",
                    }
                    score = {"correct": float(not bad), "agrees": float(not bad), "kl": 0.1}
                    rows.append({**record, "task": "", **score, "hellinger": 0.5 * bad + rng.uniform(0, 0.1)})
        table = pd.DataFrame(rows)
        by = ["layer", "role", "removed"]
        pairs = [("role", "non_sinks"), ("role", "visual")]
        claims = judge(
            {
                NAME: summarise(table, by),
                f"{NAME}_tests": compare(table, by[:2], "removed", pairs, MEASURES),
                f"{NAME}_notes": pd.DataFrame({"note": []}),
            }
        )
        assert claims["verdict"].tolist() == [HOLDS, HOLDS]
        assert claims["where"].tolist() == ["layer 5", "layer 5"]
        swapped = table.assign(role=table["role"].map({"dump": "anchor", "anchor": "dump"}))
        claims = judge(
            {
                NAME: summarise(swapped, by),
                f"{NAME}_tests": compare(swapped, by[:2], "removed", pairs, MEASURES),
                f"{NAME}_notes": pd.DataFrame({"note": []}),
            }
        )
        assert claims["verdict"].tolist() == [FAILS, UNKNOWN]


class TestShown:
    TABLE: ClassVar = pd.DataFrame(
        [
            (1, "Dumps may go", "all layers", UNKNOWN, "0 sinks."),
            (1, "Anchors may not", "all layers", UNKNOWN, "0 sinks."),
            (2, "A is better", "layer 1", HOLDS, f"Spearman's rho {NUMBERS}, p = 0.0010, n = 32"),
            (2, "A is better", "layer 12", FAILS, f"Spearman's rho {NUMBERS}, p = 0.0020, n = 32"),
            (4, "B is free", "all layers", HOLDS, f"accuracy {NUMBERS}, n = 32"),
            (4, "C is free", "all layers", HOLDS, f"accuracy {NUMBERS}, n = 32"),
        ],
        columns=["experiment", "claim", "where", "verdict", "numbers"],
    )

    def test_a_line_for_each_place(self) -> None:
        lines = [line.plain for line in claims_lines(self.TABLE)]
        assert lines[0] == "holds 3, does not hold 1, cannot be judged 2"
        at = lines.index("A is better (difference in Spearman's rho)")
        assert lines[at - 2 : at - 1] == [""]
        assert lines[at + 1 : at + 3] == [
            "  layer 1   holds          +0.100 [+0.050, +0.200], p 0.0010, n 32",
            "  layer 12  does not hold  +0.100 [+0.050, +0.200], p 0.0020, n 32",
        ]
        # One reason is said once, the same numbers of two claims are not left out.
        assert sum("0 sinks." in line for line in lines) == 1
        assert sum("n 32" in line for line in lines) == 4

    def test_numbers_that_do_not_fit_have_their_own_line(self) -> None:
        lines = "\n".join(line.plain for line in claims_lines(self.TABLE, 60)).splitlines()
        at = lines.index("  layer 12  does not hold")
        assert lines[at + 1] == "    +0.100 [+0.050, +0.200], p 0.0020, n 32"
        assert "  all layers  holds  +0.100 [+0.050, +0.200], n 32" in lines
        assert max(len(line) for line in lines if line.startswith("  ")) <= 60  # titles are wrapped

    def test_every_comparison_of_the_claims_can_be_shortened(self) -> None:
        row = {"mean_first": -0.1, "mean_second": 0.2, "difference": -0.3, "low": -0.4, "high": 0.0, "n": 12}
        said = _said({**row, "p_holm": 0.5}, "Hellinger distance", 3)
        assert shortened(said) == ("Hellinger distance", "-0.300 [-0.400, +0.000], p 0.5000, n 12")
        assert shortened("0 sinks.") == ("", "0 sinks.")
        # One image has no interval, and none is shown.
        said = _said(
            {**row, "low": math.nan, "high": math.nan, "p_holm": 1.0, "n": 1}, "Hellinger distance", 3
        )
        assert shortened(said) == ("Hellinger distance", "-0.300, p 1.0000, n 1")


class TestCommand:
    def test_help_has_an_example(self) -> None:
        shown = CliRunner().invoke(app, ["confirm", "--help"])
        assert shown.exit_code == 0
        assert "capa-probe confirm llava-hf/llava-1.5-7b-hf" in " ".join(shown.output.split())

    @pytest.mark.slow
    def test_demo_model(self, tmp_path: Path) -> None:
        out, data = tmp_path / "run", tmp_path / "shapesqa"
        for part in ("test", "calibration"):
            (data / part).mkdir(parents=True)
            given = ROOT / "data" / "shapesqa" / part
            (data / part / "images").symlink_to(given / "images")
            lines = (given / "samples.jsonl").read_text().splitlines()[:14]
            (data / part / "samples.jsonl").write_text("\n".join(lines))
        command = [
            *("confirm", MODEL, str(data / "test"), "--out", str(out), "--experiments", "ffn_redundancy"),
            *("--limit", "7", "--batch-size", "7"),
        ]
        first = CliRunner().invoke(app, command, catch_exceptions=False)
        assert first.exit_code == 0, first.output
        assert "Hadamard" in first.output
        manifest = json.loads((out / "manifest.json").read_text())
        # The calibration split lies beside the test split.
        assert (manifest["n_samples"], manifest["n_calibration"]) == (7, 14)
        assert manifest["seconds"]["ffn_redundancy"]["parts_made"] > 3
        parts = {file: file.stat().st_mtime_ns for file in (out / "parts").rglob("*.parquet")}
        again = CliRunner().invoke(app, command, catch_exceptions=False)
        assert again.exit_code == 0
        assert parts == {file: file.stat().st_mtime_ns for file in (out / "parts").rglob("*.parquet")}
        refused = CliRunner().invoke(app, [*command, "--eta", "0.9"])
        assert refused.exit_code == 2
        assert "settings.eta = 0.96, but now it is 0.9" in refused.output

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--experiments", "nine"], "There is no experiment 'nine'"),
            (["--keep", "0.5,2"], "--keep 0.5,2 was given"),
            (["--keep", "half"], "--keep half was given"),
            (["--layers", "x"], "--layers x was given"),
            (["--tau", "-1"], "--tau -1 was given"),
            (["--eta", "3"], "--eta 3"),
            (["--calibration", "nowhere"], "nowhere"),
        ],
    )
    def test_bad_input_is_one_line(self, tmp_path: Path, options: list[str], message: str) -> None:
        shown = CliRunner().invoke(app, ["confirm", MODEL, DATA, "--out", str(tmp_path / "run"), *options])
        assert shown.exit_code == 2
        assert shown.output.startswith("error: ")
        assert message in shown.output
        assert shown.output.count("\n") == 1
        assert not (tmp_path / "run").exists()

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("x")
        shown = CliRunner().invoke(app, ["confirm", MODEL, DATA, "--out", str(tmp_path), "--overwrite"])
        assert shown.exit_code == 2
        assert "holds no benchmark run" in shown.output
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_registry_names_modules_that_are_there() -> None:
    for experiment in EXPERIMENTS:
        assert (ROOT / "capa_probe" / "benchmark" / f"{experiment.name}.py").is_file()
    assert [experiment.number for experiment in EXPERIMENTS] == list(range(1, len(EXPERIMENTS) + 1))
    assert [experiment.name for experiment in choose("budget, 1")] == ["dumps_anchors", "budget"]

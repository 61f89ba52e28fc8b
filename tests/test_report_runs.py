"""Several runs in one report: which belong together, and what pruning costs as they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from capa_probe.errors import CapaProbeError
from capa_probe.report import listings_of_experiments, words, write_report
from capa_probe.report.costs import costs, points
from capa_probe.report.runs import read_runs
from tests import runs
from tests.report_pages import read

WEIGHTS, OTHERS = "a" * 64, "b" * 64


def benchmark(folder: Path, tables: dict[str, pd.DataFrame], weights: str = WEIGHTS, **manifest: Any) -> Path:
    """A finished run of confirm or depth."""
    facts = {
        "format_version": 1, "model": "made-up", "family": "llava", "weights_hash": weights, "n_layers": 5,
        "d_model": 1024, "data_fingerprint": "0", "n_samples": 40, **manifest,
    }  # fmt: skip
    (folder / "tables").mkdir(parents=True)
    (folder / "benchmark.json").write_text(json.dumps({"format_version": 1, "begun_with": facts}))
    (folder / "manifest.json").write_text(json.dumps(facts))
    for name, table in tables.items():
        table.to_parquet(folder / "tables" / f"{name}.parquet", index=False)
    return folder


def test_claims_are_counted_by_verdict(tmp_path: Path) -> None:
    row = {"claim": "c", "where": "early", "numbers": "n"}
    verdicts = ["holds", "cannot be judged", "does not hold", "cannot be judged"]
    confirm = benchmark(
        tmp_path / "confirm", {"claims": pd.DataFrame([{**row, "verdict": verdict} for verdict in verdicts])}
    )
    profile = tmp_path / "run"
    runs.write(profile, weights_hash=WEIGHTS)
    (shown,) = read_runs([profile, confirm])
    found = listings_of_experiments.claims(shown)
    assert found is not None
    assert found.heading == "Claims of the paper on this model: 1 hold, 1 do not hold, 2 cannot be judged"
    assert len(found.rows) == 4


def test_row(first: str, second: str, difference: float, **more: Any) -> dict[str, Any]:
    ends = {"low": difference - 0.02, "high": difference + 0.05}
    row = {
        "first": first,
        "second": second,
        "task": "all",
        "measure": "correct",
        "n": 40,
        "difference": difference,
    }
    return {**row, **ends, **more}


test_row.__test__ = False  # type: ignore[attr-defined]


def confirm_tables(n_kept: float = 4.0) -> dict[str, pd.DataFrame]:
    stages = (("early", 1, -0.0857), ("late", 3, 0.0))
    summary = [
        {
            "method": "pruning",
            "stage": stage,
            "layer": layer,
            "task": "all",
            "n_visual": 16.0,
            "n_kept": n_kept,
        }
        for stage, layer, _ in stages
    ]
    tests = [test_row(f"pruning {stage}", "vanilla", change) for stage, _, change in stages]
    return {"together": pd.DataFrame(summary), "together_tests": pd.DataFrame(tests)}


def depth_tables() -> dict[str, pd.DataFrame]:
    rows = [
        test_row("all", score, loss, layer=layer, keep=keep)
        for layer in (2, 3)
        for keep in (0.5, 0.25)
        for score, loss in (("contribution", 0.2 - keep / 10), ("random", 0.6))
    ]
    return {"depth_kept_tests": pd.DataFrame(rows)}


class TestCosts:
    def test_confirm(self) -> None:
        early, late = costs(confirm_tables())
        assert (early.layer, early.change, early.n, early.measure) == (1, -0.0857, 40, "accuracy")
        assert (early.low, early.high) == pytest.approx((-0.1057, -0.0357))
        assert (late.layer, late.change, late.source) == (3, 0.0, "confirm")

    def test_depth_says_what_the_model_itself_has_more(self) -> None:
        first, second = costs(depth_tables())
        assert (first.layer, second.layer) == (2, 3)
        assert first.change == pytest.approx(-0.175)
        assert (first.low, first.high) == pytest.approx((-0.225, -0.155))
        assert first.source == "depth"

    def test_both(self) -> None:
        found = costs({**confirm_tables(), **depth_tables()})
        assert [(cost.layer, cost.source) for cost in found] == [(1, "confirm"), (2, "depth"), (3, "confirm")]

    def test_confirm_of_another_share(self) -> None:
        assert costs(confirm_tables(n_kept=8.0)) == []

    def test_without_known_answers(self) -> None:
        tables = confirm_tables()
        agrees = tables["together_tests"].assign(measure="agrees")
        nothing = tables["together_tests"].assign(n=0, difference=float("nan"))
        found = costs({**tables, "together_tests": pd.concat([nothing, agrees])})
        assert {cost.measure for cost in found} == {"agreement with the model's own answers"}
        assert len(found) == 2

    def test_points(self) -> None:
        assert [points(x) for x in (-0.0857, 0.0, 0.0121, -0.0001)] == ["−8.6", "0.0", "+1.2", "0.0"]

    def test_in_the_headline(self) -> None:
        manifest = {"n_layers": 5, "n_samples": 40, "d_model": 1024}
        tile = words.tiles(manifest, None, costs({**confirm_tables(), **depth_tables()}))[-1]
        assert (tile.label, tile.value) == ("pruned to 25 % of visual tokens", "−17.5 to 0.0 points")
        assert tile.note == (
            "of accuracy: −17.5 [−22.5, −15.5] before layer 2 and 0.0 [−2.0, +5.0] before layer 3; tokens kept by "
            "contribution, 40 questions, 95 % intervals"
        )
        tests = depth_tables()["depth_kept_tests"].assign(n=30)
        tile = words.tiles(manifest, None, costs({**confirm_tables(), "depth_kept_tests": tests}))[-1]
        assert tile.note == (
            "−17.5 [−22.5, −15.5] before layer 2 (of accuracy, 30 questions) and 0.0 [−2.0, +5.0] before layer 3 "
            "(of accuracy, 40 questions); tokens kept by contribution, 95 % intervals"
        )
        (tile,) = words.tiles(manifest, None, costs(confirm_tables())[:1])
        assert (tile.value, tile.note[:44]) == ("−8.6 points", "of accuracy: −8.6 [−10.6, −3.6] before layer")
        assert words.tiles(manifest, None)[-1].value == "not known"


class TestBelonging:
    def test_benchmarks_belong_to_the_profile_of_their_weights(self, tmp_path: Path) -> None:
        ours = runs.write(tmp_path / "ours", weights_hash=WEIGHTS)
        other = runs.write(tmp_path / "other", weights_hash=OTHERS, model="another")
        confirm = benchmark(tmp_path / "confirm", confirm_tables())
        depth = benchmark(tmp_path / "depth", depth_tables(), experiment="depth")
        first, second = read_runs([confirm, ours, other, depth])
        assert (first.name, second.name) == ("made-up", "another")
        assert set(first.tables) == {"together", "together_tests", "depth_kept_tests"}
        assert first.sources == [confirm, depth]
        assert second.tables == {}
        page = read(write_report([confirm, ours, depth]))
        assert (ours / "report.html").is_file()
        assert "−17.5 to 0.0" in page.text
        assert "What pruning to 25 % of the visual tokens costs" in page.text
        assert f"capa-probe report {confirm} {ours} {depth}" in page.text

    def test_names(self, tmp_path: Path) -> None:
        paths = [runs.write(tmp_path / name / "run", weights_hash=WEIGHTS) for name in "ab"]
        paths.append(runs.write(tmp_path / "third", weights_hash=WEIGHTS))
        names = [run.name for run in read_runs(paths)]
        assert len(set(names)) == 3
        assert names[2] == "made-up (third)"

    def test_refused(self, tmp_path: Path) -> None:
        ours = runs.write(tmp_path / "ours", weights_hash=WEIGHTS)
        confirm = benchmark(tmp_path / "confirm", confirm_tables())
        again = benchmark(tmp_path / "again", confirm_tables())
        strange = benchmark(tmp_path / "strange", confirm_tables(), OTHERS)
        text = tmp_path / "notes.json"
        text.write_text('{"prompt": "x"}')
        for given, said in (
            ([confirm], "holds a run of confirm or depth, not a profile; its tables are in"),
            ([], "Nothing was given, and no profile"),
            ([ours] * 7, "7 profiles were given; give at most 6"),
            ([ours, confirm, again], "two runs of confirm of the same model"),
            ([ours, strange], "is of other weights .b{7}. than the profiles"),
            ([ours, text], "not what capa-probe run --json writes"),
        ):
            with pytest.raises(CapaProbeError, match=said):
                write_report(given)

    def test_a_pruned_answer_to_another_question(self, tmp_path: Path) -> None:
        ours = runs.add_examples(runs.write(tmp_path / "ours", weights_hash=WEIGHTS), {"a": runs.picture()})
        answer = {
            "prompt": "what else?", "images_key": "k", "weights_hash": WEIGHTS,
            "kept": {}, "pruned": None, "pruner": {},
        }  # fmt: skip
        (tmp_path / "run.json").write_text(json.dumps(answer))
        page = read(write_report([ours, tmp_path / "run.json"]))
        assert page.text.count("cannot be shown") == 1
        assert "One pruned answer of made-up cannot be shown: no example has the same question" in page.text
        assert page.examples[0]["pruned"] == []

    def test_pruned_answers_of_one_example(self, tmp_path: Path) -> None:
        """Two samples with the same question and image; three answers, of which two were pruned alike."""
        ours = runs.write(tmp_path / "ours", weights_hash=WEIGHTS)
        samples = pd.DataFrame({"sample": ["a", "b"], "task": "", "images": "k" * 16, "n_images": 1})
        samples.astype({"n_images": "int32"}).to_parquet(ours / "samples.parquet", index=False)
        runs.add_examples(ours, {"a": runs.picture(), "b": runs.picture()}, prompt="USER: what?")
        pruner = {"method": "capa", "layers": [3], "keep": 0.25, "score_at": "previous"}
        pruners = [
            {**pruner, "score": "value_norm"},
            {**pruner, "score": "value_norm", "ffn": {"kind": "skip"}},
            {**pruner, "score": "value_norm"},
            {**pruner, "score": "value_norm", "layers": [31]},
        ]
        files = []
        for number, each in enumerate(pruners):
            answer = {
                "prompt": "USER: what?", "images_key": "k" * 16, "weights_hash": WEIGHTS, "kept": {"3": [1]},
                "pruned": {"answer": str(number)}, "pruner": each,
            }  # fmt: skip
            files.append(tmp_path / f"{number}.json")
            files[-1].write_text(json.dumps(answer))
        page = read(write_report([ours, *files]))
        where = "capa, keep 0.25 by value norm before layer 3"
        for example in page.examples:
            labels = [each["label"] for each in example["pruned"]]
            assert labels == [where, f"{where}, FFN skipped", f"{where} (2)", f"{where}1"]
        assert "cannot be shown" not in page.text

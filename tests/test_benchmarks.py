"""The benchmarks run, measure what they say, and their tables in the docs are those of their results."""

from __future__ import annotations

import copy
import importlib
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from capa_probe.flops import Shape, prefill_cost
from capa_probe.pruning.capa import schedule

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "capa_speed.json"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Results and output of a run at tiny width."""
    out = tmp_path_factory.mktemp("speed") / "speed.json"
    command = [sys.executable, "benchmarks/capa_speed.py", "--quick", "--device", "cpu", "--threads", "1"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


class TestQuickRun:
    def test_every_model_and_length(self, quick: tuple[dict[str, Any], str]) -> None:
        results, _ = quick
        places = [(each["model"], each["visual"]) for each in results["comparisons"]]
        assert places == [
            (model, n) for model in ("llava-1.5-7b, tiny", "qwen2.5-vl-7b, tiny") for n in (64, 128)
        ]

    def test_rows_say_what_was_kept_and_what_is_predicted(self, quick: tuple[dict[str, Any], str]) -> None:
        for each in quick[0]["comparisons"]:
            vanilla, *pruned = each["rows"]
            assert [row["kept"] for row in each["rows"]] == [
                each["visual"],
                *(round(keep * each["visual"]) for keep in (0.5, 0.25, 0.1)),
            ]
            predicted = [row["predicted"] for row in each["rows"]]
            assert predicted == sorted(predicted)
            assert predicted == [vanilla["flops"] / row["flops"] for row in each["rows"]]
            assert vanilla["predicted"] == 1
            # Layers before the pruning layer hold all tokens, the others what was kept and the text.
            values = vanilla["cache_bytes"] // (each["n_layers"] * (each["visual"] + each["text"]))
            for row in pruned:
                lengths = each["prune"] * each["visual"] + (each["n_layers"] - each["prune"]) * row["kept"]
                assert row["cache_bytes"] == values * (lengths + each["n_layers"] * each["text"])
                assert row["decode_bytes"] - row["cache_bytes"] == (
                    vanilla["decode_bytes"] - vanilla["cache_bytes"]
                )

    def test_every_round_was_timed(self, quick: tuple[dict[str, Any], str]) -> None:
        for each in quick[0]["comparisons"]:
            for row in each["rows"]:
                for what in ("prefill", "decode"):
                    assert len(row[what]) == len(row["disturbed"]) == 2
                    assert all(seconds["wall"] > 0 and seconds["cpu"] > 0 for seconds in row[what])
            assert [len(found["seconds"]) for found in each["scoring"].values()] == [4, 4, 4]
            flops = [
                each["scoring"][score]["flops"] for score in ("attention", "contribution", "removal_effect")
            ]
            assert flops == sorted(flops)

    def test_the_machine_is_described_and_not_named(self, quick: tuple[dict[str, Any], str]) -> None:
        machine = quick[0]["comparisons"][0]["machine"]
        assert machine["threads"] == 1
        assert machine["versions"]["torch"] == version("torch")
        text = json.dumps(quick[0])
        assert platform.node() not in text
        assert str(Path.home()) not in text

    def test_tables_are_printed(self, quick: tuple[dict[str, Any], str], load: Any) -> None:
        assert load("_speed_tables").tables(quick[0]) in quick[1]


class TestPlan:
    @pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
    def test_the_whole_model_follows_the_paper(self, name: str, load: Any) -> None:
        width = load("_speed_models").WIDTHS[name]
        paper = schedule(width.paper)
        assert width.plan(width.n_layers) == (paper.prune_layers[0], tuple(sorted(paper.hadamard_layers)))

    @pytest.mark.parametrize(
        ("name", "layers", "plan"), [("llava", 8, (1, (0, 5, 6))), ("qwen2_5_vl", 7, (1, (0, 3, 4)))]
    )
    def test_a_quarter_of_it_in_proportion(self, name: str, layers: int, plan: Any, load: Any) -> None:
        assert load("_speed_models").WIDTHS[name].plan(layers) == plan

    @pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
    def test_a_tiny_model_keeps_the_shape_of_the_heads(self, name: str, load: Any) -> None:
        width = load("_speed_models").WIDTHS[name]
        model = width.build(4, torch.float32, "cpu", tiny=True)
        shape = Shape.of(model.config)
        assert (shape.n_kv_heads < shape.n_heads) == (name == "qwen2_5_vl")
        inputs = width.prompt(model, 64, 20)
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 64
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()
        assert prefill_cost(shape, visual=64, text=20, grids=width.grids(64)).total > 0


def seconds(*cpu: float, slower: float = 1.0) -> list[dict[str, float]]:
    return [{"wall": slower * each, "cpu": each} for each in cpu]


class TestTables:
    def test_rounds_add_up_unless_the_settings_differ(
        self, quick: tuple[dict[str, Any], str], load: Any
    ) -> None:
        add = load("_speed_rounds").add
        (first, *_) = quick[0]["comparisons"]
        results: dict[str, Any] = {"comparisons": []}
        for _ in range(2):
            add(results, copy.deepcopy(first))
        (held,) = results["comparisons"]
        assert held["rows"][1]["decode"] == 2 * first["rows"][1]["decode"]
        assert held["rows"][0]["disturbed"] == 2 * first["rows"][0]["disturbed"]
        assert held["scoring"]["attention"]["seconds"] == 2 * first["scoring"]["attention"]["seconds"]
        other = {**copy.deepcopy(first), "steps": first["steps"] + 1}
        add(results, copy.deepcopy(other))
        assert results["comparisons"] == [other]
        add(results, copy.deepcopy({**first, "visual": 7}))
        assert len(results["comparisons"]) == 2

    def test_ratios_are_of_one_round_and_disturbed_ones_are_left_out(self, load: Any) -> None:
        tables = load("_speed_tables")
        vanilla = {"prefill": seconds(8, 6, 9), "disturbed": [False, True, False]}
        row = {"prefill": seconds(2, 2, 3, slower=2.0), "disturbed": [False, False, False]}
        assert tables.per_round(vanilla, row, "prefill", "cpu") == [4, 3, 3]
        assert tables.quiet_ratios(vanilla, row, "prefill") == [2, 1.5]
        assert tables.spread([4, 3, 3]) == "3.00 (3.00-3.50)"

    def test_time_shared_with_others_is_noticed(self, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        speed = load("_speed_rounds")
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        assert not speed.Seconds(wall=1.09, cpu=2.0).disturbed
        assert speed.Seconds(wall=1.11, cpu=2.0).disturbed


def test_the_docs_show_the_results(load: Any) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for table in load("_speed_tables").tables(results).split("\n\n"):
        assert table in page

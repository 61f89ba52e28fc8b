"""Depth: known answers on planted models, every family, resuming, and what cannot be done."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from capa_probe import Sample
from capa_probe.benchmark.answers import answer
from capa_probe.benchmark.depth import measure_depth
from capa_probe.benchmark.depth_cells import TOKENS, part_of_depth, reading_layers
from capa_probe.benchmark.depth_verdict import sentences, verdict
from capa_probe.benchmark.store import read_tables
from capa_probe.errors import CapaProbeError, LeftOutWarning, OtherRunError
from capa_probe.lvlm import HookedLVLM
from capa_probe.measures import kl_divergence
from capa_probe.pruning import Random
from tests import planted, processors, tiny

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
READS, SIDE = 4, 8  # the layer in which the altered planted model reads the answer; pixels of a block
QUICK: dict[str, Any] = {"batch_size": 3, "max_new_tokens": 2, "draws": 2, "progress": False}


@cache
def wrap(family: str) -> HookedLVLM:
    return HookedLVLM(tiny.build(family), processors.shared(family))


@cache
def samples(n: int = 6, answers: bool = True) -> tuple[Sample, ...]:
    """Questions of two tasks about half as many images; the last one's answer hangs on nothing in it."""
    found = []
    for number in range(n):
        image = processors.image(32, 48, seed=number // 2)
        boxes = [[(8 * number % 32, 0, 8 * number % 32 + 12, 16)] if number < n - 1 else []]
        found.append(
            Sample(
                f"q{number}", image, "what is it" + "?" * number, "a" if answers else (),
                ("shape", "color")[number % 2], boxes,
            )
        )  # fmt: skip
    return tuple(found)


@cache
def small(family: str) -> dict[str, pd.DataFrame]:
    """Not to be changed."""
    return measure_depth(wrap(family), samples(), keeps=(0.5, 0.25), scores=("contribution",), **QUICK)


class TestLayers:
    def test_parts_of_the_depth_are_rounded_up(self) -> None:
        assert [part_of_depth(32, part) for part in (2, 3, 4)] == [16, 11, 8]
        assert [part_of_depth(28, part) for part in (2, 3, 4)] == [14, 10, 7]
        assert part_of_depth(1, 4) == 1

    def test_layers_that_coincide_count_once(self) -> None:
        assert reading_layers(32) == (2, 8, 16)
        assert reading_layers(8) == (2, 4)
        assert reading_layers(4) == (1, 2)
        assert reading_layers(2) == (1,)
        assert reading_layers(1) == ()


@FAMILIES
class TestEveryFamily:
    def test_all_are_gone_before_every_layer(self, family: str) -> None:
        rows = small(family)["depth_gone_rows"]
        assert sorted(rows["layer"].unique()) == [0, 1, 2, 3]
        assert (rows.groupby("layer")["sample"].nunique() == 6).all()
        assert (rows["n_kept"] == 0).all()
        assert (rows["n_visual"] > 0).all()
        assert (rows.groupby("layer")["kl"].mean() > 0).all()

    def test_the_curve_ends_with_the_model_itself(self, family: str) -> None:
        table = small(family)["depth_gone"]
        end = table[table["layer"] == 4]
        assert (end["kl"] == 0).all()
        assert (end["agrees"] == 1).all()
        assert (end["n_kept"] == end["n_visual"]).all()
        assert sorted(table["task"].unique()) == ["all", "color", "shape"]
        assert table.loc[table["task"] == "all", "n"].eq(6).all()
        assert table.loc[table["task"] == "all", "n_images"].eq(3).all()

    def test_what_is_left_out_is_what_masking_hides(self, family: str) -> None:
        """The divergence of one sample against a masked forward of its own."""
        lvlm, sample = wrap(family), samples()[1]
        rows = small(family)["depth_gone_rows"].set_index(["layer", "sample"])
        inputs = lvlm.prepare([sample.open_images()], [sample.question])
        with torch.no_grad():
            own = lvlm.model(**inputs).logits[0, -1]
            for layer in (0, 2):
                pruner = Random(layers=(layer,), keep=0, allow_none=True, execution="masked")
                with pruner.attach(lvlm):
                    pruned = lvlm.model(**inputs).logits[0, -1]
                kl = float(kl_divergence(own, pruned))
                assert rows.loc[(layer, sample.id), "kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)

    def test_shares_that_are_kept(self, family: str) -> None:
        rows = small(family)["depth_kept_rows"]
        assert (
            rows["n_kept"]
            == [max(1, round(k * n)) for k, n in zip(rows["keep"], rows["n_visual"], strict=True)]
        ).all()
        assert rows.groupby(["layer", "keep", "score"])["draw"].nunique().unstack("score").to_dict(
            "list"
        ) == {
            "contribution": [1] * 4,
            "random": [2] * 4,
        }
        assert sorted(rows["layer"].unique()) == [1, 2]
        # Draws differ, and are averaged before any statistic.
        of = rows[(rows["score"] == "random") & (rows["keep"] == 0.25) & (rows["layer"] == 1)]
        assert of.groupby("sample")["kl"].nunique().max() == 2
        table = small(family)["depth_kept"].set_index(["task", "layer", "keep", "score"])
        assert table.loc[("all", 1, 0.25, "random"), "kl"] == pytest.approx(of["kl"].mean())
        assert table.loc[("all", 1, 0.25, "random"), "n"] == 6

    def test_regions_and_as_many_others(self, family: str) -> None:
        rows = small(family)["depth_regions_rows"]
        assert "q5" not in set(rows["sample"])  # nothing is asked about there
        assert rows["sample"].nunique() == 5
        assert sorted(rows["layer"].unique()) == [0, 1, 2]
        first = rows[rows["draw"] == 0].set_index(["layer", "sample", "tokens"])
        kept = first["n_kept"].unstack("tokens")
        visual = first["n_visual"].unstack("tokens")["region_kept"]
        assert ((kept["region_kept"] > 0) & (kept["region_kept"] < visual)).all()
        assert (kept["region_kept"] + kept["region_removed"] == visual).all()
        assert (kept["others_kept"] == np.minimum(kept["region_kept"], kept["region_removed"])).all()
        assert (kept["others_removed"] == visual - kept["others_kept"]).all()
        whole = small(family)["depth_regions"].query("tokens == 'all'")
        assert (whole["kl"] == 0).all()
        assert set(whole["layer"]) == {0, 1, 2}

    def test_the_verdict(self, family: str) -> None:
        table = small(family)["depth"]
        assert table["task"].tolist() == ["all", "color", "shape"]
        assert (table["measure"] == "correct").all()
        assert (table["third"] == 2).all()
        tests = small(family)["depth_gone_tests"].set_index(["task", "measure", "layer"])
        row = table.iloc[0]
        assert row["gone_2"] == tests.loc[("all", "correct", 2), "difference"]
        # At layer 2, shares of 25 % at random and by contribution.
        assert row["best_score"] == "contribution"
        assert not np.isnan(row["random_25"])
        assert small(family)["depth_notes"].empty


@pytest.fixture(scope="module", params=planted.FAMILIES)
def known(request: pytest.FixtureRequest) -> dict[str, pd.DataFrame]:
    """A planted model that reads the answer from the anchors in one layer only, asked with the anchors as regions."""
    truth = planted.plant(request.param)
    model = copy.deepcopy(truth.model)
    with torch.no_grad():
        for index, layer in enumerate(model.model.language_model.layers):
            if index != READS:
                layer.self_attn.o_proj.weight.zero_()
    asked = []
    for sample in truth.samples[1:3]:
        boxes: list[list[tuple[float, ...]]] = [[] for _ in sample.images]
        for (image, row, col), kind in truth.kinds[sample.id].items():
            if kind == "anchor":
                boxes[image].append((col * SIDE, row * SIDE, (col + 1) * SIDE, (row + 1) * SIDE))
        asked.append(
            Sample(sample.id, sample.images, sample.question, truth.answers[sample.id], "letter", boxes)
        )
    lvlm = HookedLVLM(model, truth.processor)
    return measure_depth(
        lvlm, asked, keeps=(0.25,), layers=(READS, READS + 1), scores=("attention",), draws=1,
        max_new_tokens=1, batch_size=4, progress=False,
    )  # fmt: skip


class TestPlanted:
    """The answer goes when the anchors go before the layer that reads it, and stays when they go after."""

    def accuracy(self, table: pd.DataFrame, **which: Any) -> float:
        for name, value in {"task": "all", **which}.items():
            table = table[table[name] == value]
        (found,) = table["correct"]
        return float(found)

    def test_the_last_layer_that_reads(self, known: dict[str, pd.DataFrame]) -> None:
        curve = [self.accuracy(known["depth_gone"], layer=layer) for layer in range(9)]
        assert curve == [0.0] * (READS + 1) + [1.0] * (8 - READS)
        (row,) = known["depth"].to_dict("records")  # one task only
        assert (row["whole"], row["blank"], row["last_layer"], row["third"]) == (1, 0, READS, 3)
        assert (row["gone_2"], row["gone_third"]) == (1, 1)

    def test_scores_find_what_chance_does_not(self, known: dict[str, pd.DataFrame]) -> None:
        kept = known["depth_kept"]
        assert self.accuracy(kept, layer=READS, score="attention") == 1
        assert self.accuracy(kept, layer=READS + 1, score="random") == 1
        drawn = known["depth_kept_rows"].query(f"layer == {READS} and score == 'random'")["correct"]
        assert drawn.isin([0, 1]).all()

    def test_the_regions_are_what_it_takes(self, known: dict[str, pd.DataFrame]) -> None:
        table = known["depth_regions"]
        for layer in (0, READS):
            found = {tokens: self.accuracy(table, layer=layer, tokens=tokens) for tokens in TOKENS}
            assert found == dict(zip(TOKENS, (0, 1, 1, 0), strict=True))
        assert {self.accuracy(table, layer=READS + 1, tokens=tokens) for tokens in TOKENS} == {1}

    def test_in_words(self, known: dict[str, pd.DataFrame]) -> None:
        said = sentences(known["depth"], 8)
        assert "2 samples of 2 images" in said[0]
        assert "0.000 without the image" in said[0]
        assert said[1] == "The last layer before which removing all visual tokens costs something is 4."
        assert said[2].startswith("All gone before layer 2: costs 1.000")


def made_up(low: dict[int, float], n_layers: int = 6) -> dict[str, pd.DataFrame]:
    """Tables of a run whose costs have these lower ends."""
    layers = range(n_layers + 1)
    gone = pd.DataFrame({"layer": layers, "task": "all", "n": 9, "n_images": 3})
    gone = gone.assign(correct=[0.1 * layer for layer in layers], correct_low=0.0, correct_high=1.0)
    tests = pd.DataFrame({"layer": range(n_layers), "first": "all", "second": "none", "task": "all"})
    tests["measure"], tests["difference"] = "correct", [layer / 10 for layer in range(n_layers)]
    tests["low"], tests["high"], tests["p"] = [low.get(layer, -0.1) for layer in range(n_layers)], 0.9, 0.01
    kept = pd.DataFrame(
        {"second": ["random", "attention", "value_norm", "random"], "difference": [0.3, 0.1, 0.2, 0.7]}
    )
    kept = kept.assign(
        layer=[2, 2, 2, 3], keep=0.25, first="all", task="all", measure="correct", low=0.05, high=0.9
    )
    return {"depth_gone": gone, "depth_gone_tests": tests, "depth_kept_tests": kept.assign(p=0.02)}


class TestVerdict:
    def test_what_it_reads_off(self) -> None:
        (row,) = verdict(made_up({0: 0.4, 1: 0.2, 3: 0.01}), 6, "correct").to_dict("records")
        assert row["last_layer"] == 3
        assert (row["gone_2"], row["gone_2_low"], row["third"], row["gone_third"]) == (0.2, -0.1, 2, 0.2)
        assert (row["random_25"], row["best_score"], row["best_25"]) == (0.3, "attention", 0.1)
        assert row["whole"] == pytest.approx(0.6)
        assert row["blank"] == 0.0

    def test_an_interval_that_touches_zero_costs_nothing(self) -> None:
        table = verdict(made_up({0: 0.0}), 6, "correct")
        assert table["last_layer"].tolist() == [-1]
        assert "costs nothing before any layer" in sentences(table, 6)[1]

    def test_to_the_last_layer(self) -> None:
        assert "up to the last, 5" in sentences(verdict(made_up({5: 0.1}), 6, "correct"), 6)[1]

    def test_what_was_not_run_is_missing(self) -> None:
        tables = made_up({0: 0.1})
        tables["depth_kept_tests"] = tables["depth_kept_tests"].query("layer == 3")
        (row,) = verdict(tables, 6, "correct").to_dict("records")
        assert np.isnan(row["random_25"])
        assert row["best_score"] == ""
        assert len(sentences(verdict(tables, 6, "correct"), 6)) == 4


def without_times(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    return {name: table.drop(columns="seconds", errors="ignore") for name, table in tables.items()}


class TestRuns:
    def run(self, out: Path | None, **options: Any) -> dict[str, pd.DataFrame]:
        return measure_depth(wrap("llava"), samples(), out, **{"keeps": (0.5,), **QUICK, **options})

    def counted(self, monkeypatch: pytest.MonkeyPatch, dies_at: int | None = None) -> list[Any]:
        """A list that grows whenever the model is asked; Ctrl-C comes at one of these times."""
        calls: list[Any] = []

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) == dies_at:
                raise KeyboardInterrupt
            return answer(*args, **kwargs)

        monkeypatch.setattr("capa_probe.benchmark.cells.answer", counting)
        return calls

    def test_a_stopped_run_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = without_times(self.run(tmp_path / "whole"))
        calls = self.counted(monkeypatch, dies_at=7)
        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path / "stopped")
        assert not (tmp_path / "stopped" / "manifest.json").exists()
        before = len(calls)
        resumed = without_times(self.run(tmp_path / "stopped"))
        n_cells = (
            1 + 4 + 4 + 3 * 6 * 2
        )  # unpruned; gone; kept; regions: layers x (conditions with draws) x batches
        assert len(calls) - before == n_cells - 6
        read = without_times(read_tables(tmp_path / "stopped"))
        for name, table in whole.items():
            pd.testing.assert_frame_equal(table, resumed[name])
            pd.testing.assert_frame_equal(table, read[name], check_dtype=False)

    def test_a_finished_run_is_not_run_again_and_takes_more(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = self.run(tmp_path / "run")
        calls = self.counted(monkeypatch)
        pd.testing.assert_frame_equal(self.run(tmp_path / "run")["depth"], first["depth"])
        assert not calls
        more = self.run(tmp_path / "run", scores=("attention",))
        assert len(calls) == 2
        assert set(more["depth_kept"]["score"]) == {"random", "attention"}

    def test_the_same_seed_gives_the_same(self) -> None:
        one, two, other = (self.run(None, seed=seed)["depth_kept_rows"]["kl"] for seed in (1, 1, 2))
        assert one.equals(two)
        assert not one.equals(other)

    def test_another_seed_or_other_data_are_refused(self, tmp_path: Path) -> None:
        self.run(tmp_path / "run")
        with pytest.raises(OtherRunError, match=r"settings\.seed = 0, but now it is 5"):
            self.run(tmp_path / "run", seed=5)
        with pytest.raises(OtherRunError, match="n_samples"):
            measure_depth(wrap("llava"), samples()[:4], tmp_path / "run", **QUICK)
        self.run(tmp_path / "run", seed=5, overwrite=True)

    def test_other_regions_make_other_cells(self, tmp_path: Path) -> None:
        first = self.run(tmp_path / "run")["depth_regions_rows"]
        moved = [
            Sample(
                s.id,
                s.images,
                s.question,
                s.answers,
                s.task,
                [[(0, 0, 48, 16)]] if s.id == "q5" else s.regions,
            )
            for s in samples()
        ]
        then = measure_depth(wrap("llava"), moved, tmp_path / "run", **{"keeps": (0.5,), **QUICK})
        assert set(then["depth_regions_rows"]["sample"]) - set(first["sample"]) == {"q5"}

    def test_limit_takes_as_many_of_each_task(self) -> None:
        table = self.run(None, limit=4)["depth"].set_index("task")
        assert table["n"].to_dict() == {"all": 4, "color": 2, "shape": 2}


class TestWhatIsMissing:
    def test_without_answers_it_is_agreement(self) -> None:
        tables = measure_depth(wrap("llava"), samples(answers=False), keeps=(0.5,), **QUICK)
        assert (tables["depth"]["measure"] == "agrees").all()
        assert (tables["depth"]["whole"] == 1).all()
        assert "no answers" in tables["depth_notes"]["note"][0]

    def test_without_regions_there_is_a_remark(self) -> None:
        bare = [Sample(s.id, s.images, s.question, s.answers, s.task) for s in samples()]
        tables = measure_depth(wrap("llava"), bare, keeps=(0.5,), **QUICK)
        assert "depth_regions" not in tables
        assert "do not say which regions" in tables["depth_notes"]["note"][0]

    def test_bad_images_are_left_out_or_refused(self, tmp_path: Path) -> None:
        given = [*samples(), Sample("gone", tmp_path / "gone.png", "what?")]
        with pytest.warns(LeftOutWarning, match="1 of 7 samples is left out"):
            tables = measure_depth(wrap("llava"), given, keeps=(0.5,), **QUICK)
        assert tables["depth"]["n"][0] == 6
        with pytest.raises(CapaProbeError, match=r"gone\.png"):
            measure_depth(wrap("llava"), given, keeps=(0.5,), strict=True, **QUICK)
        with pytest.raises(CapaProbeError, match="None of the 1 samples"):
            measure_depth(wrap("llava"), given[-1:], **QUICK)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"keeps": (1.0, 0.5)}, "all below 1"),
            ({"keeps": ()}, "keeps=.*give at least one"),
            ({"keeps": (1.5,)}, "keep=1.5"),
            ({"layers": (0,)}, "some from 1 to 3"),
            ({"layers": (2, 4)}, "some from 1 to 3"),
            ({"layers": ()}, "some from 1 to 3"),
            ({"scores": ("random",)}, "score='random' was given; give some of contribution"),
            ({"draws": 0}, "draws=0"),
            ({"limit": 0}, "limit=0"),
        ],
    )
    def test_bad_settings(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(CapaProbeError, match=match):
            measure_depth(wrap("llava"), samples(), **{**QUICK, **options})

    def test_no_sample_and_no_processor(self) -> None:
        with pytest.raises(CapaProbeError, match="No sample was given"):
            measure_depth(wrap("llava"), [], **QUICK)
        with pytest.raises(CapaProbeError, match="without a processor"):
            measure_depth(HookedLVLM(tiny.build("llava")), samples(), **QUICK)

    def test_a_region_beside_what_the_model_sees(self) -> None:
        """LLaVA's middle crop of a wide image: what lies at its edge reaches no token."""
        wide = Sample("wide", Image.new("RGB", (64, 16)), "what?", "a", None, [[(0, 0, 8, 16)]])
        tables = measure_depth(wrap("llava"), [wide], keeps=(0.5,), **QUICK)
        assert "depth_regions" not in tables

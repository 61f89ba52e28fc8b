"""The experiments on planted models, where it is known what removing and approximating must do."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import capa_probe as cp
from capa_probe.benchmark import budget, dumps_anchors, ffn_redundancy, together
from capa_probe.benchmark.answers import answer, is_correct, normalise, prepare
from capa_probe.benchmark.cells import cell, vanilla, vanilla_rows
from capa_probe.benchmark.claims import judge
from capa_probe.benchmark.removing import RemoveRole
from capa_probe.benchmark.schedule import stage_layers
from capa_probe.benchmark.setup import Settings, Setup
from capa_probe.benchmark.store import Store
from capa_probe.flops import Shape, prefill_cost
from capa_probe.pruning.random_tokens import Random
from tests import planted, processors, tiny
from tests.planted_images import ANSWERS, image, make_samples

N_TINY = 6


@cache
def tiny_lvlm() -> cp.HookedLVLM:
    return cp.HookedLVLM(tiny.build("llava"), processors.shared("llava"))


def tiny_samples() -> tuple[cp.Sample, ...]:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(4)]
    return tuple(
        cp.Sample(f"q{n}", pictures[n % 4], "what" + " now" * (n % 3), "a", task=("one", "two")[n % 2])
        for n in range(N_TINY)
    )


def tiny_setup(**settings: object) -> Setup:
    options: dict[str, object] = {"batch_size": 4, "max_new_tokens": 2, "draws": 2, "keeps": (1.0, 0.5)}
    return Setup(tiny_lvlm(), tiny_samples(), settings=Settings(**{**options, **settings}))  # type: ignore[arg-type]


def more(family: str, n: int) -> tuple[cp.Sample, ...]:
    """Other samples for a planted model, whose kinds of tokens are not needed."""
    found = []
    for seed in range(-(-n // 4)):
        made, _, _ = make_samples(family, np.random.default_rng(100 + seed))
        found += [
            cp.Sample(f"more-{seed}-{s.id}", s.images, s.question, s.answers, task=s.task) for s in made
        ]
    return tuple(found[:n])


class TestAnswers:
    def test_are_those_of_generate_one_by_one(self) -> None:
        lvlm, samples = tiny_lvlm(), tiny_samples()
        batches = list(answer(lvlm, samples, None, batch_size=4, max_new_tokens=3))
        assert [len(batch.texts) for batch in batches] == [4, 2]
        shape = Shape.of(lvlm.model.config)
        for number, sample in enumerate(samples):
            batch, row = batches[number // 4], number % 4
            inputs = prepare(lvlm, [sample])
            with torch.no_grad():
                ids = lvlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
                logits = lvlm.model(**inputs).logits[0, -1]
            text = lvlm.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert batch.texts[row] == text.strip()
            torch.testing.assert_close(batch.log_probs[row], logits.log_softmax(dim=-1), atol=1e-5, rtol=0)
            n = inputs["input_ids"].shape[1]
            assert batch.flops[row] == prefill_cost(shape, visual=16, text=n - 16).total

    def test_pruned_ones_say_how_many_tokens_are_left(self) -> None:
        lvlm, samples = tiny_lvlm(), tiny_samples()
        (batch,) = answer(lvlm, samples, cp.CAPA(layers=(1, 2), keep=(0.5, 0.25)), 8, 2)
        assert batch.kept == [4] * N_TINY
        assert batch.visual == [16] * N_TINY
        n = prepare(lvlm, samples[:1])["input_ids"].shape[1]
        cost = prefill_cost(
            Shape.of(lvlm.model.config), visual=16, text=n - 16, kept={1: 8, 2: 4}, score="contribution"
        )
        assert batch.flops[0] == cost.total

    @pytest.mark.parametrize(
        ("text", "answers", "expected"),
        [
            (" Red. ", ("red",), 1),
            ("the  red", ("The red",), 1),
            ("redder", ("red",), 0),
            ("no", ("yes", "No"), 1),
        ],
    )
    def test_scoring(self, text: str, answers: Sequence[str], expected: float) -> None:
        assert is_correct(text, answers) == expected

    def test_without_a_known_answer_nothing_is_right_or_wrong(self) -> None:
        assert math.isnan(is_correct("red", ()))
        assert normalise("'Two  Cubes!'") == "two cubes"


class TestCells:
    def test_rows_compare_with_the_model_itself(self) -> None:
        setup = tiny_setup()
        pruner = Random(layers=(1,), keep=0.25, seed=3)
        rows = cell(setup, "trial", {"layer": 1, "keep": 0.25}, pruner)
        assert list(rows.columns[:3]) == ["layer", "keep", "sample"]
        for sample, row in zip(setup.samples, rows.to_dict("records"), strict=True):
            inputs = prepare(setup.lvlm, [sample])
            with torch.no_grad():
                before = setup.lvlm.model(**inputs).logits[0, -1].double().softmax(dim=-1)
                with pruner.attach(setup.lvlm):
                    after = setup.lvlm.model(**inputs).logits[0, -1].double().softmax(dim=-1)
            assert row["kl"] == pytest.approx(float((before * (before / after).log()).sum()), abs=2e-6)
            distance = float(((before.sqrt() - after.sqrt()).square().sum() / 2).sqrt())
            assert row["hellinger"] == pytest.approx(distance, abs=1e-4)
            assert (row["n_visual"], row["n_kept"]) == (16, 4)
        keys = rows.groupby("image", sort=False)["sample"].apply(list).tolist()
        assert keys == [["q0", "q4"], ["q1", "q5"], ["q2"], ["q3"]]

    def test_pruning_nothing_changes_nothing(self) -> None:
        setup = tiny_setup()
        rows = cell(setup, "trial", {"keep": 1.0}, cp.CAPA(layers=(1,), keep=1.0))
        whole = vanilla_rows(setup)
        assert rows["answer"].tolist() == whole["answer"].tolist()
        assert rows["kl"].max() < 1e-6
        assert rows["agrees"].all()
        assert whole["kl"].tolist() == [0.0] * N_TINY

    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
    def test_ragged_batches_give_what_each_sample_gives_alone(self, family: str) -> None:
        rng = np.random.default_rng(0)

        def picture(wide: int) -> Image.Image:
            return Image.fromarray(rng.integers(0, 256, (16, 16 + 16 * wide, 3), dtype=np.uint8))

        samples = tuple(
            cp.Sample(f"q{n}", [picture(n) for _ in range(1 + n)], "what" + " now" * n, "a") for n in range(2)
        )
        lvlm = cp.HookedLVLM(tiny.build(family), processors.shared(family))
        pruner, found = cp.CAPA(layers=(1,), keep=0.5), []
        for batch_size in (1, 2):
            setup = Setup(lvlm, samples, settings=Settings(batch_size=batch_size, max_new_tokens=2))
            found.append(cell(setup, "trial", {}, pruner))
        alone, together_ = found
        assert alone["answer"].tolist() == together_["answer"].tolist()
        assert alone["flops"].tolist() == together_["flops"].tolist()
        assert (alone["n_kept"] == alone["n_visual"] // 2).all()
        np.testing.assert_allclose(alone["hellinger"], together_["hellinger"], atol=1e-4)

    def test_vanilla_is_run_once(self) -> None:
        setup = tiny_setup()
        assert vanilla(setup) is vanilla(setup)
        assert setup.store.made == 1


class TestDumpsAnchors:
    @pytest.mark.parametrize(("family", "role"), [("llava", "dump"), ("qwen2_5_vl", "anchor")])
    def test_removes_exactly_what_was_planted(self, family: str, role: str) -> None:
        truth = planted.plant(family)
        lvlm = cp.HookedLVLM(truth.model, truth.processor)
        inputs, layer = prepare(lvlm, truth.samples), 4
        spans = lvlm.spans(inputs)
        kinds = {kind for kind, of in truth.plan[layer - 1].roles.items() if of == role}
        theirs = truth.mask(spans, truth.samples, kinds)
        dims = tuple(sorted(set(truth.plan[layer - 1].dims.values())))
        with torch.no_grad():
            kept = {}
            for instead in ("role", "non_sinks", "visual"):
                pruner = RemoveRole(layers=(layer,), dims=dims, role=role, instead=instead)  # type: ignore[arg-type]
                with pruner.attach(lvlm) as trace:
                    lvlm.model(**inputs, use_cache=False, logits_to_keep=1)
                kept[instead] = trace.kept[layer]
        assert torch.equal(spans.visual & ~kept["role"], theirs)
        sinks = truth.mask(spans, truth.samples, planted.SINK_ROLES)
        for instead in ("non_sinks", "visual"):
            gone = spans.visual & ~kept[instead]
            assert gone.sum(dim=1).tolist() == theirs.sum(dim=1).tolist()
            assert not torch.equal(gone, theirs)
        assert not (spans.visual & ~kept["non_sinks"] & sinks).any()

    @pytest.mark.slow
    def test_removing_anchors_does_most(self) -> None:
        truth = planted.plant("llava")
        lvlm = cp.HookedLVLM(truth.model, truth.processor)
        settings = Settings(batch_size=4, max_new_tokens=1, layers=(4,), draws=1)
        tables = dumps_anchors.run(Setup(lvlm, truth.samples[:2], settings=settings))
        rows = tables["dumps_anchors_rows"]
        assert set(rows["layer"]) == {3, 4}  # 3 is the first of those with the most sinks
        # What layers below have read of the answer stays, hence no other answer.
        assert rows["correct"].all()
        harm = rows.groupby(["role", "removed"])["hellinger"].mean()
        assert harm["anchor", "role"] > 3 * harm["dump", "role"]
        assert harm["anchor", "role"] > 10 * harm["anchor", "non_sinks"]
        counts = tables["dumps_anchors_counts"].set_index("layer")
        assert counts.loc[4, ["n_dump", "n_anchor"]].tolist() == [8, 4]
        assert counts.loc[7, ["n_dump", "n_anchor"]].tolist() == [6, 6]  # some have changed roles

    def test_without_what_was_read_before_the_answer_goes_with_the_anchors(self) -> None:
        truth = planted.plant("llava")
        model = copy.deepcopy(truth.model)
        lvlm = cp.HookedLVLM(model, truth.processor)
        with torch.no_grad():
            for layer in model.model.language_model.layers[:3]:
                layer.self_attn.o_proj.weight.zero_()
        inputs = prepare(lvlm, truth.samples)
        last = inputs["input_ids"].shape[1] - 1

        def unread(out: torch.Tensor, hook: object) -> torch.Tensor:
            """Layer 3 tells roles, but what it read of the answer is taken back."""
            out = out.clone()
            out[:, last] = 0
            return out

        said = {}
        for role in ("dump", "anchor"):
            dims = tuple(truth.plan[3].dims.values())
            pruner = RemoveRole(layers=(4,), dims=dims, role=role)  # type: ignore[arg-type]
            with (
                torch.no_grad(),
                lvlm.hooks([("blocks.3.hook_attn_out", unread)]),
                pruner.attach(lvlm),
            ):
                ids = lvlm.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(dim=-1)
            said[role] = truth.processor.tokenizer.convert_ids_to_tokens(ids.tolist())
        assert said["dump"] == [truth.answers[sample.id] for sample in truth.samples]
        assert said["anchor"] == [truth.without_answer] * len(truth.samples)

    def test_a_model_too_narrow_for_sinks_is_not_judged(self) -> None:
        tables = dumps_anchors.run(tiny_setup())
        assert tables["dumps_anchors"].empty
        assert "hellinger" in tables["dumps_anchors"]
        (note,) = tables["dumps_anchors_notes"]["note"]
        assert "width" in note

    def test_no_sink_is_said(self) -> None:
        truth = planted.plant("llava")
        lvlm = cp.HookedLVLM(planted.unplanted("llava"), truth.processor)
        settings = Settings(batch_size=4, max_new_tokens=1)
        tables = dumps_anchors.run(Setup(lvlm, truth.samples[:2], settings=settings))
        (note,) = tables["dumps_anchors_notes"]["note"]
        phi = cp.profile(lvlm, truth.samples[:2], progress=False).tokens.query(
            "kind == 'visual' and layer >= 2"
        )
        largest = phi["sink_strength"].max()
        layer = phi.loc[phi["sink_strength"].idxmax(), "layer"]
        assert note == (
            f"No sinks at tau = 20; the largest sink strength of a visual token is {largest:.3g}, in layer {layer}."
        )
        assert tables["dumps_anchors_rows"].empty
        counts = tables["dumps_anchors_counts"]
        assert counts["layer"].tolist() == [3, 4, 5, 6, 7]
        assert not counts.drop(columns="layer").any(axis=None)
        verdicts = judge(tables)
        assert verdicts["verdict"].tolist() == ["cannot be judged"] * 2
        assert verdicts["numbers"].tolist() == [note] * 2


def boards(*counts: dict[str, int]) -> tuple[cp.Sample, ...]:
    """Samples of one image of 6 x 6 blocks each, with so many tokens of each kind among plain ones."""
    rng = np.random.default_rng(7)
    made = [image(6, 6, number % 8, rng, of) for number, of in enumerate(counts)]
    return tuple(
        cp.Sample(f"board-{number}", picture, "which?", ANSWERS[number % 8])
        for number, (picture, _) in enumerate(made)
    )


FEW = {"dump": 1, "anchor": 2}


class TestSinksAreThoseOfTheProfile:
    """Which dimensions make a sink is told over all tested samples, as in a profile of them, and not in each prompt."""

    #: Boards, with the Dumps and Anchors that there are at layers 2 and 3 by the planted truth.
    CASES = {  # noqa: RUF012
        # Dimension 0 is large on 22 of the first board's 36 tokens, yet on 25 of 144 tokens: no offset.
        "one prompt full of dumps": (
            ({"dump": 22, "anchor": 2}, FEW, FEW, FEW),
            [22, 1, 1, 1],
            [2, 2, 2, 2],
        ),
        # It is large on 12 of 36 tokens, in each board: an offset, though less than half of any prompt.
        "an offset on a third": (({"dump": 12, "anchor": 2},) * 4, [0, 0, 0, 0], [2, 2, 2, 2]),
        # The first board has nothing but sinks, whose roles nothing tells: neither removed nor counted.
        "a prompt of sinks alone": (
            ({"dump": 36}, FEW, FEW, FEW, FEW),
            [0, 1, 1, 1, 1],
            [0, 2, 2, 2, 2],
        ),
    }

    @pytest.mark.parametrize("name", CASES)
    def test_exactly_these_are_removed(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        counts, dumps, anchors = self.CASES[name]
        truth = planted.plant("llava")
        lvlm, samples = cp.HookedLVLM(truth.model, truth.processor), boards(*counts)
        with warnings.catch_warnings():  # of offsets, and of roles that cannot be told
            warnings.simplefilter("ignore", UserWarning)
            listed = cp.classify_sinks(cp.profile(lvlm, samples, progress=False))
        removed: set[tuple[str, int, str, int]] = set()

        def spied(setup: Setup, table: str, condition: dict, pruner: RemoveRole, chosen: Sequence) -> object:
            """Looks at what the pruner removes from each prompt by itself, before the cell is run."""
            for sample in chosen if pruner.instead == "role" else ():
                inputs = prepare(lvlm, [sample])
                with torch.no_grad(), pruner.attach(lvlm) as trace:
                    lvlm.model(**inputs, use_cache=False, logits_to_keep=1)
                gone = lvlm.spans(inputs).visual & ~trace.kept[condition["layer"]]
                own = (sample.id, condition["layer"], condition["role"])
                removed.update((*own, position) for position in gone[0].nonzero().flatten().tolist())
            return cell(setup, table, condition, pruner, chosen)

        monkeypatch.setattr(dumps_anchors, "cell", spied)
        settings = Settings(batch_size=3, max_new_tokens=1, layers=(3, 4), draws=1)
        tables = dumps_anchors.run(Setup(lvlm, samples, settings=settings))
        told = listed[listed["layer"].isin([2, 3]) & listed["role"].isin(["dump", "anchor"])]
        columns = told["sample"], told["layer"] + 1, told["role"], told["position"]
        assert removed == set(zip(*(column.tolist() for column in columns), strict=True))

        rows = tables["dumps_anchors_rows"]
        for role, planted_there in (("dump", dumps), ("anchor", anchors)):
            own = rows[rows["role"] == role]
            for layer in (3, 4) if any(planted_there) else ():
                for instead in ("role", "visual"):
                    at = own[(own["layer"] == layer) & (own["removed"] == instead)]
                    gone = (at["n_visual"] - at["n_kept"]).set_axis(at["sample"])
                    expected = {s.id: n for s, n in zip(samples, planted_there, strict=True) if n}
                    assert gone.to_dict() == expected
        notes = " ".join(tables["dumps_anchors_notes"]["note"])
        n = tables["dumps_anchors_counts"].set_index("layer")
        assert n.loc[3].tolist() == [
            sum(dumps),
            sum(anchors),
            np.count_nonzero(dumps),
            np.count_nonzero(anchors),
        ]
        assert ("At tau = 20 there is no dump in any layer." in notes) == (not any(dumps))
        offset = f"dimension {truth.layout.sink[0]} at layers 2-4" in notes
        assert offset == (not any(dumps))
        assert ("undetermined" in notes) == (0 in anchors)

    def test_sinks_and_remarks_are_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        truth = planted.plant("llava")
        lvlm, samples = cp.HookedLVLM(truth.model, truth.processor), boards(*({"dump": 12, "anchor": 2},) * 4)
        settings = Settings(batch_size=4, max_new_tokens=1, layers=(3,), draws=1)

        def tables() -> dict[str, pd.DataFrame]:
            with Store.open(tmp_path / "run", {}) as store:
                return dumps_anchors.run(Setup(lvlm, samples, store=store, settings=settings))

        first = tables()
        monkeypatch.delattr(dumps_anchors, "profile")  # not run again
        for name, table in tables().items():
            pd.testing.assert_frame_equal(table, first[name], check_dtype=False)

    def test_behind_the_last_layer_nothing_can_be_removed(self) -> None:
        truth = planted.plant("llava")
        store = Store(None, {})
        sinks = pd.DataFrame(
            [["a", 7, 3, 25.0, 4, 0.1, "dump"], ["b", 7, 5, 25.0, 4, 0.1, "anchor"]],
            columns=dumps_anchors._SINK,
        )
        store.part("dumps_anchors", "sinks", lambda: sinks)
        store.part("dumps_anchors", "remarks", lambda: pd.DataFrame({"note": []}))
        lvlm = cp.HookedLVLM(truth.model, truth.processor)
        setup = Setup(lvlm, truth.samples, store=store, settings=Settings(layers=(1, 4)))
        tables = dumps_anchors.run(setup)
        assert tables["dumps_anchors_rows"].empty
        assert tables["dumps_anchors_notes"]["note"].tolist() == [
            "At tau = 20 there is no dump in layer 3, hence none to remove before layer 4.",
            "At tau = 20 there is no anchor in layer 3, hence none to remove before layer 4.",
            "2 sinks are in the last layer, 7, behind which nothing is pruned.",
        ]
        assert set(judge(tables)["verdict"]) == {"cannot be judged"}

    def test_sinks_that_cannot_be_told_are_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def in_doubt(*args: object, **settings: object) -> pd.DataFrame:
            raise cp.CapaProbeError("It cannot be told which visual tokens are sinks.")

        monkeypatch.setattr(dumps_anchors, "classify_sinks", in_doubt)
        truth = planted.plant("llava")
        lvlm = cp.HookedLVLM(truth.model, truth.processor)
        for _ in ("made", "kept"):
            with Store.open(tmp_path / "run", {}) as store:
                tables = dumps_anchors.run(Setup(lvlm, truth.samples[:1], store=store))
            (note,) = tables["dumps_anchors_notes"]["note"]
            assert note == "Sinks could not be classified: It cannot be told which visual tokens are sinks."
            assert judge(tables)["numbers"].tolist() == [note] * 2
        assert store.made == 0

    def test_roles_need_a_dimension(self) -> None:
        with pytest.raises(cp.CapaProbeError, match="at least one sink dimension"):
            RemoveRole(layers=(3,))


class TestBudget:
    def test_cells_are_the_pruners_they_say(self) -> None:
        setup = tiny_setup(layers=(1, 2), keeps=(1.0, 0.25))
        tables = budget.run(setup)
        rows = tables["budget_rows"]
        n_cells = 2 * 1 * (4 + 2) + 2 * 5  # layers x budgets x (scores + two draws), and the model itself
        assert len(rows) == n_cells * N_TINY
        assert set(rows["stage"]) == {"layer 1", "layer 2"}
        left = rows.groupby("keep")["n_kept"].unique()
        assert [left[keep].tolist() for keep in (1.0, 0.25)] == [[16], [4]]
        own = rows[(rows["layer"] == 2) & (rows["keep"] == 0.25) & (rows["score"] == "attention")]
        expected = cell(setup, "again", {}, cp.CAPA(layers=(2,), keep=0.25, score="attention"))
        assert own["kl"].tolist() == expected["kl"].tolist()

    def test_summary_and_tests_are_means_over_samples(self) -> None:
        tables = budget.run(tiny_setup(layers=(1,)))
        rows, summary, tests = tables["budget_rows"], tables["budget"], tables["budget_tests"]
        half = rows[(rows["keep"] == 0.5)]
        shown = summary[(summary["keep"] == 0.5) & (summary["task"] == "all")].set_index("score")
        for score, own in half.groupby("score"):
            assert shown.loc[score, "kl"] == pytest.approx(own["kl"].mean())
            assert shown.loc[score, "n"] == N_TINY  # draws are no samples
            assert shown.loc[score, "n_images"] == 4
            assert shown.loc[score, "kl_low"] <= shown.loc[score, "kl"] <= shown.loc[score, "kl_high"]
        assert set(summary["task"]) == {"all", "one", "two"}
        test = tests[
            (tests["stage"] == "layer 1")
            & (tests["second"] == "random")
            & (tests["task"] == "two")
            & (tests["measure"] == "kl")
        ].iloc[0]
        two = half[half["task"] == "two"].groupby("score")["kl"].mean()
        assert test["difference"] == pytest.approx(two["contribution"] - two["random"])
        assert test["n"] == 3
        assert test["p"] <= test["p_holm"] <= 1


class TestFFN:
    def test_groups(self) -> None:
        layers = pd.DataFrame(
            {
                "layer": range(7),
                "visual_cosine": [0.2, 0.95, 0.97, 0.99, 0.5, 0.6, 0.3],
                "redundant": [False, False, True, True, False, False, False],
            }
        )
        assert ffn_redundancy.groups(layers) == {
            "redundant": (2, 3),
            "as many redundant": (2, 3),
            "as many others": (0, 6),
            "nearest others": (1, 5),
        }
        assert ffn_redundancy.groups(layers.assign(redundant=False)) == {}
        assert list(ffn_redundancy.groups(layers.assign(redundant=True))) == ["redundant"]

    @pytest.mark.slow
    def test_planted_layers_are_hadamard_products(self) -> None:
        truth = planted.plant("llava")
        lvlm = cp.HookedLVLM(truth.model, truth.processor)
        settings = Settings(batch_size=8, max_new_tokens=1)
        tables = ffn_redundancy.run(Setup(lvlm, truth.samples, more("llava", 6), settings=settings))
        layers = tables["ffn_redundancy_layers"]
        assert set(layers.loc[layers["redundant"], "layer"]) == truth.redundant
        rows = tables["ffn_redundancy_rows"]
        harm = rows.groupby(["group", "ffn"])["hellinger"].max()
        # In these layers the FFN of visual tokens is x * alpha, factors that another set of images gave.
        assert harm["redundant", "hadamard"] < 1e-3 < harm["redundant", "skip"]
        assert harm["as many others", "hadamard"] > 0.05
        assert set(rows.loc[rows["group"] != "nearest others", "layers"]) >= {"2+3+5"}
        assert rows.groupby("group")["layers"].nunique().max() == 1
        full = rows[rows["ffn"] == "full"]["flops"].mean()
        assert rows[rows["ffn"] == "skip"]["flops"].mean() < full

    def test_without_calibration_it_says_so(self) -> None:
        tables = ffn_redundancy.run(tiny_setup())
        assert tables["ffn_redundancy"].empty
        assert "no calibration samples" in tables["ffn_redundancy_notes"]["note"].iloc[0]


class TestTogether:
    def test_all_of_it_on_a_tiny_model(self) -> None:
        setup = tiny_setup(layers=(1,), eta=-0.5)
        calibrated = Setup(setup.lvlm, setup.samples[:4], setup.samples[4:], settings=setup.settings)
        tables = together.run(calibrated)
        summary = tables["together"].query("task == 'all'").set_index("method")
        assert set(summary.index) == {"vanilla", "capa", "pruning", "hadamard"}
        assert (
            summary.loc["vanilla", "flops_share"] == summary.loc["vanilla", "flops_share_as_published"] == 1
        )
        assert summary.loc["capa", "n_kept"] == 4
        shares = summary["flops_share_as_published"]
        assert shares["capa"] < min(shares["pruning"], shares["hadamard"]) < 1
        times = tables["together_time"]
        assert set(times["phase"]) == {"prefill", "decode step"}
        assert (times["ratio"] > 0).all()
        assert set(tables["together_tests"]["first"]) == {"capa layer 1", "pruning layer 1", "hadamard"}


def test_stages_are_in_proportion_to_depth() -> None:
    truth = planted.plant("qwen2_5_vl")
    lvlm = cp.HookedLVLM(truth.model, truth.processor)
    assert stage_layers(lvlm) == {"early": 1, "transition": 3, "late": 6}  # 3, 11, 21 of 28, at 8 layers

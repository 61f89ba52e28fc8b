"""CAPA: its scores, its schedules, sinks that stay or go, and FFNs approximated for the tokens that are left."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from capa_probe.pruning import CAPA, FastV, Pruner, Random, Scoring
from capa_probe.pruning.bypass import _Splits
from capa_probe.pruning.capa import SCORES, schedule
from capa_probe.pruning.ffn import HadamardFFN, SkipFFN
from capa_probe.pruning.roles import anchors, sinks
from tests import planted, tiny
from tests import pruned_reference as reference

PAGE = Path(__file__).parents[1] / "docs" / "pruning.md"
TOWERS = ("model.vision_tower", "model.visual")
FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Rows .* of the batch hold no image", UserWarning)
        yield


class TestScores:
    @FAMILIES
    @pytest.mark.parametrize("score", ["contribution", "attention", "value_norm", "removal_effect"])
    def test_are_the_columns_of_a_profile(self, family: str, score: Any) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), tiny.inputs(family)
        with CAPA(layers=(2,), keep=0.25, score=score).attach(lvlm) as trace:
            lvlm.model(**inputs)
        tokens = cp.profile(lvlm, [inputs], probes="all", progress=False).tokens
        tokens = tokens[(tokens["layer"] == 1) & (tokens["kind"] == "visual")]
        for row in range(3):
            found = trace.scores[2][row, trace.visual[row]]
            wanted = torch.tensor(
                tokens[tokens["sample"] == str(row)].sort_values("position")[score].to_numpy()
            )
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)

    @FAMILIES
    @pytest.mark.parametrize("score", SCORES)
    def test_executions_agree(self, family: str, score: Any) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), tiny.inputs(family)
        found = []
        for execution in ("masked", "compact"):
            pruner = CAPA(layers=(1, 2), keep=(0.5, 0.25), score=score, execution=execution)
            with pruner.attach(lvlm):
                found.append(lvlm.model(**inputs, logits_to_keep=1).logits)
        assert (found[0] - found[1]).abs().max() < 1e-5

    def test_fastv_is_attention(self) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared("llava")), tiny.inputs("llava")
        kept = []
        for pruner in (FastV(), CAPA(layers=(2,), keep=0.5, score="attention")):
            with pruner.attach(lvlm) as trace:
                lvlm.model(**inputs)
            kept.append(trace.kept[2])
        assert torch.equal(*kept)

    def test_random_follows_its_seed(self) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared("llava")), tiny.inputs("llava")
        kept = []
        for seed in (0, 0, 1):
            with Random(layers=(1, 3), keep=0.25, seed=seed).attach(lvlm) as trace:
                lvlm.model(**inputs)
            kept.append(trace.kept[1])
        assert torch.equal(kept[0], kept[1])
        assert not torch.equal(kept[0], kept[2])

    def test_random_is_fair(self) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared("llava")), tiny.inputs("llava", (1,))
        counts, n = torch.zeros(16), 300
        for seed in range(n):
            with Random(layers=(0,), keep=4, seed=seed).attach(lvlm) as trace:
                lvlm.model(**inputs, logits_to_keep=1)
            counts += trace.kept[0][trace.visual].float()
        # Four standard deviations of a binomial count with p = 1/4.
        assert (counts - n / 4).abs().max() < 4 * math.sqrt(n * 3 / 16)


class TestPaper:
    @pytest.mark.parametrize(
        ("model", "layers", "hadamard"),
        [
            ("llava-1.5-7b", (5, 12, 16), [*range(2, 6), *range(22, 30)]),
            ("qwen2.5-vl-7b", (3, 11, 21), [*range(2, 6), *range(13, 20)]),
            ("internvl3-8b", (3, 11, 21), [*range(2, 5), *range(14, 21)]),
        ],
    )
    def test_schedules(self, model: str, layers: tuple[int, ...], hadamard: list[int]) -> None:
        for stage, layer in zip(("early", "transition", "late"), layers, strict=True):
            capa = CAPA.paper(model, stage=stage)  # type: ignore[arg-type]
            assert capa == CAPA(layers=(layer,), keep=0.25)
            assert capa.ffn is None
        skip = CAPA.paper(model, ffn="skip", execution="masked").ffn
        assert isinstance(skip, SkipFFN)
        assert skip.layers == tuple(hadamard)
        more = HadamardFFN({layer: torch.ones(8) for layer in range(32)})
        found = CAPA.paper(model, ffn=more).ffn
        assert isinstance(found, HadamardFFN)
        assert found.layers == tuple(hadamard)
        cumulative = CAPA(layers=schedule(model).prune_layers, keep=(0.75, 0.5, 0.25))
        assert cumulative.keeps == dict(zip(layers, (0.75, 0.5, 0.25), strict=True))

    def test_what_it_does_not_have(self) -> None:
        with pytest.raises(
            CapaProbeError, match="no schedule for 'llava-7b'; give one of llava-1.5-7b, qwen"
        ):
            CAPA.paper("llava-7b")
        stage: Any = "middle"
        with pytest.raises(
            CapaProbeError, match="stage='middle' was given; give one of early, transition, late"
        ):
            CAPA.paper("llava-1.5-7b", stage=stage)
        ffn: Any = "none"
        with pytest.raises(CapaProbeError, match="ffn='none' was given"):
            CAPA.paper("llava-1.5-7b", ffn=ffn)


class TestRoles:
    def test_by_example(self) -> None:
        residual = torch.zeros(1, 5, 2500)
        residual[0, :, 0] = 0.1
        residual[0, [1, 2], 7] = 100.0  # phi close to 50
        residual[0, [0, 3, 4]] = 1.0
        visual = torch.tensor([[True, True, True, True, False]])
        found = sinks(residual, visual, tau=20.0)
        assert found.tolist() == [[False, True, True, False, False]]
        assert not sinks(residual, visual, tau=20.0, dims=(3,)).any()
        contribution = torch.tensor([[1.0, 2.0, 1.5, 3.0, 99.0]])  # the others' median is 2
        assert anchors(contribution, found, visual).tolist() == [[False, True, False, False, False]]
        residual[0, :, 9] = 100.0  # an offset: on every token, phi is 35 or 50 there
        assert sinks(residual, visual, tau=20.0).tolist() == found.tolist()
        assert sinks(residual, visual, tau=20.0, dims=(9,)).tolist() == visual.tolist()
        alone = torch.tensor([[False, True, True, False, False]])
        assert anchors(contribution, alone, alone).tolist() == alone.tolist()  # nothing to compare with


@pytest.mark.parametrize("family", planted.FAMILIES)
class TestPlanted:
    """On the planted model, where dumps, anchors and the answer that anchors carry are known."""

    def run(self, family: str, pruner: CAPA) -> tuple[Any, Any, list[str], list[str]]:
        truth = planted.plant(family)
        lvlm = cp.HookedLVLM(truth.model, truth.processor)
        batch = lvlm.prepare([list(s.images) for s in truth.samples], [s.question for s in truth.samples])
        with pruner.attach(lvlm) as trace:
            out = lvlm.model(**batch, logits_to_keep=1)
        said = truth.processor.tokenizer.convert_ids_to_tokens(out.logits[:, -1].argmax(dim=-1).tolist())
        answers = [truth.answers[s.id] for s in truth.samples]
        self.spans = lvlm.spans(batch)
        return truth, trace, said, answers

    def kinds(self, truth: Any, *names: str) -> Tensor:
        return truth.mask(self.spans, truth.samples, names)

    def test_contribution_keeps_the_answer(self, family: str) -> None:
        truth, trace, said, answers = self.run(family, CAPA(layers=(4,), keep=0.25))
        assert said == answers
        kept = trace.kept[4]
        assert kept[self.kinds(truth, "anchor")].all()
        assert not kept[self.kinds(truth, "dump", "unread")].any()

    def test_value_norm_or_attention_may_keep_dumps(self, family: str) -> None:
        truth, trace, _, _ = self.run(family, CAPA(layers=(4,), keep=0.25, score="attention"))
        assert trace.kept[4][self.kinds(truth, "dump")].any()

    def test_protected_anchors_stay_whatever_the_budget(self, family: str) -> None:
        pruner = CAPA(layers=(4,), keep=2, protect_anchors=True)
        truth, trace, said, answers = self.run(family, pruner)
        assert torch.equal(trace.kept[4] & self.spans.visual, self.kinds(truth, "anchor"))
        assert said == answers
        # Elsewhere too few stay for two anchors in each of two images.
        _, bare, _, _ = self.run(family, replace(pruner, protect_anchors=False))
        assert (bare.kept[4] & self.spans.visual).sum(dim=1).tolist() == [2] * len(answers)

    def test_only_dumps_go(self, family: str) -> None:
        truth, trace, said, answers = self.run(family, CAPA(layers=(4,), keep=0.25, only_dumps=True))
        dropped = self.spans.visual & ~trace.kept[4]
        assert torch.equal(dropped, self.kinds(truth, "dump", "switch", "unread"))
        assert said == answers

    def test_and_no_more_of_them_than_the_budget_asks(self, family: str) -> None:
        truth, trace, _, _ = self.run(family, CAPA(layers=(4,), keep=0.97, only_dumps=True))
        dropped = self.spans.visual & ~trace.kept[4]
        assert not (dropped & ~self.kinds(truth, "dump", "switch", "unread")).any()
        counts = self.spans.visual.sum(dim=1)
        assert dropped.sum(dim=1).tolist() == [int(n) - round(0.97 * int(n)) for n in counts]

    def test_a_layer_without_sinks_has_none_to_remove(self, family: str) -> None:
        _, trace, _, _ = self.run(family, CAPA(layers=(1,), keep=0.25, only_dumps=True))
        assert torch.equal(trace.kept[1] & self.spans.visual, self.spans.visual)


class TestFFN:
    @FAMILIES
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_tokens_that_stay_get_it_and_text_does_not(self, family: str, side: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), tiny.inputs(family, padding_side=side)
        generator = torch.Generator().manual_seed(3)
        alpha = HadamardFFN(
            {at: 1 + 0.3 * torch.randn(lvlm.d_model, generator=generator) for at in (0, 2, 3)}
        )
        found = []
        for ffn in (alpha, SkipFFN((1, 2)), None):
            for execution in ("masked", "compact"):
                pruner = CAPA(layers=(1, 3), keep=(0.5, 0.25), ffn=ffn, execution=execution)  # type: ignore[arg-type]
                with pruner.attach(lvlm) as trace:
                    out = lvlm.model(**inputs)
                found.append(reference.last(lvlm, inputs, out.logits))
            assert (found[-1] - found[-2]).abs().max() < 1e-5
            if ffn is not None:
                # By hand: an FFN that is overwritten at visual tokens, in a forward whose attention is edited.
                names = [f"blocks.{at}.hook_mlp_out" for at in ffn.layers]
                mids: dict[int, Tensor] = {}
                visual = lvlm.spans(inputs).visual

                def mid(x: Tensor, hook: Any, mids: dict[int, Tensor] = mids) -> None:
                    mids[int(hook.name.split(".")[1])] = x.clone()

                def edit(
                    x: Tensor, hook: Any, ffn: Any = ffn, mids: Any = mids, visual: Tensor = visual
                ) -> Tensor:
                    layer = int(hook.name.split(".")[1])
                    factor = ffn.alpha[layer] - 1 if isinstance(ffn, HadamardFFN) else 0.0
                    return torch.where(visual[..., None], mids[layer] * factor, x)

                hooks = [(f"blocks.{at}.hook_resid_mid", mid) for at in ffn.layers]
                with lvlm.hooks([*hooks, *((name, edit) for name in names)]):
                    wanted = reference.edited_logits(lvlm, inputs, trace.kept)
                assert (found[-1] - reference.last(lvlm, inputs, wanted)).abs().max() < 1e-5
        assert (found[1] - found[5])[:2].abs().max() > 1e-3

    def test_rows_are_looked_up_once_for_each_stage(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a GPU every look-up waits for the device."""
        lvlm, inputs, lengths = cp.HookedLVLM(tiny.shared("llava")), tiny.inputs("llava"), list[int]()
        split = _Splits._split

        def noted(layer: int, mask: Tensor, hidden: Tensor) -> Any:
            lengths.append(hidden.shape[1])
            return split(layer, mask, hidden)

        monkeypatch.setattr(_Splits, "_split", staticmethod(noted))
        with CAPA(layers=(2,), keep=0.25, ffn=SkipFFN(range(4))).attach(lvlm) as trace:
            for _ in range(2):
                lvlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert lengths == [trace.lengths[0], trace.lengths[2]] * 2

    @FAMILIES
    def test_in_generation_and_alone(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), tiny.inputs(family)
        ffn = SkipFFN((1, 2))
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
        ids = []
        for execution in ("masked", "compact"):
            with CAPA(layers=(2,), ffn=ffn, execution=execution).attach(lvlm):  # type: ignore[arg-type]
                ids.append(lvlm.model.generate(**inputs, **options))
        assert torch.equal(*ids)
        with CAPA(layers=(), ffn=ffn).attach(lvlm) as trace:
            alone = lvlm.model(**inputs).logits
        with ffn.attach(lvlm):
            assert torch.equal(lvlm.model(**inputs).logits, alone)
        assert not trace.kept
        assert trace.lengths == (inputs["input_ids"].shape[1],) * 4
        assert not trace.saves_prefill


def test_documented_code_runs() -> None:
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, namespace)
    assert len(set(namespace["trace"].lengths)) == 2
    assert namespace["LargestHead"](layers=(2,)).keep == 0.25


class TestOwnMethod:
    def test_is_one_class_with_one_method(self) -> None:
        @dataclass(frozen=True)
        class Last(Pruner):
            """Keeps the tokens nearest to the question."""

            def score_tokens(self, scoring: Scoring) -> Tensor:
                assert scoring.row.shape[-1] == scoring.visual.shape[1] == scoring.call.key.shape[2]
                return scoring.positions.float()

        lvlm, inputs = cp.HookedLVLM(tiny.shared("llava")), tiny.inputs("llava")
        with Last(layers=(1, 2), keep=(0.5, 0.25)).attach(lvlm) as trace:
            lvlm.model(**inputs)
        for row, n in ((0, 4), (1, 8)):
            visual = trace.visual[row].nonzero().flatten()
            assert torch.equal((trace.kept[2] & trace.visual)[row].nonzero().flatten(), visual[-n:])

    @FAMILIES
    def test_may_prune_before_the_decoder_by_what_the_vision_tower_says(self, family: str) -> None:
        """Scores from a listener in the vision tower and from the embeddings, before layer 0."""
        heard: list[Tensor] = []

        @dataclass(frozen=True)
        class BySize(Pruner):
            uses_attention = False

            @contextmanager
            def alongside(self, lvlm: cp.HookedLVLM, visual_rows: Any, trace: Any) -> Iterator[None]:
                tower = next(m for name, m in lvlm.model.named_modules() if name in TOWERS)
                handle = tower.register_forward_hook(lambda *_: heard.append(torch.ones(())))
                yield
                handle.remove()

            def score_tokens(self, scoring: Scoring) -> Tensor:
                assert heard
                assert scoring.residual is not None
                return scoring.residual.norm(dim=-1)

        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), tiny.inputs(family)
        _, cache = lvlm.run_with_cache(**inputs, names_filter="hook_embed")
        spans = lvlm.spans(inputs)
        sizes = cache["hook_embed"].norm(dim=-1).tolist()
        wanted = reference.best(sizes, spans, lambda n: max(1, round(0.25 * n)) if n else 0)
        ids = []
        for execution in ("masked", "compact"):
            with BySize(layers=(0,), keep=0.25, execution=execution).attach(lvlm) as trace:  # type: ignore[arg-type]
                ids.append(lvlm.model.generate(**inputs, max_new_tokens=5, do_sample=False))
            assert torch.equal(trace.kept[0], wanted)
        assert torch.equal(*ids)
        assert trace.lengths == (int(wanted.sum(dim=1).max()),) * 4

"""Compact and masked pruning agree with each other, and with pruning worked out by hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import capa_probe as cp
from capa_probe.flops import Convention, Shape
from capa_probe.pruning import CAPA, FastV, Pruner, Random, Trace, VisionAttention
from capa_probe.pruning.cost import prompt_cost
from tests import pruned_reference as reference
from tests import tiny

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
BACKENDS = pytest.mark.parametrize("attn", ["sdpa", "eager"])
#: Images per sample, and the side that is padded.
BATCHES = (((2,), "left"), ((1, 1), "left"), ((1, 2, 0), "left"), ((1, 2, 0), "right"))
PRUNERS: dict[str, Pruner] = {
    "one": CAPA(layers=(2,), keep=0.25),
    "several": CAPA(layers=(1, 2, 3), keep=(0.6, 0.4, 0.2)),
    "same layer": CAPA(layers=(0, 2), keep=0.3, score_at="same"),
    "per image": FastV(layers=(1, 3), keep=(0.5, 2), budget="image"),
    "before the decoder": Random(layers=(0, 2), keep=(0.5, 0.25)),
    "compacted positions": CAPA(layers=(1, 3), keep=(0.5, 0.25), positions="compacted"),
    "none": CAPA(layers=(2,), keep=0, allow_none=True),
    "everything": CAPA(layers=(2,), keep=1.0),
}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Rows 2 of the batch hold no image", UserWarning)
        yield


def batch(family: str, images: tuple[int, ...], side: str = "left") -> dict[str, Tensor]:
    tail = (3, 5, 4) if len(set(images)) > 1 else (4, 4)
    return tiny.inputs(family, images, side, tail=tail)


def both(pruner: Pruner, lvlm: cp.HookedLVLM, inputs: Any, **options: Any) -> tuple[Any, Any, Trace, Trace]:
    with replace(pruner, execution="masked").attach(lvlm) as masked:
        reference_out = lvlm.model(**inputs, **options)
    with replace(pruner, execution="compact").attach(lvlm) as compact:
        out = lvlm.model(**inputs, **options)
    return reference_out, out, masked, compact


class TestLogits:
    @FAMILIES
    @BACKENDS
    @pytest.mark.parametrize("name", PRUNERS)
    def test_agree_wherever_both_exist(self, family: str, attn: str, name: str) -> None:
        lvlm = cp.HookedLVLM(tiny.shared(family, attn))
        for images, side in BATCHES if attn == "sdpa" else BATCHES[2:]:
            self.check(lvlm, PRUNERS[name], batch(family, images, side))

    def check(self, lvlm: cp.HookedLVLM, pruner: Pruner, inputs: dict[str, Tensor]) -> None:
        masked, compact, one, two = both(pruner, lvlm, inputs)
        assert masked.logits.shape == compact.logits.shape
        spans = lvlm.spans(inputs)
        kept = one.kept[max(one.kept)]
        for layer in one.kept:
            assert torch.equal(one.kept[layer], two.kept[layer])
        assert (masked.logits - compact.logits)[kept].abs().max() < 1e-5
        # The last row is there even where it is padding.
        assert (masked.logits - compact.logits)[:, -1].abs().max() < 1e-5
        dropped = spans.visual & ~kept
        assert masked.logits[dropped].isnan().all()
        assert compact.logits[dropped].isnan().all()
        assert not compact.logits[kept].isnan().any()
        assert kept[torch.arange(len(kept)), spans.last].all()

    @FAMILIES
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_are_those_of_edited_attention(self, family: str, side: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), batch(family, (1, 2, 0), side)
        for name in ("several", "same layer", "before the decoder"):
            pruner = PRUNERS[name]
            masked, compact, trace, _ = both(pruner, lvlm, inputs)
            after = int(pruner.score_at == "same")
            kept = {layer + after: kept for layer, kept in trace.kept.items()}
            wanted = reference.last(lvlm, inputs, reference.edited_logits(lvlm, inputs, kept))
            plain = reference.last(lvlm, inputs, lvlm.model(**inputs).logits)
            for out in (masked, compact):
                found = reference.last(lvlm, inputs, out.logits)
                assert (found - wanted).abs().max() < 1e-5
            with_images = lvlm.spans(inputs).visual.any(dim=1)
            assert (
                (wanted - plain)[with_images].abs().amax(dim=1) > 1e-3
            ).all()  # there is something to find
            assert torch.allclose(wanted[~with_images], plain[~with_images], atol=1e-6)

    @FAMILIES
    def test_keeping_all_changes_nothing(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), batch(family, (2,))
        _, compact, _, _ = both(PRUNERS["everything"], lvlm, inputs)
        assert torch.equal(compact.logits, lvlm.model(**inputs).logits)

    @FAMILIES
    def test_compacted_positions_are_other_positions(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), batch(family, (2,))
        pruner = PRUNERS["compacted positions"]
        _, closed, _, _ = both(pruner, lvlm, inputs, logits_to_keep=1)
        _, original, _, _ = both(replace(pruner, positions="original"), lvlm, inputs, logits_to_keep=1)
        assert (closed.logits - original.logits).abs().max() > 1e-4

    def test_compacted_positions_are_those_of_a_shorter_prompt(self) -> None:
        # Dropped before the decoder and closed up, LLaVA's tokens are as if the others had never been there.
        lvlm, inputs = cp.HookedLVLM(tiny.shared("llava")), batch("llava", (1,))
        with Random(layers=(0,), keep=0.5, positions="compacted").attach(lvlm) as trace:
            found = lvlm.model(**inputs, logits_to_keep=1).logits
        _, cache = lvlm.run_with_cache(**inputs, names_filter="hook_embed")
        shorter = lvlm.model.model.language_model(inputs_embeds=cache["hook_embed"][trace.kept[0]][None])
        wanted = lvlm.model.lm_head(shorter.last_hidden_state[:, -1:])
        assert (found - wanted).abs().max() < 1e-5

    @FAMILIES
    def test_only_the_last_ones_and_without_a_cache(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), batch(family, (1, 2, 0))
        masked, compact, _, _ = both(PRUNERS["several"], lvlm, inputs, logits_to_keep=1, use_cache=False)
        whole, _, _, _ = both(PRUNERS["several"], lvlm, inputs)
        assert compact.past_key_values is None
        assert compact.logits.shape[1] == 1
        assert (masked.logits - compact.logits).abs().max() < 1e-5
        assert (masked.logits[:, 0] - whole.logits[:, -1]).abs().max() < 1e-6

    @FAMILIES
    def test_in_bfloat16(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.build(family).bfloat16()), batch(family, (1, 2, 0))
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        masked, compact, one, two = both(PRUNERS["one"], lvlm, inputs, logits_to_keep=1)
        assert torch.equal(one.kept[2], two.kept[2])  # both score the same whole forward
        assert compact.logits.dtype == torch.bfloat16
        assert (masked.logits - compact.logits).abs().max() < 0.05


class TestKeptSets:
    @FAMILIES
    def test_are_those_of_the_formula(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), batch(family, (1, 2, 0))
        spans = lvlm.spans(inputs)
        for layer in (1, 2, 3):
            with CAPA(layers=(layer,), keep=0.25).attach(lvlm) as trace:
                lvlm.model(**inputs)
            scores = reference.contribution(lvlm, inputs, layer - 1)
            wanted = reference.best(scores, spans, lambda n: max(1, round(0.25 * n)) if n else 0)
            assert torch.equal(trace.kept[layer], wanted)
            found = trace.scores[layer]
            assert torch.equal(found.isnan(), ~spans.visual)
            assert (found - torch.tensor(scores))[spans.visual].abs().max() < 1e-6

    @FAMILIES
    def test_scored_at_the_same_layer(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), batch(family, (1, 2, 0))
        with CAPA(layers=(1,), keep=0.25, score_at="same").attach(lvlm) as trace:
            lvlm.model(**inputs)
        with CAPA(layers=(2,), keep=0.25).attach(lvlm) as other:
            lvlm.model(**inputs)
        assert torch.equal(trace.kept[1], other.kept[2])
        assert trace.lengths == other.lengths

    def test_scored_at_the_same_layer_without_attention(self) -> None:
        """A yardstick drops where the method that it is compared with drops."""
        lvlm, inputs = cp.HookedLVLM(tiny.shared("llava")), batch("llava", (1, 2, 0))
        settings: dict[str, Any] = {"layers": (0, 1), "keep": (0.5, 0.25), "score_at": "same"}
        lengths, costs = [], []
        for pruner in (Random(**settings), VisionAttention(**settings), CAPA(**settings, score="random")):
            with pruner.attach(lvlm) as trace:
                lvlm.model(**inputs)
            lengths.append(trace.lengths)
            shape, no_scorer = Shape.of(lvlm.model.config), Convention(scorer=False)
            costs.append(prompt_cost(shape, pruner, trace, row=1, convention=no_scorer).total)
        assert lengths[0] == lengths[1] == lengths[2]
        assert len(set(lengths[0])) == 3
        assert len(set(costs)) == 1

    @FAMILIES
    @pytest.mark.parametrize("name", ["several", "per image", "before the decoder"])
    def test_do_not_depend_on_the_rest_of_the_batch(self, family: str, name: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), batch(family, (1, 2, 0))
        with PRUNERS[name].attach(lvlm) as trace:
            lvlm.model(**inputs)
        kept = dict(trace.kept)
        for row in (0, 1):
            alone = reference.row_alone(family, inputs, row)
            with PRUNERS[name].attach(lvlm) as trace:
                lvlm.model(**alone)
            for layer, found in trace.kept.items():
                assert torch.equal(found[0], kept[layer][row, inputs["attention_mask"][row].bool()])

    @FAMILIES
    def test_per_image_counts_each_image(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), batch(family, (1, 2, 0))
        with FastV(layers=(2,), keep=0.25, budget="image").attach(lvlm) as trace:
            lvlm.model(**inputs)
        for image in lvlm.spans(inputs).images:
            n = int(trace.kept[2][image.sample, image.positions].sum())
            assert n == max(1, round(0.25 * len(image)))

    def test_images_side_by_side_are_told_apart(self) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared("llava")), batch("llava", (2,))
        ids = inputs["input_ids"]
        text, image = ids[:, ids[0] != tiny.IMAGE], ids[:, ids[0] == tiny.IMAGE]
        inputs = {**inputs, "input_ids": torch.cat([text[:, :1], image, text[:, 1:]], dim=1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        kept = []
        for run in (lambda: lvlm.model(**inputs), lambda: lvlm.model.generate(**inputs, max_new_tokens=1)):
            with FastV(layers=(2,), keep=0.25, budget="image").attach(lvlm) as trace:
                run()
            kept.append(trace.kept[2])
            assert trace.kept[2][0, 1:17].sum() == trace.kept[2][0, 17:33].sum() == 4
        assert torch.equal(*kept)


class TestCompactIsCompact:
    @FAMILIES
    def test_in_the_cache_and_in_the_hidden_states(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), batch(family, (2,))
        n_text = int(lvlm.spans(inputs).text.sum())
        n_visual = int(lvlm.spans(inputs).visual.sum())
        masked, compact, one, two = both(PRUNERS["several"], lvlm, inputs, output_hidden_states=True)
        counts = [n_visual, *(max(1, round(keep * n_visual)) for keep in (0.6, 0.4, 0.2))]
        assert reference.kv_lengths(compact.past_key_values) == [n_text + n for n in counts]
        assert reference.kv_lengths(masked.past_key_values) == [n_text + n_visual] * 4
        assert two.lengths == tuple(n_text + n for n in counts)
        assert one.lengths == (n_text + n_visual,) * 4
        for trace in (one, two):
            assert trace.visual_tokens.flatten().tolist() == counts
            assert trace.tokens.flatten().tolist() == [n_text + n for n in counts]
        assert [x.shape[1] for x in compact.hidden_states[1:-1]] == [n_text + n for n in counts[:-1]]

    @FAMILIES
    def test_a_ragged_batch_is_as_long_as_its_longest_row(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), batch(family, (1, 2, 0))
        _, compact, _, trace = both(PRUNERS["several"], lvlm, inputs)
        longest = [inputs["input_ids"].shape[1], *(int(trace.kept[at].sum(1).max()) for at in (1, 2, 3))]
        assert reference.kv_lengths(compact.past_key_values) == longest
        assert trace.lengths == tuple(longest)

    @FAMILIES
    def test_by_its_flops(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), batch(family, (2,))
        text = reference.decoder(lvlm.model)

        def matmuls(pruner: Pruner | None) -> dict[int, int]:
            """FLOPs of the MLP of each layer, which grow with the tokens that pass."""
            counter = FlopCounterMode(display=False)
            if pruner is None:
                with counter:
                    lvlm.model(**inputs, logits_to_keep=1)
            else:
                with pruner.attach(lvlm), counter:
                    lvlm.model(**inputs, logits_to_keep=1)
            flops = counter.get_flop_counts()
            names = {module: name for name, module in lvlm.model.named_modules()}
            of = {i: f"{type(lvlm.model).__name__}.{names[layer.mlp]}" for i, layer in enumerate(text.layers)}
            return {i: sum(flops[name].values()) for i, name in of.items()}

        plain = matmuls(None)
        masked = matmuls(replace(PRUNERS["one"], execution="masked"))
        compact = matmuls(PRUNERS["one"])
        n_text = int(lvlm.spans(inputs).text.sum())
        n_visual = int(lvlm.spans(inputs).visual.sum())
        assert plain == masked
        whole, rest = n_text + n_visual, n_text + round(0.25 * n_visual)
        assert [compact[i] / plain[i] for i in range(4)] == pytest.approx([1, 1, rest / whole, rest / whole])


def test_the_last_prompt_token_stays_even_if_it_is_visual() -> None:
    lvlm, inputs = cp.HookedLVLM(tiny.shared("llava")), batch("llava", (1,))
    end = int(lvlm.spans(inputs).visual.nonzero()[-1, 1]) + 1
    inputs = {**inputs, **{name: inputs[name][:, :end] for name in ("input_ids", "attention_mask")}}
    masked, compact, trace, _ = both(Random(layers=(1,), keep=2), lvlm, inputs)
    assert trace.kept[1][0, -1]
    assert (masked.logits[:, -1] - compact.logits[:, -1]).abs().max() < 1e-5

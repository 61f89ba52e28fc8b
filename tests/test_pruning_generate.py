"""Generation under a pruner: both executions give the same ids, in every mode, and over several turns."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from capa_probe.pruning import CAPA, Pruner, Random, Trace
from capa_probe.pruning.ffn import SkipFFN
from tests import pruned_reference as reference
from tests import tiny

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
ONE = CAPA(layers=(2,), keep=0.25)
SEVERAL = CAPA(layers=(1, 3), keep=(0.5, 0.25))
CLOSED = replace(SEVERAL, positions="compacted")
EARLY = Random(layers=(0, 2), keep=(0.5, 0.3))
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.3},
    "several sampled": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
}
N = 6


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Rows .* of the batch hold no image", UserWarning)
        yield


def wrapped(family: str, attn: str = "sdpa") -> cp.HookedLVLM:
    return cp.HookedLVLM(tiny.shared(family, attn))


def generate(lvlm: cp.HookedLVLM, inputs: Any, n: int = N, **options: Any) -> Any:
    torch.manual_seed(7)
    options = {"do_sample": False, **options}
    return lvlm.model.generate(
        **inputs,
        max_new_tokens=n,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        suppress_tokens=reference.SUPPRESSED,
        **options,
    )


def both(pruner: Pruner, lvlm: cp.HookedLVLM, inputs: Any, **options: Any) -> tuple[Any, Any, Trace]:
    outs = []
    for execution in ("masked", "compact"):
        with replace(pruner, execution=execution).attach(lvlm) as trace:  # type: ignore[arg-type]
            outs.append(generate(lvlm, inputs, **options))
    return outs[0], outs[1], trace


class TestModes:
    @FAMILIES
    @pytest.mark.parametrize("mode", MODES)
    def test_ids_are_the_same(self, family: str, mode: str) -> None:
        lvlm = wrapped(family)
        for images in ((2,), (1, 2, 0)):
            inputs = tiny.inputs(family, images)
            for pruner in (SEVERAL, CLOSED):
                masked, compact, trace = both(pruner, lvlm, inputs, **MODES[mode])
                assert torch.equal(masked.sequences, compact.sequences)
                assert (torch.stack(masked.logits) - torch.stack(compact.logits)).abs().max() < 1e-5
                plain = generate(lvlm, inputs, **MODES[mode])
                assert not torch.allclose(plain.logits[0], compact.logits[0], atol=1e-4)

    @FAMILIES
    def test_eager(self, family: str) -> None:
        lvlm, inputs = wrapped(family, "eager"), tiny.inputs(family)
        masked, compact, _ = both(SEVERAL, lvlm, inputs, num_beams=2)
        assert torch.equal(masked.sequences, compact.sequences)
        assert lvlm.attention_backend == "eager"

    @FAMILIES
    @pytest.mark.parametrize("pruner", [ONE, SEVERAL, EARLY], ids=["one", "several", "before"])
    def test_greedy_ids_are_those_of_edited_attention(self, family: str, pruner: Pruner) -> None:
        lvlm, inputs = wrapped(family), tiny.inputs(family)
        _, compact, trace = both(pruner, lvlm, inputs)
        wanted = reference.edited_generation(lvlm, inputs, trace.kept, N)
        assert torch.equal(compact.sequences[:, -N:], wanted)

    @FAMILIES
    def test_the_cache_stays_short(self, family: str) -> None:
        lvlm, inputs = wrapped(family), tiny.inputs(family, (2,))
        masked, compact, trace = both(SEVERAL, lvlm, inputs)
        # The last token has not been fed back.
        assert reference.kv_lengths(compact.past_key_values) == [n + N - 1 for n in trace.lengths]
        assert len(set(reference.kv_lengths(masked.past_key_values))) == 1
        assert compact.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] + N - 1

    @FAMILIES
    def test_one_trace_for_each_prefill(self, family: str) -> None:
        lvlm = wrapped(family)
        with SEVERAL.attach(lvlm) as trace:
            for count, images in enumerate(((2,), (1, 1)), start=1):
                inputs = tiny.inputs(family, images)
                generate(lvlm, inputs)
                assert trace.prefills == count
                assert trace.kept[1].shape == inputs["input_ids"].shape
        assert not trace.steps
        assert trace.saves_prefill

    def test_beams_are_rows_of_the_trace(self) -> None:
        lvlm, inputs = wrapped("llava"), tiny.inputs("llava", (1, 2))
        with ONE.attach(lvlm) as trace:
            generate(lvlm, inputs)
            alone = trace.kept[2]
            generate(lvlm, inputs, num_beams=3)
        assert torch.equal(trace.kept[2], alone.repeat_interleave(3, dim=0))

    @FAMILIES
    def test_rows_that_kept_different_tokens_may_be_reordered(self, family: str) -> None:
        """Beam search reorders the rows of the cache; what is known of each row goes with it."""
        lvlm, order = wrapped(family), torch.tensor([2, 0, 1, 1])
        inputs = tiny.inputs(family, (1, 2, 0))
        for execution in ("masked", "compact"):
            pruner = replace(CLOSED, execution=execution)  # type: ignore[arg-type]
            with pruner.attach(lvlm):
                cache = lvlm.model(**inputs).past_key_values
                same = copy.deepcopy(cache)
                ids = torch.tensor([[5], [6], [7]])
                mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
                position = mask.sum(dim=1, keepdim=True) - 1
                step = {"attention_mask": mask, "position_ids": position, "use_cache": True}
                one = lvlm.model(input_ids=ids, past_key_values=cache, **step).logits
                same.reorder_cache(order)
                step = {**step, "attention_mask": mask[order], "position_ids": position[order]}
                two = lvlm.model(input_ids=ids[order], past_key_values=same, **step).logits
            assert (one[order] - two).abs().max() < 1e-5
            assert (one[order] - one[torch.tensor([0, 1, 2, 1])]).abs().max() > 1e-3


class TestTurns:
    @FAMILIES
    @pytest.mark.parametrize("pruner", [SEVERAL, CLOSED, EARLY], ids=["several", "compacted", "before"])
    def test_the_cache_is_carried_over(self, family: str, pruner: Pruner) -> None:
        lvlm = wrapped(family)
        for images in ((1,), (1, 2, 0)):
            inputs, found = tiny.inputs(family, images), []
            question = torch.randint(3, 50, (len(images), 4))
            for execution in ("masked", "compact"):
                with replace(pruner, execution=execution).attach(lvlm) as trace:  # type: ignore[arg-type]
                    first = generate(lvlm, inputs)
                    turn = reference.longer(inputs, torch.cat([first.sequences[:, -N:], question], dim=1))
                    for name in ("pixel_values", "image_grid_thw"):
                        turn.pop(name, None)
                    second = generate(lvlm, turn, past_key_values=first.past_key_values)
                    assert trace.prefills == 1
                found.append(second)
            assert torch.equal(found[0].sequences, found[1].sequences)
            assert (torch.stack(found[0].logits) - torch.stack(found[1].logits)).abs().max() < 1e-5
            grown = turn["input_ids"].shape[1] - inputs["input_ids"].shape[1] + N - 1
            cache = found[1].past_key_values
            assert reference.kv_lengths(cache) == [n + grown for n in trace.lengths]
            if pruner.positions == "original":
                whole = {**inputs, **turn}
                wanted = reference.edited_generation(lvlm, whole, trace.kept, N)
                assert torch.equal(found[1].sequences[:, -N:], wanted)

    @FAMILIES
    def test_a_plain_forward_may_continue(self, family: str) -> None:
        """Teacher forcing: several tokens at once on a pruned cache give the logits of one at a time."""
        lvlm, inputs = wrapped(family), tiny.inputs(family, (2,))
        given = torch.tensor([[5, 9, 11, 4]])
        found = []
        for execution in ("masked", "compact"):
            with replace(SEVERAL, execution=execution).attach(lvlm) as trace:
                cache = lvlm.model(**inputs).past_key_values
                found.append(lvlm.model(input_ids=given, past_key_values=cache).logits)
        assert (found[0] - found[1]).abs().max() < 1e-5
        wanted = reference.edited_logits(lvlm, reference.longer(inputs, given), trace.kept)[:, -4:]
        assert (found[1] - wanted).abs().max() < 1e-5

    def test_compacted_positions_go_on_where_the_shorter_prompt_ends(self) -> None:
        # Dropped before the decoder and closed up, LLaVA's tokens are as if the others had never been there.
        lvlm, inputs = wrapped("llava"), tiny.inputs("llava", (1,))
        with Random(layers=(0,), keep=0.5, positions="compacted").attach(lvlm) as trace:
            found = generate(lvlm, inputs)
        _, cache = lvlm.run_with_cache(**inputs, names_filter="hook_embed")
        wanted = generate(lvlm, {"inputs_embeds": cache["hook_embed"][trace.kept[0]][None]})
        assert (torch.stack(found.logits) - torch.stack(wanted.logits)).abs().max() < 1e-5
        with Random(layers=(0,), keep=0.5).attach(lvlm):
            gaps = generate(lvlm, inputs)
        assert (torch.stack(gaps.logits) - torch.stack(wanted.logits)).abs().max() > 1e-4

    def test_a_generated_placeholder_is_no_image(self) -> None:
        lvlm, inputs = wrapped("llava"), tiny.inputs("llava", (1,))
        ids = torch.tensor([[tiny.IMAGE]])
        with ONE.attach(lvlm):
            cache = lvlm.model(**inputs).past_key_values
            one = lvlm.model(input_ids=ids, past_key_values=copy.deepcopy(cache)).logits
        with replace(ONE, ffn=SkipFFN((0, 1, 2, 3))).attach(lvlm):
            lvlm.model(**inputs)
            two = lvlm.model(input_ids=ids, past_key_values=cache).logits
        assert torch.equal(one, two)  # it went through its FFN

    def test_an_image_in_a_later_turn_stays_and_says_so(self) -> None:
        lvlm, inputs = wrapped("llava"), tiny.inputs("llava", (1,))
        ids = torch.tensor([[5, *[tiny.IMAGE] * 16, 6]])
        with ONE.attach(lvlm) as trace:
            cache = lvlm.model(**inputs).past_key_values
            with pytest.warns(UserWarning, match="An image came in a later turn; only those of the first"):
                out = lvlm.model(input_ids=ids, pixel_values=inputs["pixel_values"], past_key_values=cache)
        assert not out.logits.isnan().any()
        assert reference.kv_lengths(cache) == [n + 18 for n in trace.lengths]

    def test_a_cropped_cache(self) -> None:
        lvlm, inputs = wrapped("llava"), tiny.inputs("llava", (1,))
        with ONE.attach(lvlm):
            cache = lvlm.model(**inputs).past_key_values
            one = lvlm.model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache).logits
            cache.crop(-2)
            two = lvlm.model(input_ids=torch.tensor([[6, 7]]), past_key_values=cache).logits
            assert (one[:, 1:] - two).abs().max() < 1e-5
            with pytest.raises(CapaProbeError, match="9 tokens were to be cropped .* holds 3 after a pruned"):
                cache.crop(-9)

    def test_repeated_and_selected_rows(self) -> None:
        lvlm, inputs = wrapped("llava"), tiny.inputs("llava", (1, 2, 0))
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        ids = torch.tensor([[5], [6], [7]])
        with SEVERAL.attach(lvlm):
            cache = lvlm.model(**inputs).past_key_values
            other = copy.deepcopy(cache)
            one = lvlm.model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
            other.batch_repeat_interleave(2)
            other.batch_select_indices(torch.tensor([5, 2]))
            picked = torch.tensor([2, 1])
            two = lvlm.model(input_ids=ids[picked], attention_mask=mask[picked], past_key_values=other).logits
        assert (one[picked] - two).abs().max() < 1e-5

    def test_a_pruned_cache_without_its_pruner_is_refused(self) -> None:
        lvlm, inputs = wrapped("llava"), tiny.inputs("llava", (1,))
        with ONE.attach(lvlm):
            cache = lvlm.model(**inputs).past_key_values
        with pytest.raises(CapaProbeError, match="cache that a pruner made was given to a model without one"):
            lvlm.model(input_ids=torch.tensor([[5]]), past_key_values=cache)

    def test_a_foreign_cache_says_so(self) -> None:
        lvlm, inputs = wrapped("llava"), tiny.inputs("llava", (1,))
        cache = lvlm.model(**inputs).past_key_values
        other = copy.deepcopy(cache)
        plain = lvlm.model(input_ids=torch.tensor([[5]]), past_key_values=other).logits
        with ONE.attach(lvlm), pytest.warns(UserWarning, match="filled before the pruner was attached"):
            out = lvlm.model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits
        assert torch.equal(out, plain)

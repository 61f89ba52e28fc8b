"""Ranking anew at every step: nothing is dropped, and each step attends to what is best for its own token."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import capa_probe as cp
from capa_probe.pruning import CAPA
from capa_probe.pruning.capa import SCORES
from tests import pruned_reference as reference
from tests import tiny
from tests.test_pruning_generate import FAMILIES, N, generate, wrapped


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Rows .* of the batch hold no image", UserWarning)
        yield


class TestEveryStep:
    @FAMILIES
    @pytest.mark.parametrize("beams", [1, 2])
    def test_keeping_all_is_the_model_itself(self, family: str, beams: int) -> None:
        lvlm, inputs = wrapped(family), tiny.inputs(family)
        with CAPA(layers=(2,), keep=1.0, rescore="every_step").attach(lvlm) as trace:
            found = generate(lvlm, inputs, num_beams=beams)
        plain = generate(lvlm, inputs, num_beams=beams)
        assert torch.equal(found.sequences, plain.sequences)
        assert (torch.stack(found.logits) - torch.stack(plain.logits)).abs().max() < 1e-5
        assert len(trace.steps) == N - 1
        assert not trace.saves_prefill

    @FAMILIES
    def test_each_step_is_that_of_edited_attention(self, family: str) -> None:
        """Step by step: rank by the pattern of the step's own query, hide the rest from the pruning layer on."""
        lvlm, inputs = wrapped(family), tiny.inputs(family)
        with CAPA(layers=(2,), keep=0.25, rescore="every_step").attach(lvlm) as trace:
            out = generate(lvlm, inputs)
        length = inputs["input_ids"].shape[1]
        assert trace.kept[2].equal(inputs["attention_mask"].bool())
        assert set(trace.lengths) == {length}
        spans, ids = lvlm.spans(inputs), out.sequences
        cache: Any = None
        names = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_rot_k"]
        weight = lvlm.model.model.language_model.layers[1].self_attn.o_proj.weight
        cache = generate(lvlm, inputs, n=1).past_key_values
        for step in range(1, N):
            kept = trace.steps[step - 1][2]
            grown = reference.longer(inputs, ids[:, length : length + step])
            position = grown["attention_mask"].sum(dim=1, keepdim=True) - 1
            if family == "qwen2_5_vl":
                position = position[None] + lvlm.model.model.rope_deltas
            found: dict[str, Tensor] = {}

            def note(x: Tensor, hook: Any, found: dict[str, Tensor] = found) -> None:
                found["pattern"] = x

            def edit(x: Tensor, hook: Any, kept: Tensor = kept) -> Tensor:
                hidden = torch.nn.functional.pad(~kept & spans.visual, (0, x.shape[-1] - length))
                left = x.masked_fill(hidden[:, None, None], 0)
                return left / left.sum(dim=-1, keepdim=True)

            hooks = [(names[0], note), *((f"blocks.{i}.attn.hook_pattern", edit) for i in (2, 3))]
            logits = lvlm.run_with_hooks(
                input_ids=grown["input_ids"][:, -1:],
                attention_mask=grown["attention_mask"],
                position_ids=position,
                past_key_values=cache,
                fwd_hooks=hooks,
            ).logits
            scores = cp.measures.attention_contribution(
                found["pattern"][:, :, 0], cache.layers[1].values, weight
            )
            wanted = reference.best(scores.tolist(), spans, lambda n: max(1, round(0.25 * n)) if n else 0)
            assert torch.equal(kept, wanted)
            assert (out.logits[step] - logits[:, -1]).abs().max() < 1e-5
        assert any(not torch.equal(trace.steps[0][2], other[2]) for other in trace.steps[1:])

    @FAMILIES
    @pytest.mark.parametrize("score", SCORES)
    def test_without_an_image_it_is_the_model_itself(self, family: str, score: Any) -> None:
        lvlm, inputs = wrapped(family), tiny.inputs(family, (0, 0))
        plain = generate(lvlm, inputs)
        with CAPA(layers=(2,), score=score, rescore="every_step").attach(lvlm) as trace:
            found = generate(lvlm, inputs)
        assert torch.equal(found.sequences, plain.sequences)
        assert (torch.stack(found.logits) - torch.stack(plain.logits)).abs().max() < 1e-5
        assert all(torch.equal(step[2], inputs["attention_mask"].bool()) for step in trace.steps)

    @FAMILIES
    @pytest.mark.parametrize("images", [(2,), (1, 2, 0)])
    def test_beams_score_what_each_of_them_saw(self, family: str, images: tuple[int, ...]) -> None:
        """Beam search reorders the cache; its scores are those of the sequences that it returns, fed one by one."""
        lvlm, inputs = wrapped(family), tiny.inputs(family, images)
        pruner = CAPA(layers=(1, 3), keep=(0.5, 0.2), rescore="every_step")
        with pruner.attach(lvlm):
            out = generate(lvlm, inputs, num_beams=3, length_penalty=0.0, output_scores=True)
        forced, rows, mask = torch.zeros(len(images)), torch.arange(len(images)), inputs["attention_mask"]
        with pruner.attach(lvlm):
            first = generate(lvlm, inputs, n=1)
            logits = first.logits[0]
            for ids in out.sequences[:, -N:].T:
                forced += logits.log_softmax(dim=-1)[rows, ids]
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                position = mask.sum(dim=1, keepdim=True) - 1
                if family == "qwen2_5_vl":
                    position = (position + lvlm.model.model.rope_deltas)[None].expand(3, -1, -1)
                step = {"input_ids": ids[:, None], "attention_mask": mask, "position_ids": position}
                logits = lvlm.model(**step, past_key_values=first.past_key_values).logits[:, -1]
        assert (forced - out.sequences_scores).abs().max() < 1e-5

    @FAMILIES
    def test_several_layers_are_nested(self, family: str) -> None:
        lvlm, inputs = wrapped(family), tiny.inputs(family)
        pruner = CAPA(layers=(1, 3), keep=(0.5, 0.25), rescore="every_step")
        with pruner.attach(lvlm) as trace:
            out = generate(lvlm, inputs)
        assert len(set(reference.kv_lengths(out.past_key_values))) == 1
        visual = lvlm.spans(inputs).visual
        for step in trace.steps:
            assert not (step[3] & ~step[1]).any()
            for layer, share in ((1, 0.5), (3, 0.25)):
                found = (step[layer] & visual).sum(dim=1).tolist()
                counts = visual.sum(dim=1).tolist()
                assert found == [max(1, round(share * n)) if n else 0 for n in counts]

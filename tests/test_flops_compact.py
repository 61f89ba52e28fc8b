"""The cost counter against torch's own on forwards that really drop tokens, or keep them from the FFN: equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from capa_probe.flops import Convention, Shape, decode_cost, kv_cache_values, prefill_cost
from capa_probe.lvlm import HookedLVLM
from capa_probe.pruning import FastV, Trace
from capa_probe.pruning.capa import CAPA, SCORES
from capa_probe.pruning.cost import prompt_cost
from capa_probe.pruning.ffn import HadamardFFN, SkipFFN
from tests import tiny

SCHEDULES = [((2,), 0.25), ((1, 3), (0.5, 0.25))]


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        yield counter


def prompt_of(trace: Trace, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the cost counter needs to know, from the trace of a single sample."""
    prompt: dict[str, Any] = {
        "visual": int(trace.visual.sum()),
        "text": int(trace.text.sum()),
        "kept": {layer: int((kept & trace.visual).sum()) for layer, kept in trace.kept.items()},
    }
    if "image_grid_thw" in inputs:
        prompt["grids"] = [(h, w) for _, h, w in inputs["image_grid_thw"].tolist()]
    return prompt


@pytest.mark.parametrize(("layers", "keep"), SCHEDULES, ids=["one pruning", "two prunings"])
@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
class TestCompactForward:
    @pytest.mark.parametrize("score", SCORES)
    def test_prefill_scoring_included(
        self, family: str, layers: tuple[int, ...], keep: Any, score: Any
    ) -> None:
        model, inputs = tiny.shared(family), tiny.inputs(family, images=(2,), tail=(3,))
        lvlm, shape = HookedLVLM(model), Shape.of(model.config)
        with CAPA(layers=layers, keep=keep, score=score).attach(lvlm) as trace, counting() as counter:
            model(**inputs, logits_to_keep=1)
        prompt = prompt_of(trace, inputs)
        cost = prefill_cost(shape, **prompt, score=score)
        # What is multiplied elementwise torch does not count.
        scored = [cost.layers[layer - 1] for layer in layers]
        elementwise = {
            "contribution": sum(2 * layer.visual * shape.d_query for layer in scored),
            "removal_effect": sum(2 * layer.visual * shape.d_query for layer in scored),
            "value_norm": cost.parts["scorer"],
        }
        assert counter.get_total_flops() == cost.total - elementwise.get(score, 0)
        assert tuple(layer.visual + layer.text for layer in cost.layers) == trace.lengths
        vanilla = prefill_cost(shape, **{**prompt, "kept": None})
        assert cost.ratio(vanilla) < 1
        assert (cost.parts["scorer"] > 0) == (score != "random")

    @pytest.mark.parametrize("score", SCORES)
    def test_telling_anchors_from_dumps_included(
        self, family: str, layers: tuple[int, ...], keep: Any, score: Any
    ) -> None:
        """Whatever ranks the tokens, their roles need contribution too, from the same attention row."""
        model, inputs = tiny.shared(family), tiny.inputs(family, images=(2,), tail=(3,))
        lvlm, shape = HookedLVLM(model), Shape.of(model.config)
        pruner = CAPA(layers=layers, keep=keep, score=score, protect_anchors=True, tau=3.0)
        with pruner.attach(lvlm) as trace, counting() as counter:
            model(**inputs, logits_to_keep=1)
        prompt = prompt_of(trace, inputs)
        grids = prompt.pop("grids", None)
        cost = prompt_cost(shape, pruner, trace, grids=grids, convention=Convention())
        # What is multiplied elementwise torch does not count.
        scored = [cost.layers[layer - 1] for layer in layers]
        weighting = sum(2 * layer.visual * shape.d_query for layer in scored)
        norms = sum(2 * (layer.visual + layer.text) * shape.d_kv for layer in scored)
        elementwise = weighting * (2 if score == "removal_effect" else 1) + (score == "value_norm") * norms
        assert counter.get_total_flops() == cost.total - elementwise

    def test_generation_and_its_cache(self, family: str, layers: tuple[int, ...], keep: Any) -> None:
        model, inputs = tiny.shared(family), tiny.inputs(family, images=(1,), tail=(5,))
        lvlm, shape = HookedLVLM(model), Shape.of(model.config)
        with FastV(layers=layers, keep=keep).attach(lvlm) as trace, counting() as counter:
            out = model.generate(
                **inputs,
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                return_dict_in_generate=True,
            )
        prompt = prompt_of(trace, inputs)
        cost = prefill_cost(shape, **prompt, score="attention")
        prompt.pop("grids", None)
        steps = [decode_cost(shape, **{**prompt, "text": prompt["text"] + step}) for step in range(3)]
        assert counter.get_total_flops() == cost.total + sum(step.total for step in steps)
        held = sum(layer.keys.numel() + layer.values.numel() for layer in out.past_key_values.layers)
        assert held == kv_cache_values(shape, **{**prompt, "text": prompt["text"] + 3})

    def test_ragged_batch_costs_its_longest_row(
        self, family: str, layers: tuple[int, ...], keep: Any
    ) -> None:
        model, inputs = tiny.shared(family), tiny.inputs(family, images=(1, 2), tail=(3, 5))
        lvlm, shape = HookedLVLM(model), Shape.of(model.config)
        with FastV(layers=layers, keep=keep).attach(lvlm) as trace, counting() as counter:
            model(**inputs, logits_to_keep=1)
        rows = {
            "visual": trace.lengths[0] - 1,
            "text": 1,
            "kept": {layer: trace.lengths[layer] - 1 for layer in layers},
            "score": "attention",
        }
        decoder = prefill_cost(shape, **rows, convention=Convention(vision_tower=False, projector=False))
        of_decoder = sum(
            sum(ops.values())
            for name, ops in counter.get_flop_counts().items()
            if name.endswith(("language_model", "lm_head"))
        )
        assert of_decoder == 2 * decoder.total


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
class TestWhatSavesNothing:
    def test_masking_costs_what_the_model_costs_and_the_scoring(self, family: str) -> None:
        model, inputs = tiny.shared(family), tiny.inputs(family, images=(2,), tail=(3,))
        lvlm, shape = HookedLVLM(model), Shape.of(model.config)
        with FastV(execution="masked").attach(lvlm) as trace, counting() as counter:
            model(**inputs, logits_to_keep=1)
        prompt = prompt_of(trace, inputs)
        assert prompt["kept"][2] < prompt["visual"]
        prompt["kept"] = {2: prompt["visual"]}
        assert counter.get_total_flops() == prefill_cost(shape, **prompt, score="attention").total

    def test_scoring_anew_at_every_step(self, family: str) -> None:
        """The prefill is the model's own; each step attends to the whole cache, and scores on it."""
        model, inputs = tiny.shared(family), tiny.inputs(family, images=(1,), tail=(5,))
        lvlm, shape = HookedLVLM(model), Shape.of(model.config)
        pruner = CAPA(layers=(2,), score="attention", rescore="every_step")
        with pruner.attach(lvlm) as trace, counting() as counter:
            model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert not trace.saves_prefill
        prompt = prompt_of(trace, inputs)
        prompt["kept"] = {2: prompt["visual"]}
        cost = prefill_cost(shape, **prompt).total
        prompt.pop("grids", None)
        for step in range(2):
            text = prompt["text"] + step
            cost += decode_cost(shape, **{**prompt, "text": text}, score="attention").total
        assert counter.get_total_flops() == cost


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
class TestWithoutTheFFN:
    @pytest.mark.parametrize("pruned", [False, True])
    @pytest.mark.parametrize("kind", ["hadamard", "skip"])
    def test_visual_tokens_skip_its_matrices(self, family: str, kind: str, pruned: bool) -> None:
        model, inputs = tiny.shared(family), tiny.inputs(family, images=(2,), tail=(3,))
        lvlm, shape, layers = HookedLVLM(model), Shape.of(model.config), (0, 2)
        ffn = (
            SkipFFN(layers)
            if kind == "skip"
            else HadamardFFN({layer: torch.full((shape.d_model,), 1.1) for layer in layers})
        )
        pruner = CAPA(layers=(1,) if pruned else (), keep=0.5, ffn=ffn, score="attention")
        with pruner.attach(lvlm) as trace, counting() as counter:
            model(**inputs, logits_to_keep=1)
        prompt = prompt_of(trace, inputs)
        assert bool(prompt["kept"]) == pruned
        cost = prefill_cost(shape, **prompt, **{kind: layers}, score="attention")
        # The Hadamard product is elementwise, which torch does not count.
        assert counter.get_total_flops() == cost.total - cost.parts["hadamard"]
        assert cost.ratio(prefill_cost(shape, **prompt)) < 1
        seen = [2 * cost.layers[layer].visual * shape.d_model for layer in layers]
        assert cost.parts["hadamard"] == (sum(seen) if kind == "hadamard" else 0)

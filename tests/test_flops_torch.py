"""The cost counter against torch's own, which counts the products of real forwards: equal, to the last one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import estimate_cost
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.utils import logging

from capa_probe import measures
from capa_probe.errors import CapaProbeError
from capa_probe.flops import Convention, Shape, decode_cost, prefill_cost, scorer_cost
from tests import tiny
from tests.flops_reference import LLAVA_7B, QWEN_7B

PLAIN = Convention(lm_head="all")


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        yield counter


def of_module(counter: FlopCounterMode, end: str) -> int:
    """What torch counted in the modules of one name."""
    return sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith(end))


def prompts_of(inputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Token counts of each row of a batch, padding taken as text, as a forward takes it."""
    grids = [(h, w) for _, h, w in inputs.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.int)).tolist()]
    rows: list[dict[str, Any]] = []
    for visual in (inputs["input_ids"] == tiny.IMAGE).sum(dim=1).tolist():
        row = {"visual": visual, "text": inputs["input_ids"].shape[1] - visual}
        if "image_grid_thw" in inputs:
            row["grids"], left = [], visual
            while left:
                row["grids"].append(grids.pop(0))
                left -= row["grids"][-1][0] * row["grids"][-1][1] // 4
        rows.append(row)
    return rows


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
class TestForward:
    def test_ragged_batch_of_several_images(self, family: str, attn: str) -> None:
        model, inputs = tiny.shared(family, attn), tiny.inputs(family)
        with counting() as counter:
            model(**inputs)
        shape = Shape.of(model.config)
        costs = [prefill_cost(shape, **row, convention=PLAIN) for row in prompts_of(inputs)]
        assert counter.get_total_flops() == sum(cost.total for cost in costs)
        # Part by part as well, so that no two errors make up for each other.
        tower = "model.visual" if family == "qwen2_5_vl" else "model.vision_tower"
        projector = "visual.merger" if family == "qwen2_5_vl" else "model.multi_modal_projector"
        found = {end: of_module(counter, end) for end in (tower, projector, "language_model", "lm_head")}
        if family == "qwen2_5_vl":
            found[tower] -= found[projector]  # which is a module of the tower
        assert found == {
            tower: sum(cost.patch_embedding + cost.vision_tower for cost in costs),
            projector: sum(cost.projector for cost in costs),
            "language_model": sum(cost.decoder for cost in costs),
            "lm_head": sum(cost.lm_head for cost in costs),
        }
        for layer in range(shape.n_layers):
            for part in ("mlp", "self_attn"):
                counted = of_module(counter, f"language_model.layers.{layer}.{part}")
                each = [cost.layers[layer] for cost in costs]
                expected = [c.ffn if part == "mlp" else c.projections + c.attention for c in each]
                assert counted == sum(expected)

    def test_prefill_and_steps_of_generation(self, family: str, attn: str) -> None:
        model, inputs = tiny.shared(family, attn), tiny.inputs(family, images=(2, 1), tail=(4, 2))
        rows, shape = prompts_of(inputs), Shape.of(model.config)
        with counting() as counter:
            model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        costs = [prefill_cost(shape, **row) for row in rows]
        for step in range(3):  # the last token does not enter
            costs += [decode_cost(shape, visual=row["visual"], text=row["text"] + step) for row in rows]
        assert counter.get_total_flops() == sum(cost.total for cost in costs)


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
class TestOtherForwards:
    def test_a_further_prompt_on_the_cache(self, family: str) -> None:
        model, inputs = tiny.shared(family), tiny.inputs(family, images=(1,), tail=(3,))
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        (row,) = prompts_of(inputs)
        with counting() as counter:
            model(input_ids=torch.tensor([[5, 6, 7, 8]]), past_key_values=cache)
        cost = decode_cost(
            Shape.of(model.config), visual=row["visual"], text=row["text"], new=4, convention=PLAIN
        )
        assert counter.get_total_flops() == cost.total

    @pytest.mark.parametrize("sizes", [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}])
    def test_other_groupings_of_heads(self, family: str, sizes: dict[str, int]) -> None:
        model, inputs = tiny.build(family, **sizes), tiny.inputs(family, images=(1,))
        with counting() as counter:
            model(**inputs)
        (row,) = prompts_of(inputs)
        gqa = prefill_cost(Shape.of(model.config), **row, convention=PLAIN)
        assert counter.get_total_flops() == gqa.total
        dense = prefill_cost(Shape.of(model.config), **row, convention=Convention(lm_head="all", kv="dense"))
        assert (dense.total == gqa.total) == (sizes["num_key_value_heads"] == 4)


@pytest.mark.parametrize("grids", [[(2, 2)], [(12, 10)], [(6, 14), (4, 4), (2, 18)]])
def test_windowed_tower_on_grids_that_windows_do_not_fill(grids: list[tuple[int, int]]) -> None:
    model = tiny.shared("qwen2_5_vl")
    visual = [h * w // 4 for h, w in grids]
    ids = [tiny.BOS]
    for n in visual:
        ids += [tiny.START, *[tiny.IMAGE] * n, tiny.END]
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "mm_token_type_ids": (torch.tensor([ids]) == tiny.IMAGE).int(),
        "image_grid_thw": torch.tensor([[1, h, w] for h, w in grids]),
        "pixel_values": torch.randn(sum(h * w for h, w in grids), 96),
    }
    with counting() as counter:
        model(**inputs)
    cost = prefill_cost(
        Shape.of(model.config),
        visual=sum(visual),
        text=len(ids) - sum(visual),
        grids=grids,
        convention=PLAIN,
    )
    assert counter.get_total_flops() == cost.total


def llava(vision: Any, text: Any, **options: Any) -> PreTrainedModel:
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=tiny.IMAGE, **options)
    return LlavaForConditionalGeneration(config).eval()


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


@pytest.mark.parametrize(
    ("vision", "text", "options", "visual"),
    [
        (CLIPVisionConfig(**VISION), LlamaConfig, {"vision_feature_layer": [-1, -2]}, 16),
        (CLIPVisionConfig(**VISION), LlamaConfig, {"vision_feature_select_strategy": "full"}, 17),
        (SiglipVisionConfig(**VISION), MistralConfig, {"vision_feature_select_strategy": "full"}, 16),
        (
            SiglipVisionConfig(**VISION, vision_use_head=False),
            Qwen3Config,
            {"vision_feature_select_strategy": "full"},
            16,
        ),
    ],
    ids=["two feature layers", "CLS token kept", "SigLIP", "SigLIP without its head"],
)
def test_other_llavas(vision: Any, text: Any, options: dict[str, Any], visual: int) -> None:
    model = llava(vision, text(**tiny.TEXT, head_dim=12), **options)
    ids = torch.tensor([[1, *[tiny.IMAGE] * visual * 2, 5, 6]])
    with counting() as counter:
        model(input_ids=ids, pixel_values=torch.randn(2, 3, 16, 16))
    cost = prefill_cost(Shape.of(model.config), visual=visual * 2, text=3, convention=PLAIN)
    assert counter.get_total_flops() == cost.total


class TestScorer:
    """The measures themselves, counted; torch does not see what is multiplied elementwise."""

    sizes = Shape(1, d_model=24, n_heads=6, n_kv_heads=2, d_head=5, d_mlp=1, vocab=1)

    @staticmethod
    def weighting(tokens: int) -> int:
        return 2 * tokens * 6 * 5

    @pytest.mark.parametrize("queries", [1, 3])
    def test_attention(self, queries: int) -> None:
        query, key = torch.randn(1, 6, queries, 5), torch.randn(1, 2, 11, 5)
        with counting() as counter:
            measures.attention_probabilities(query, key, 1.0)
        cost = scorer_cost(self.sizes, visual=7, text=4, score="attention", queries=queries)
        assert counter.get_total_flops() == cost

    def test_contribution(self) -> None:
        query, key, value = torch.randn(1, 6, 1, 5), torch.randn(1, 2, 11, 5), torch.randn(1, 2, 11, 5)
        visual = torch.tensor([1, 2, 3, 5, 6, 8, 9])
        with counting() as counter:
            row = measures.attention_probabilities(query, key, 1.0).squeeze(2)
            measures.attention_contribution(row[:, :, visual], value[:, :, visual], torch.randn(24, 30))
        cost = scorer_cost(self.sizes, visual=7, text=4, score="contribution")
        assert counter.get_total_flops() == cost - self.weighting(7)

    def test_removal_effect(self) -> None:
        query, key, value = torch.randn(1, 6, 1, 5), torch.randn(1, 2, 11, 5), torch.randn(1, 2, 11, 5)
        visual = torch.tensor([[1, 2, 3, 5, 6, 8, 9]])
        with counting() as counter:
            row = measures.attention_probabilities(query, key, 1.0).squeeze(2)
            measures.removal_effect(row, value, torch.randn(24, 30), visual)
        cost = scorer_cost(self.sizes, visual=7, text=4, score="removal_effect")
        assert counter.get_total_flops() == cost - self.weighting(7)


class TestShapeOf:
    def test_published_models(self) -> None:
        verbosity = logging.get_verbosity()
        models = {case.name: case.model for case in estimate_cost.cases()}
        logging.set_verbosity(verbosity)
        assert Shape.of(models["LLaVA-1.5-7B"].config) == LLAVA_7B
        for name, vocab in (("Qwen2.5-VL-7B", 152064), ("InternVL3-8B", 151674)):
            found = Shape.of(models[name].config)
            assert (found.vocab, found.n_layers, found.d_model) == (vocab, QWEN_7B.n_layers, QWEN_7B.d_model)
            assert (found.n_heads, found.n_kv_heads, found.d_head, found.d_mlp) == (28, 4, 128, 18944)

    def test_a_decoder_alone(self) -> None:
        assert Shape.of(LlamaConfig(**tiny.TEXT)).vision is None

    @pytest.mark.parametrize("model_type", ["gpt2", "qwen3_moe", "gemma3_text"])
    def test_decoders_of_another_make_are_refused(self, model_type: str) -> None:
        with pytest.raises(CapaProbeError, match=f"A decoder of type {model_type} was given"):
            Shape.of(AutoConfig.for_model(model_type))

    def test_towers_of_another_make_are_refused(self) -> None:
        config = LlavaConfig(
            vision_config=AutoConfig.for_model("pixtral"), text_config=LlamaConfig(**tiny.TEXT)
        )
        with pytest.raises(CapaProbeError, match="vision tower of type pixtral"):
            Shape.of(config)

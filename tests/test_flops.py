"""The cost counter: a naive twin on drawn models, properties, and parts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capa_probe.errors import CapaProbeError
from capa_probe.flops import (
    CAPA,
    CONVENTIONS,
    FASTV,
    PYRAMIDDROP,
    Convention,
    Shape,
    VisionShape,
    decode_cost,
    kv_cache_values,
    prefill_cost,
    schedule_of,
    scorer_cost,
    visual_per_layer,
)
from tests.flops_reference import (
    CLIP_336,
    LLAVA_7B,
    QWEN_7B,
    by_part,
    decode_products,
    prefill_products,
)

MACS = Convention(unit="macs")


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kv_heads = draw(st.integers(1, 3))
    return Shape(
        n_layers=draw(st.integers(1, 5)),
        d_model=draw(st.integers(1, 9)),
        n_heads=kv_heads * draw(st.integers(1, 3)),
        n_kv_heads=kv_heads,
        d_head=draw(st.integers(1, 5)),
        d_mlp=draw(st.integers(1, 9)),
        vocab=draw(st.integers(1, 9)),
        gated=draw(st.booleans()),
    )


@st.composite
def prompts(draw: st.DrawFn) -> tuple[Shape, dict[str, Any]]:
    """A model, and a prompt on it with a schedule."""
    shape = draw(shapes())
    visual, layers = draw(st.integers(0, 12)), st.integers(0, shape.n_layers - 1)
    counts = sorted(draw(st.lists(st.integers(0, visual), max_size=shape.n_layers)), reverse=True)
    where = sorted(draw(st.sets(layers, min_size=len(counts), max_size=len(counts))))
    hadamard = draw(st.frozensets(layers))
    return shape, {
        "visual": visual,
        "text": draw(st.integers(1, 6)),
        "kept": dict(zip(where, counts, strict=True)),
        "hadamard": tuple(hadamard),
        "skip": tuple(draw(st.frozensets(layers)) - hadamard),
    }


conventions = st.builds(
    Convention,
    unit=st.sampled_from(("macs", "flops")),
    tokens=st.sampled_from(("all", "visual")),
    attention=st.sampled_from(("full", "causal")),
    kv=st.sampled_from(("gqa", "dense")),
    ffn_matrices=st.sampled_from((None, 2, 3)),
    lm_head=st.sampled_from(("none", "last", "all")),
)


class TestNaiveTwin:
    @given(prompts())
    def test_prefill(self, drawn: tuple[Shape, dict[str, Any]]) -> None:
        shape, prompt = drawn
        cost = prefill_cost(shape, **prompt, convention=MACS)
        for layer, products in zip(cost.layers, prefill_products(shape, **prompt), strict=True):
            found = {part: getattr(layer, part) for part in by_part(products)}
            assert found == by_part(products)
            assert layer.total == sum(found.values())

    @given(prompts())
    def test_decode(self, drawn: tuple[Shape, dict[str, Any]]) -> None:
        shape, prompt = drawn
        prompt = {name: prompt[name] for name in ("visual", "text", "kept")}
        cost = decode_cost(shape, **prompt, convention=MACS)
        for layer, products in zip(cost.layers, decode_products(shape, **prompt), strict=True):
            assert {part: getattr(layer, part) for part in by_part(products)} == by_part(products)

    @given(shapes(), st.integers(1, 7), st.integers(0, 7))
    def test_causal_attention_counts_the_visible_pairs(self, shape: Shape, new: int, past: int) -> None:
        causal = replace(MACS, attention="causal")
        prefill = prefill_cost(shape, visual=0, text=new, convention=causal)
        decode = decode_cost(shape, visual=past, text=2, new=new, convention=causal)
        for cost, before in ((prefill, 0), (decode, past + 2)):
            pairs = sum(key <= before + query for query in range(new) for key in range(before + new))
            assert {layer.attention for layer in cost.layers} == {2 * pairs * shape.n_heads * shape.d_head}

    @given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 6), st.integers(0, 1))
    def test_windows_count_the_pairs_within(self, rows: int, cols: int, window: int, n_full: int) -> None:
        """Patches attend to those of their own window, except in blocks that see everything."""
        tower = VisionShape(2, d_model=1, d_mlp=1, d_patch=1, window=window, full_layers=(0,) * n_full)
        n = rows * cols
        side = window or 100
        sizes: dict[tuple[int, int], int] = {}
        for row in range(rows):
            for col in range(cols):
                place = (row // side, col // side)
                sizes[place] = sizes.get(place, 0) + 1
        within = sum(size * size for size in sizes.values())
        expected = (n_full * n * n + (2 - n_full) * within) if window else 2 * n * n
        assert tower.blocks((rows, cols)) - 2 * n * (4 + 2) == 2 * expected


class TestProperties:
    @given(prompts())
    def test_a_schedule_follows_from_its_counts(self, drawn: tuple[Shape, dict[str, Any]]) -> None:
        shape, prompt = drawn
        counts = visual_per_layer(shape, prompt["visual"], prompt["kept"])
        assert visual_per_layer(shape, counts[0], schedule_of(counts)) == counts
        assert len(schedule_of(counts)) == len({*counts}) - 1

    @given(prompts(), conventions)
    def test_more_tokens_cost_more(self, drawn: tuple[Shape, dict[str, Any]], convention: Convention) -> None:
        shape, prompt = drawn

        def cost(**changes: int) -> int:
            return prefill_cost(shape, **{**prompt, **changes}, convention=convention).total

        counts_more = replace(convention, tokens="all") == convention
        assert (cost(text=prompt["text"] + 1) > cost()) == counts_more
        more_visual = cost(visual=prompt["visual"] + 1)
        assert more_visual >= cost()
        if 0 not in prompt["kept"]:
            assert more_visual > cost()

    @given(prompts(), conventions, st.integers(1, 5))
    def test_layers_add_up(
        self, drawn: tuple[Shape, dict[str, Any]], convention: Convention, at: int
    ) -> None:
        """Cutting the decoder in two changes nothing but the place of the pruning."""
        shape, prompt = drawn
        at = min(at, shape.n_layers - 1)
        if at == 0:
            return
        convention = replace(convention, lm_head="none")
        whole = prefill_cost(shape, **prompt, convention=convention)
        left = visual_per_layer(shape, prompt["visual"], prompt["kept"])[at]
        halves = []
        for start, stop, visual in ((0, at, prompt["visual"]), (at, shape.n_layers, left)):
            part = replace(shape, n_layers=stop - start)
            cut = {
                "visual": visual,
                "text": prompt["text"],
                "kept": {layer - start: n for layer, n in prompt["kept"].items() if start <= layer < stop},
                "hadamard": [layer - start for layer in prompt["hadamard"] if start <= layer < stop],
                "skip": [layer - start for layer in prompt["skip"] if start <= layer < stop],
            }
            halves.append(prefill_cost(part, **cut, convention=convention).total)
        assert whole.total == sum(halves) == sum(layer.total for layer in whole.layers)

    @given(prompts(), conventions)
    def test_pruning_nothing_costs_what_the_model_costs(
        self, drawn: tuple[Shape, dict[str, Any]], convention: Convention
    ) -> None:
        shape, prompt = drawn
        plain = {name: prompt[name] for name in ("visual", "text")}
        vanilla = prefill_cost(shape, **plain, convention=convention)
        kept = dict.fromkeys(prompt["kept"], prompt["visual"])
        assert prefill_cost(shape, **plain, kept=kept, convention=convention) == vanilla
        assert prefill_cost(shape, **plain, kept={}, convention=convention) == vanilla

    @given(prompts(), conventions)
    def test_pruning_leaves_a_share_in_0_1(
        self, drawn: tuple[Shape, dict[str, Any]], convention: Convention
    ) -> None:
        shape, prompt = drawn
        vanilla = prefill_cost(shape, visual=prompt["visual"], text=prompt["text"], convention=convention)
        pruned = prefill_cost(shape, **{**prompt, "hadamard": ()}, convention=convention)
        if vanilla.total == 0:
            assert prompt["visual"] == 0
            with pytest.raises(CapaProbeError, match="with one of zero"):
                pruned.ratio(vanilla)
        else:
            share = pruned.ratio(vanilla)
            assert 0 <= share <= 1
            # Nothing at all is left only where no token that counts is.
            assert share > 0 or (convention.tokens == "visual" and prompt["kept"][0] == 0)

    @given(prompts(), conventions)
    def test_units_and_parts(self, drawn: tuple[Shape, dict[str, Any]], convention: Convention) -> None:
        shape, prompt = drawn
        macs, flops = (
            prefill_cost(
                shape,
                **prompt,
                score="contribution",
                convention=replace(convention, unit=unit),  # type: ignore[arg-type]
            )
            for unit in ("macs", "flops")
        )
        assert flops.total == 2 * macs.total == sum(flops.parts.values())
        assert {name: 2 * n for name, n in macs.parts.items()} == flops.parts

    def test_conventions_that_count_more_count_more(self) -> None:
        def total(**changes: Any) -> int:
            return prefill_cost(
                replace(QWEN_7B, vision=CLIP_336),
                visual=576,
                text=30,
                kept={3: 144},
                score="contribution",
                convention=Convention(**changes),
            ).total

        less: list[dict[str, Any]] = [
            {"unit": "macs"},
            {"tokens": "visual"},
            {"attention": "causal"},
            {"ffn_matrices": 2},
            {"vision_tower": False},
            {"patch_embedding": False},
            {"projector": False},
            {"lm_head": "none"},
            {"scorer": False},
        ]
        assert all(total(**changes) < total() for changes in less)
        assert total(ffn_matrices=3) == total()
        assert total(kv="dense") > total()
        assert total(lm_head="all") > total()

    def test_names_of_conventions(self) -> None:
        assert {
            "forward": Convention(),
            "fastv": FASTV,
            "pyramiddrop": PYRAMIDDROP,
            "capa": CAPA,
        } == CONVENTIONS


class TestParts:
    def test_scorer_counts_at_the_layer_whose_attention_it_reads(self) -> None:
        cost = prefill_cost(
            QWEN_7B, visual=400, text=20, kept={3: 100, 11: 50}, score="contribution", convention=MACS
        )
        d = 3584
        row, weighted, projected = 420 * d, 400 * d, 400 * d * d
        assert cost.layers[2].scorer == row + weighted + projected
        assert cost.layers[10].scorer == (120 + 100 + 100 * d) * d
        assert [layer.layer for layer in cost.layers if layer.scorer] == [2, 10]
        left_out = replace(MACS, scorer=False)
        without = prefill_cost(
            QWEN_7B,
            visual=400,
            text=20,
            kept={3: 100, 11: 50},
            score="contribution",
            convention=left_out,
        )
        assert cost.total - without.total == cost.parts["scorer"]

    def test_scoring_before_the_decoder_is_none_of_its_layers(self) -> None:
        cost = prefill_cost(QWEN_7B, visual=40, text=2, kept={0: 10}, score="attention", convention=MACS)
        assert cost.parts["scorer"] == 0

    def test_contribution_is_cheap_beside_what_it_saves(self) -> None:
        """One more output projection over the visual tokens of one layer: under one percent of a prefill."""
        vanilla = prefill_cost(QWEN_7B, visual=576, text=64)
        pruned = prefill_cost(QWEN_7B, visual=576, text=64, kept={3: 144}, score="contribution")
        assert 0 < pruned.parts["scorer"] < 0.01 * vanilla.total
        assert pruned.ratio(vanilla) < 0.5

    def test_scores_by_their_formulas(self) -> None:
        shape = Shape(2, d_model=5, n_heads=4, n_kv_heads=2, d_head=3, d_mlp=7, vocab=11)
        found = {
            score: scorer_cost(shape, visual=6, text=2, score=score, convention=MACS)
            for score in ("attention", "value_norm", "contribution", "removal_effect", "random")
        }
        assert found == {
            "attention": 8 * 12,
            "value_norm": 8 * 6,
            "contribution": 8 * 12 + 6 * 12 + 6 * 12 * 5,
            "removal_effect": 8 * 12 + 2 * 8 * 12 + 6 * 12 + 6 * 12 * 5,
            "random": 0,
        }
        assert (
            scorer_cost(shape, visual=6, text=2, score="attention", queries=3, convention=MACS) == 3 * 8 * 12
        )
        assert scorer_cost(shape, visual=6, text=2, score="attention", convention=CAPA) == 6 * 12

    def test_a_step_pays_for_scoring_anew(self) -> None:
        kept = {3: 100}
        once = decode_cost(QWEN_7B, visual=400, text=20, kept=kept)
        every = decode_cost(QWEN_7B, visual=400, text=20, kept=kept, score="contribution")
        assert every.total - once.total == scorer_cost(QWEN_7B, visual=400, text=21, score="contribution")

    def test_a_prompt_fed_in_steps_computes_the_same_products(self) -> None:
        """Under causal attention a prefill is the sum of its steps, but for the first token."""
        causal = Convention(attention="causal", lm_head="all")
        whole = prefill_cost(QWEN_7B, visual=0, text=9, convention=causal).total
        first = prefill_cost(QWEN_7B, visual=0, text=1, convention=causal).total
        steps = [decode_cost(QWEN_7B, visual=0, text=n, convention=causal).total for n in range(1, 9)]
        assert whole == first + sum(steps)
        assert whole == first + decode_cost(QWEN_7B, visual=0, text=1, new=8, convention=causal).total

    def test_two_tiles_cost_twice_one(self) -> None:
        one, two = (prefill_cost(LLAVA_7B, visual=576 * n, text=9) for n in (1, 2))
        for part in ("patch_embedding", "vision_tower", "projector"):
            assert two.parts[part] == 2 * one.parts[part] > 0

    def test_a_prompt_without_images_sees_no_tower(self) -> None:
        cost = prefill_cost(LLAVA_7B, visual=0, text=9)
        assert cost.total == cost.decoder + cost.lm_head

    def test_cache_of_every_layer(self) -> None:
        assert kv_cache_values(QWEN_7B, visual=576, text=24) == 28 * 2 * 512 * 600
        assert kv_cache_values(QWEN_7B, visual=576, text=24, kept={4: 76}) == 2 * 512 * (4 * 600 + 24 * 100)

    def test_counts_may_be_numpy_integers(self) -> None:
        given = {np.int64(3): np.int32(144)}
        cost = prefill_cost(QWEN_7B, visual=np.int64(576), text=9, kept=given)  # type: ignore[arg-type]
        assert cost == prefill_cost(QWEN_7B, visual=576, text=9, kept={3: 144})
        assert type(cost.total) is int  # no overflow


def test_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, capa_probe.flops; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"

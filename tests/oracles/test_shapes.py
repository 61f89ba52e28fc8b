"""The loops again, on drawn shapes of models and batches: heads and KV heads, paddings, images anywhere or nowhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import capa_probe as cp
from capa_probe.schema import MEASURES
from tests import tiny
from tests.oracles import compare, loops, models
from tests.oracles.prompts import Layout, Picture, batch, write

TOLERANCE = 1e-5
#: (heads, KV heads): multi-head, grouped and multi-query attention, and one head alone.
HEADS = [(4, 4), (3, 3), (4, 2), (6, 3), (6, 2), (8, 2), (4, 1), (3, 1), (1, 1)]
#: d_head to the shares of time, row and column in M-RoPE.
SECTIONS = {4: [1, 1, 0], 6: [1, 1, 1], 8: [2, 1, 1], 10: [2, 2, 1], 16: [4, 2, 2]}


class Shape(NamedTuple):
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int


class Batch(NamedTuple):
    layouts: tuple[Layout, ...]
    bare: bool  # no tokens around an image, so that it can stand first or last
    padding_side: str
    steps: int


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    n_heads, n_kv_heads = draw(st.sampled_from(HEADS))
    d_head = draw(st.sampled_from(sorted(SECTIONS)))
    # The width of the residual stream need not be that of all heads together, but is a multiple of their number.
    d_model = n_heads * draw(st.sampled_from([6, 8, 12]))
    return Shape(n_heads, n_kv_heads, d_head, d_model, draw(st.sampled_from([8, 20])))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Words, then images with words between them, then words: no image at all one time in three."""
    n_images = draw(st.integers(0, 2))
    edges = st.one_of(st.integers(0, 3), st.sampled_from([9, 25]))  # prompts of very different length
    first, last = draw(edges), draw(edges)
    parts: list[int | Picture] = [first]
    for number in range(n_images):
        parts += [draw(st.integers(1, 3))] if number else []
        parts.append(Picture(draw(st.integers(1, 2)), draw(st.integers(1, 2))))
    return (*parts, last if n_images or first + last else 1)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    side = draw(st.sampled_from(["left", "right"]))
    drawn = draw(st.lists(layouts(), min_size=1, max_size=3))
    steps = draw(st.integers(0, 1)) if side == "left" else 0  # right-padded prompts cannot be continued
    return Batch(tuple(drawn), draw(st.booleans()), side, steps)


def build(family: str, shape: Shape, attn: str) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_mlp,
        "num_hidden_layers": 2,
        "head_dim": shape.d_head,
    }
    if family == "qwen2_5_vl":  # its heads are as wide as they fill the residual stream
        del sizes["head_dim"]
        sizes["hidden_size"] = shape.n_heads * shape.d_head
        sizes["rope_parameters"] = {"rope_type": "default", "mrope_section": SECTIONS[shape.d_head]}
    return models.build(family, attn, **sizes)


GQA, MQA = Shape(6, 3, 8, 36, 20), Shape(4, 1, 6, 24, 20)


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
@given(shapes(), batches(), st.integers(0, 999), st.sampled_from(["sdpa", "sdpa", "eager"]))
# An image first, in the middle and last; none in one sample of a batch; one token against thirty and more.
@example(
    GQA, Batch(((0, Picture(2, 3), 4), (2, Picture(), 2), (5, Picture(), 0)), True, "left", 1), 0, "sdpa"
)
@example(MQA, Batch(((1,), (30, Picture(3, 1), 2, Picture(1, 1), 12)), False, "right", 0), 1, "sdpa")
@example(MQA, Batch(((1,), (3, Picture(1, 2), 30)), False, "left", 1), 2, "sdpa")
@example(Shape(3, 3, 16, 18, 8), Batch(((7,), (2,)), False, "left", 1), 3, "eager")
# An example takes a second, so a failing one is shown as it was drawn; making it smaller would take minutes.
@settings(
    max_examples=6,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
def test_every_column_agrees_whatever_the_shapes(
    family: str, shape: Shape, drawn: Batch, seed: int, attn: str
) -> None:
    event(f"{len(drawn.layouts)} samples, steps={drawn.steps}")
    if family == "qwen2_5_vl" and drawn.bare and drawn.steps:
        # After an image, transformers' generate counts the position of the first new token on from each axis of the
        # image's last token, and a prefill from the largest of them. A prompt of the family ends with text.
        drawn = drawn._replace(layouts=tuple((*layout, 1) for layout in drawn.layouts))
    prompts = [write(family, layout, seed + n, drawn.bare) for n, layout in enumerate(drawn.layouts)]
    wanted = loops.table(build(family, shape, "eager"), family, prompts, drawn.steps)
    prof = cp.profile(
        cp.HookedLVLM(build(family, shape, attn)),
        [batch(family, prompts, drawn.padding_side)],
        steps=drawn.steps,
        rows="all",
        probes="all",
        progress=False,
    )
    compare.agree(prof.tokens, wanted, TOLERANCE)
    compare.agree(prof.layers, loops.summary(wanted, MEASURES), TOLERANCE)

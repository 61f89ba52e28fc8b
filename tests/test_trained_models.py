"""What only a trained model can show, on every demo model that is there: spans against content, attention on it.

A grid that is shifted, transposed or in another order passes every test of shapes. Here the tokens that spans call
row r, column c are taken away, and the answers about that cell must change, and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch

import capa_probe as cp
from capa_probe.benchmark.answers import is_correct
from capa_probe.benchmark.regions import KeepTokens
from capa_probe.demo import DEMO_MODELS, demo_model_path
from capa_probe.demo.dataset import as_sentences, split_rng
from capa_probe.demo.drawing import render
from capa_probe.demo.questions import Question, ask
from capa_probe.demo.scenes import Scene, random_scene
from capa_probe.demo.worlds import WORLDS
from capa_probe.lvlm.inputs import LVLMInputs
from capa_probe.lvlm.spans import ImageSpan

FAMILIES = pytest.mark.parametrize("family", DEMO_MODELS)
TASKS = ("color_at", "shape_at")
N_SCENES = 24
#: A token is a cell's where so much of it lies over the cell, which a shape, in the middle, does not fill.
SHARE = 0.2


@cache
def wrap(family: str) -> cp.HookedLVLM:
    return cp.HookedLVLM.from_pretrained(demo_model_path(family))


@dataclass(frozen=True)
class Asked:
    """A question about one cell of a scene, and another cell, with a thing in it as well, that it is not about."""

    scene: Scene
    question: Question
    cell: int
    other: int


@cache
def questions(family: str) -> tuple[Asked, ...]:
    """One for each scene, of a split that nothing was trained or measured on; the other cell is no neighbor."""
    world, found = WORLDS[DEMO_MODELS[family].world], []
    for number in range(N_SCENES):
        rng = split_rng("validation", number)
        while True:
            scene = random_scene(rng, world)
            question = ask(scene, TASKS[number % 2], rng)
            assert question is not None
            (cell,) = question.cells
            row, col = divmod(cell, scene.cols)
            far = [
                other
                for other in scene.objects
                if max(abs(other // scene.cols - row), abs(other % scene.cols - col)) > 1
            ]
            if far:
                break
        found.append(Asked(scene, question, cell, far[int(rng.integers(len(far)))]))
    return tuple(found)


@cache
def samples(family: str) -> list[cp.Sample]:
    return [
        cp.Sample(str(n), render(asked.scene), as_sentences(asked.question.text), asked.question.answer)
        for n, asked in enumerate(questions(family))
    ]


def prepared(family: str) -> LVLMInputs:
    """All questions in one padded batch."""
    chosen = samples(family)
    return wrap(family).prepare([s.open_images() for s in chosen], [s.question for s in chosen])


def spans_of(family: str) -> tuple[ImageSpan, ...]:
    """One for each sample, as the toolkit tells them from what the processor made."""
    return tuple(wrap(family).spans(prepared(family)).images)


def tokens_of(span: ImageSpan, scene: Scene, cell: int) -> set[int]:
    """The tokens of a cell, from nothing but what the span says of row, column and tile."""
    assert span.grid is not None
    (rows, cols), (tile_rows, tile_cols) = span.grid, span.tile_grid or (1, 1)
    row, col = divmod(cell, scene.cols)
    found = set()
    for token in range(len(span)):
        tile, places = int(span.tile[token]), (int(span.row[token]), int(span.col[token]))
        thumbnail = tile < 0
        at = (0, 0) if thumbnail else divmod(tile, tile_cols)
        tiles = (1, 1) if thumbnail else (tile_rows, tile_cols)
        shared = 1.0
        for place, size, t, n, c, side in zip(
            places, (rows, cols), at, tiles, (row, col), (scene.rows, scene.cols), strict=True
        ):
            first, last = (t + place / size) / n, (t + (place + 1) / size) / n
            shared *= max(0.0, min(last, (c + 1) / side) - max(first, c / side)) / (last - first)
        if shared >= SHARE:
            found.add(token)
    return found


def right_without(family: str, gone: Sequence[set[int]]) -> list[bool]:
    """Which answers are right when these visual tokens are never seen by the decoder."""
    lvlm, inputs = wrap(family), prepared(family)
    stay = tuple(
        tuple(token for token in range(len(span)) if token not in tokens)
        for span, tokens in zip(spans_of(family), gone, strict=True)
    )
    with KeepTokens(layers=(0,), tokens=stay).attach(lvlm):
        ids = lvlm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    texts = lvlm.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [bool(is_correct(text, s.answers)) for text, s in zip(texts, samples(family), strict=True)]


@FAMILIES
def test_a_cells_tokens_are_those_whose_removal_changes_the_answers_about_it(family: str) -> None:
    wrap(family)
    spans, asked = spans_of(family), questions(family)
    own = [tokens_of(span, a.scene, a.cell) for span, a in zip(spans, asked, strict=True)]
    others = [
        tokens_of(span, a.scene, a.other) - mine for span, a, mine in zip(spans, asked, own, strict=True)
    ]
    assert all(own)
    assert all(others)
    whole = np.mean(right_without(family, [set()] * len(asked)))
    without_own, without_other = (np.mean(right_without(family, gone)) for gone in (own, others))
    assert whole >= 0.9
    assert without_own <= 0.5
    assert without_other >= whole - 0.1


@FAMILIES
def test_the_last_query_attends_to_the_cell_that_is_asked_for(family: str) -> None:
    """In the layer where it does so most, told by one half of the questions and tested on the other."""
    lvlm, asked = wrap(family), questions(family)
    prof = cp.profile(lvlm, samples(family), probes=["attention"], rows="visual", progress=False)
    tokens = prof.tokens
    lifts = np.zeros((len(asked), lvlm.n_layers))
    for number, (span, a) in enumerate(zip(spans_of(family), asked, strict=True)):
        own = sorted(tokens_of(span, a.scene, a.cell))
        for layer, rows in tokens[tokens["sample"] == str(number)].groupby("layer"):
            attention = rows.sort_values("position")["attention"].to_numpy()
            assert len(attention) == len(span)
            lifts[number, int(str(layer))] = attention[own].sum() / attention.sum() / (len(own) / len(span))
    best = int(lifts[0::2].mean(axis=0).argmax())
    lift = lifts[1::2, best]
    rng = np.random.default_rng(0)
    means = rng.choice(lift, (2000, len(lift))).mean(axis=1)
    assert np.quantile(means, 0.025) > 1.5, f"layer {best}: {lifts.mean(axis=0).round(2)}"


@FAMILIES
def test_capa_keeps_and_answers_the_same_masked_and_compact(family: str) -> None:
    """Fitted FFNs in the last layers, a quarter of the tokens from layer 4 on, through generation."""
    lvlm, inputs = wrap(family), prepared(family)
    n_visual = lvlm.spans(inputs).visual.sum(dim=1)
    alpha = cp.calibrate_hadamard(lvlm, samples(family)[:8], layers=[6, 7], progress=False)
    ids, kept = {}, {}
    for execution in ("masked", "compact"):
        capa = cp.CAPA(layers=(4,), keep=0.25, ffn=alpha, execution=execution)
        with capa.attach(lvlm) as trace:
            ids[execution] = lvlm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        kept[execution] = trace.kept[4] & lvlm.spans(inputs).visual
    assert torch.equal(ids["masked"], ids["compact"])
    assert torch.equal(kept["masked"], kept["compact"])
    assert kept["compact"].sum(dim=1).tolist() == (n_visual * 0.25).round().int().tolist()
    texts = lvlm.processor.batch_decode(
        ids["compact"][:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    right = [bool(is_correct(text, s.answers)) for text, s in zip(texts, samples(family), strict=True)]
    assert np.mean(right) >= 0.7

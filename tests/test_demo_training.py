"""The recipe of the demo model: turns that do not see each other, and training that resumes exactly."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoProcessor

from capa_probe.demo.drawing import render, render_with_marks
from capa_probe.demo.phrasings import plural
from capa_probe.demo.questions import ask, describe
from capa_probe.demo.scenes import Scene, random_scene
from capa_probe.demo.worlds import CHARACTERS, COLORS, RICH, SHAPES
from demo_training.architecture import Parts, build_config
from demo_training.cpu_attention import attention_in_float32
from demo_training.evaluation import wilson
from demo_training.export import model_card
from demo_training.loop import Schedule, Stage, run_stage
from demo_training.recipe import NAMES, RECIPE
from demo_training.sketches import (
    NOTHING,
    patch_cell,
    sketch_patches,
    sketch_symbols,
)
from demo_training.stages import build_stage, turn_logits
from demo_training.stones import stepping_stone
from demo_training.turns import PREFIX_LENGTH, TurnStyle, draw_questions, pack, right_by_task
from demo_training.vocabulary import ASSISTANT, EOS, UNKNOWN, build_processor, build_tokenizer

TOKENIZER = build_tokenizer()
CPU = torch.device("cpu")
ALL_ALIKE = dict.fromkeys(RICH.tasks, 1.0)


@pytest.fixture(scope="module")
def parts() -> Parts:
    torch.manual_seed(0)
    return Parts().eval()


def scenes(n: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(n)]


@pytest.mark.parametrize("template", [0.0, 1.0])
def test_packed_logits_are_those_of_the_question_asked_alone(parts: Parts, template: float) -> None:
    """Against the model's own forward on what the processor makes of one question and its answer."""
    rng, boards = np.random.default_rng(1), scenes(2)
    style = TurnStyle(ALL_ALIKE, template=template, mark=1.0, per_scene=5)
    questions = [draw_questions(scene, style, rng) for scene in boards]
    turns, processor = pack(questions, style, rng), build_processor()
    with torch.no_grad():
        pixels = processor.image_processor([render(scene) for scene in boards], return_tensors="pt")[
            "pixel_values"
        ]
        visual = parts.projector(parts.patch_features(pixels))
        places = (2 + torch.arange(visual.shape[1])).expand(len(boards), -1)
        packed = turn_logits(parts, visual, places, turns)
        for b, scene in enumerate(boards):
            for t, question in enumerate(questions[b]):
                text = question.text if template else question.text[:-1]
                ending = f" {ASSISTANT}" if template else ""
                alone = processor(
                    images=render(scene),
                    text=f"USER: <image>\n{text}{ending} {question.answer} </s>",
                    return_tensors="pt",
                )
                logits = parts.lvlm(**alone).logits[0, PREFIX_LENGTH:]
                here = packed[b, turns.turn[b] == t + 1]
                assert here.shape == logits.shape
                torch.testing.assert_close(here, logits, rtol=1e-4, atol=1e-5)


def test_without_the_mask_they_are_not(parts: Parts) -> None:
    """The check above can fail: with a plain causal mask, later turns change."""
    rng, boards = np.random.default_rng(1), scenes(1)
    style = TurnStyle(ALL_ALIKE, per_scene=3)
    turns = pack([draw_questions(scene, style, rng) for scene in boards], style, rng)
    visual = torch.randn(1, 9, parts.decoder.embed_tokens.weight.shape[1])
    places = torch.arange(9)[None]
    with torch.no_grad():
        isolated = turn_logits(parts, visual, places, turns)
        turns.turn[turns.turn > 0] = 1  # all of it one turn
        joined = turn_logits(parts, visual, places, turns)
    assert torch.allclose(isolated[0, :3], joined[0, :3], atol=1e-5)
    assert not torch.allclose(isolated[0, -3:], joined[0, -3:], atol=1e-2)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=20)
def test_packing(seed: int, n_scenes: int, per_scene: int) -> None:
    rng = np.random.default_rng(seed)
    style = TurnStyle(ALL_ALIKE, template=0.5, per_scene=per_scene)
    questions = [draw_questions(scene, style, rng) for scene in scenes(n_scenes, seed)]
    turns = pack(questions, style, rng, TOKENIZER)
    mask = turns.mask(n_prefix=3)[:, 0]
    for b in range(n_scenes):
        for t, question in enumerate(questions[b]):
            here = turns.turn[b] == t + 1
            answer = turns.labels[b, here]
            answer = answer[answer >= 0]
            assert answer[-1] == EOS
            assert TOKENIZER.decode(answer[:-1]) == question.answer
            assert turns.positions[b, here].tolist() == list(
                range(PREFIX_LENGTH, PREFIX_LENGTH + int(here.sum()))
            )
            # The last token of a turn sees the prefix and its own turn, nothing else.
            last = 3 + int(here.nonzero()[-1])
            seen = mask[b, last]
            assert seen[:3].all()
            assert torch.equal(seen[3:], here)


def test_scoring_counts_whole_answers() -> None:
    rng = np.random.default_rng(0)
    style = TurnStyle(ALL_ALIKE, per_scene=4)
    turns = pack([draw_questions(scenes(1)[0], style, rng)], style, rng, TOKENIZER)
    logits = torch.nn.functional.one_hot(turns.labels.clamp(min=0), len(TOKENIZER)).float()
    assert all(all(right) for right in right_by_task(logits, turns).values())
    first = int((turns.labels[0] >= 0).nonzero()[0])
    logits[0, first] = -logits[0, first]
    right = right_by_task(logits, turns)
    assert right["describe"] == [False]
    assert sum(not r for values in right.values() for r in values) == 1


def test_tokenizer_knows_every_question_and_gives_answers_back() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(60):
        for task in RICH.tasks:
            question = ask(scene, task, rng) or describe(scene)
            text = question.text[0].upper() + question.text[1:]
            asked = TOKENIZER(text)["input_ids"]
            assert UNKNOWN not in asked
            assert asked == TOKENIZER(question.text)["input_ids"]
            answer = TOKENIZER(question.answer, add_special_tokens=False)["input_ids"]
            assert UNKNOWN not in answer
            assert TOKENIZER.decode(answer) == question.answer


def test_processor_survives_saving(tmp_path: Path) -> None:
    processor = build_processor()
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is written?"}]}]
    prompt = loaded.apply_chat_template(message, add_generation_prompt=True)
    assert prompt == "USER: <image>\nWhat is written? ASSISTANT:"
    image = render(scenes(1)[0])
    one, other = (p(images=image, text=prompt, return_tensors="pt") for p in (processor, loaded))
    assert {name: value.shape for name, value in one.items()} == {n: v.shape for n, v in other.items()}
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (one["input_ids"] == build_config().image_token_id).sum() == build_config().image_seq_length


def test_patches_and_cells() -> None:
    for board in (3, 4, 6):
        side = 12 // board
        assert [patch_cell(p, board) for p in range(144)] == [
            p // 12 // side * board + p % 12 // side for p in range(144)
        ]


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_a_patch_tells_what_it_shows(seed: int) -> None:
    """Where a patch is said to show a color, its pixels are of that color, and nowhere else."""
    rng = np.random.default_rng(seed)
    colors = ("red", "blue", "green", "yellow")  # far from each other and from ink, in any light
    scene = random_scene(rng, replace(RICH, apart=True, radius=(4.3, 5.3), jitter=0.5, text_jitter=0.5))
    scene = replace(scene, objects={c: (s, colors[rng.integers(4)]) for c, (s, _) in scene.objects.items()})
    image, marks = render_with_marks(scene)
    sketch = np.array(sketch_patches(scene, marks))
    pixels = np.asarray(image, dtype=float).reshape(12, 12, 12, 12, 3).swapaxes(1, 2).reshape(144, 144, 3)
    for patch, row in enumerate(sketch):
        assert (row[4], row[5]) == divmod(patch_cell(patch, 6), 6)
        vivid = pixels[patch][np.ptp(pixels[patch], axis=-1) > 75]  # neither ink nor background
        assert (len(vivid) > 30) == (row[1] < NOTHING[1])
        if len(vivid) > 30:
            nearest = min(colors, key=lambda name: np.abs(vivid.mean(axis=0) - COLORS[name]).max())
            assert nearest == list(COLORS)[row[1]]
    for cell, (shape, color) in scene.objects.items():
        here = sketch[[p for p in range(144) if patch_cell(p, 6) == cell]]
        assert [(row[0] < NOTHING[0]) + (row[1] < NOTHING[1]) for row in here].count(1) == 2
        assert SHAPES[here[:, 0].min()] == shape
        assert list(COLORS)[here[:, 1].min()] == color
    for cell, text in scene.texts.items():
        here = sketch[[p for p in range(144) if patch_cell(p, 6) == cell]]
        assert "".join(CHARACTERS[here[:, field].min()] for field in (2, 3)) == text


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=25)
def test_symbols_hold_the_whole_scene(seed: int, apart: bool) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng, replace(RICH, apart=apart))
    rows, patches = sketch_symbols(scene, 64, rng)
    assert len(rows) == len(patches) == 64
    assert patches == sorted(set(patches))
    found: dict[int, set[tuple[int, int]]] = {}
    for row, patch in zip(rows, patches, strict=True):
        cell = patch_cell(patch, 6)
        assert (row[4], row[5]) == divmod(cell, 6)
        told = {(field, value) for field, value in enumerate(row[:4]) if value != NOTHING[field]}
        if apart:
            assert len(told) <= 1
        found[cell] = found.get(cell, set()) | told
    wanted = {
        cell: {(0, SHAPES.index(shape)), (1, list(COLORS).index(color))}
        for cell, (shape, color) in scene.objects.items()
    }
    wanted |= {
        cell: {(2 + place, CHARACTERS.index(c)) for place, c in enumerate(text)}
        for cell, text in scene.texts.items()
    }
    assert {cell: told for cell, told in found.items() if told} == wanted


def test_the_recipe_is_whole() -> None:
    assert set(RECIPE.schedules) == set(RECIPE.scenes) == set(RECIPE.what) == set(NAMES)
    for name, phases in RECIPE.phases.items():
        ends = [phase.until for phase in phases]
        assert ends == sorted(set(ends))
        assert ends[-1] == 1
        for phase in phases:
            assert set(phase.style.weights) == set(RECIPE.world.tasks)
            assert RECIPE.phase(name, phase.until - 1e-6) is phase
        assert RECIPE.phase(name, 1.0) is phases[-1]
        # Every object and every character has a token.
        for phase in phases if name != "joint" else ():
            world = phase.world(RECIPE.world)
            most = max(most for _, most in world.objects.values()) * phase.most + 2 * world.texts[1]
            assert most <= (phase.tokens or RECIPE.symbol_tokens)
    tokens = [phase.tokens or RECIPE.symbol_tokens for phase in RECIPE.phases["symbols"]]
    assert f"boards of {min(tokens)} to {max(tokens)} tokens" in RECIPE.what["symbols"]
    parameters = sum(p.numel() for p in Parts().lvlm.parameters())
    assert 4 * parameters < 24e6
    config = build_config()
    assert config.text_config.num_hidden_layers >= 8
    assert config.vision_config.image_size == 12 * config.vision_config.patch_size


def test_phases_decide_rate_scenes_and_how_colors_are_compared() -> None:
    steps = RECIPE.schedules["symbols"].steps
    stage = build_stage("symbols", Parts(), 0, CPU)
    for phase in RECIPE.phases["symbols"]:
        step = round(phase.until * steps) - 1
        assert stage.rate(step) == phase.rate
        sketches, positions, turns = stage.batch(step)
        assert len(sketches) == len(turns.tasks) == (phase.scenes or RECIPE.scenes["symbols"])
        assert sketches.shape[1] == positions.shape[1] == (phase.tokens or RECIPE.symbol_tokens)
        assert phase.world(RICH).twin_by_place == phase.twin_by_place
    assert build_stage("tower", Parts(), 0, CPU).rate(0) == 1.0


def test_a_stage_stops_and_its_rate_is_multiplied(tmp_path: Path) -> None:
    """At a rate of none, a second step changes nothing: the weights are those of a stage that stops before it."""
    torch.manual_seed(0)
    start, found = Parts().state_dict(), []
    for stop in (1, None):
        parts = Parts()
        parts.load_state_dict(start)
        stage = build_stage("projector", parts, 0, CPU, steps=2, scenes=1)
        before = weights(stage)
        schedule = replace(stage.schedule, stop=stop)
        stage = replace(stage, schedule=schedule, rate=lambda step: float(step == 0))
        run_stage(stage, tmp_path / str(stop), lambda _: None)
        lines = (tmp_path / str(stop) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines] == [stop or 2]
        found.append(weights(stage))
    assert all(torch.equal(found[0][key], found[1][key]) for key in before)
    assert any(not torch.equal(found[0][key], before[key]) for key in before)


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([0.0, 1.0]))
@settings(max_examples=50)
def test_stepping_stones_are_told_right(seed: int, twin_by_place: bool, twins: float) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng, replace(RICH, twin_by_place=twin_by_place))
    question = stepping_stone(scene, rng, twins)
    assert UNKNOWN not in TOKENIZER(f"{question.text} {question.answer}")["input_ids"]
    named = question.text[:-1].split()
    assert (question.task == "twins") == bool(twins)
    if question.task == "shape_of":
        assert [(question.answer, named[-1])] == [t for t in scene.objects.values() if t[1] == named[-1]]
        return
    told = {}
    for part in question.answer.split(" , "):
        row, col, word = part.split()
        told[(int(row) - 1) * scene.board + int(col) - 1] = word
    assert tuple(told) == question.cells == tuple(sorted(told))
    if question.task == "twins":
        place = [int(n) - 1 for word in ("row", "column") for n in re.findall(rf"{word} (\d)", question.text)]
        meant = [
            cell
            for cell, (shape, _) in scene.objects.items()
            if (divmod(cell, scene.board) == tuple(place) if twin_by_place else shape == named[-1])
        ]
        assert len(meant) == 1 or not twin_by_place
        wanted = [{c: s for c, (s, k) in scene.objects.items() if k == scene.objects[m][1]} for m in meant]
        assert told in wanted
    else:
        of_color = {c: s for c, (s, k) in scene.objects.items() if k == named[2]}
        of_shape = {c: k for c, (s, k) in scene.objects.items() if plural(s) == named[2]}
        assert told == (of_color or of_shape)


def test_styles_choose_stones_suffix_and_what_is_described() -> None:
    for share in (0.0, 1.0):
        rng = np.random.default_rng(0)
        style = TurnStyle(ALL_ALIKE, bare=share, texts=bool(share), stones=0.3, twins=share)
        for scene in scenes(4):
            first, *others = draw_questions(scene, style, rng)
            assert first == describe(scene, texts=bool(share))
            assert all((text in first.answer) == bool(share) for text in scene.texts.values())
            asked = [question for question in others if question.task in RICH.tasks]
            stones = {question.task for question in others} - set(RICH.tasks)
            assert asked
            assert all(question.text.endswith(RICH.suffix) == (not share) for question in asked)
            assert stones <= ({"twins"} if share else {"list", "shape_of"})


def test_attention_in_float32_is_the_same_attention(parts: Parts) -> None:
    rng, boards = np.random.default_rng(1), scenes(1)
    style = TurnStyle(ALL_ALIKE, per_scene=3)
    turns = pack([draw_questions(boards[0], style, rng)], style, rng)
    visual = torch.randn(1, 9, parts.decoder.embed_tokens.weight.shape[1])
    with torch.no_grad():
        plain = turn_logits(parts, visual, torch.arange(9)[None], turns)
        with attention_in_float32(parts.decoder):
            assert parts.decoder.config._attn_implementation != "sdpa"
            other = turn_logits(parts, visual, torch.arange(9)[None], turns)
    assert parts.decoder.config._attn_implementation == "sdpa"
    torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-5)


def weights(stage: Stage) -> dict[str, Tensor]:
    return {f"{n}.{k}": v.clone() for n, m in stage.trained.items() for k, v in m.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_stage_ends_at_the_same_weights(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = Parts().state_dict()

    def trained(folder: Path, *stops: int | None) -> dict[str, Tensor]:
        for stop in stops:
            parts = Parts()  # as in a new process: what was learned comes from the checkpoint alone
            parts.load_state_dict(start)
            stage = build_stage(name, parts, 0, CPU, steps=2, scenes=2)
            run_stage(stage, folder, lambda _: None, stop_at=stop)
        return weights(stage)

    stage_start = Parts()
    stage_start.load_state_dict(start)
    before = weights(build_stage(name, stage_start, 0, CPU, steps=2, scenes=2))
    straight, resumed = trained(tmp_path / "a", None), trained(tmp_path / "b", 1, None)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert any(not torch.equal(straight[key], before[key]) for key in straight)
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_batches_drawn_by_other_processes_are_the_same(tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        torch.manual_seed(0)
        parts = Parts()
        stage = build_stage("symbols", parts, 0, CPU, steps=3, scenes=1)
        run_stage(stage, tmp_path / str(workers), lambda _: None, workers=workers)
        found.append(weights(stage))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    parts = Parts()
    stage = build_stage("projector", parts, 0, CPU, steps=2, scenes=1)
    run_stage(stage, tmp_path, lambda _: None, stop_at=1)
    with pytest.raises(SystemExit, match="was made with other settings"):
        run_stage(build_stage("projector", parts, 0, CPU, steps=3, scenes=1), tmp_path, lambda _: None)


def test_schedule() -> None:
    schedule = Schedule(steps=100, muon=1, adamw=1, warmup=10, tail=0.4)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:60] == [1.0] * 51
    assert rates[80] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.03


def test_wilson_interval() -> None:
    low, high = wilson(95, 100)
    assert (low, high) == (pytest.approx(0.8882, abs=1e-4), pytest.approx(0.9785, abs=1e-4))
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_model_card_says_what_was_measured() -> None:
    log = [{"stage": name, "step": 1, "seconds": 60.0, "accuracy": {}} for name in NAMES]
    result = {"n": 10, "accuracy": 0.9, "low": 0.6, "high": 0.98, "blank": 0.125, "majority": 0.25}
    facts = {
        "accuracy": dict.fromkeys(RECIPE.world.tasks, result),
        "seed": 7,
        "machine": "a CPU",
        "n_parameters": 5_000_000,
        "profile": ["No sinks."],
    }
    card = model_card(log, facts)
    assert "| read_at | 10 | 0.900 | 0.600-0.980 | 0.125 | 0.250 |\n| relation | 10 |" in card
    assert "Mean of the 6 plain tasks" in card
    assert "12-pixel patches, 144 x 144 images" in card
    assert "| `tower` |" in card
    assert "seed 7, a CPU; 5 minutes in all" in card
    assert "- No sinks.\n" in card
    assert "\n## Known limits\n\n- " in card
    assert "{" not in card

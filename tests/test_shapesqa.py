"""ShapesQA: exact answers, disjoint splits, and shipped folders that come out of the generator again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from capa_probe.demo import demo_data_path
from capa_probe.demo.dataset import SHIPPED_IMAGES, SPLITS, exercises, split_rng, write_folder
from capa_probe.demo.questions import DIRECTIONS, MAIN_TASKS, PHRASINGS, TASKS, ask, describe, words
from capa_probe.demo.scenes import (
    BOARD,
    CELL,
    CHARACTERS,
    COLORS,
    IMAGE_SIZE,
    PLACES,
    SHAPES,
    Scene,
    blank_image,
    random_scene,
    render,
)
from capa_probe.errors import CapaProbeError
from capa_probe.samples import load_samples

SEEDS = st.integers(0, 2**31 - 1)


def solve(scene: Scene, task: str, text: str) -> str:
    """The answer, worked out from the words of the question."""
    asked = text.rstrip("?.").replace(" an ", " a ").split()
    board = [[scene.objects.get(BOARD * row + col) for col in range(BOARD)] for row in range(BOARD)]
    objects = [thing for line in board for thing in line if thing]
    shape = next((word for word in reversed(asked) if word in SHAPES), None)
    color = next((word for word in asked if word in COLORS), None)
    place = next((word for word in asked if word in PLACES), None)
    if task == "existence":
        return "yes" if any(s == shape and color in (c, None) for s, c in objects) else "no"
    if task == "color":
        (found,) = [c for s, c in objects if s == shape]
        return found
    if task in ("shape_at", "color_at"):
        thing = board[PLACES.index(place) // BOARD][PLACES.index(place) % BOARD]
        assert thing is not None
        return thing[task == "color_at"]
    if task == "count":
        return str(len(objects))
    if task == "read":
        return scene.text
    ((row, col),) = [
        (r, c) for r in range(BOARD) for c in range(BOARD) if board[r][c] and board[r][c][0] == shape
    ]
    down, right = DIRECTIONS[next(word for word in asked if word in DIRECTIONS)]
    return board[row + down][col + right][1]


@given(SEEDS, st.sampled_from(TASKS), st.sampled_from([0.0, 1.0]))
def test_answers_are_those_found_by_looking_at_the_board(seed: int, task: str, easy: float) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    if question := ask(scene, task, rng, easy):
        assert question.task == task
        assert question.answer == solve(scene, task, question.text)
        assert set(question.text.rstrip("?.").split()) <= set(words())


@given(SEEDS)
def test_scenes(seed: int) -> None:
    scene = random_scene(np.random.default_rng(seed))
    assert 2 <= len(scene.objects) <= 6
    assert scene.text_cell not in scene.objects
    assert len(scene.text) == 2
    assert set(scene.text) <= set(CHARACTERS)
    assert describe(scene).answer.count(",") == len(scene.objects) - 1


def test_a_scene_always_gives_the_same_pixels_and_another_seed_others() -> None:
    scene = random_scene(np.random.default_rng(5))
    other = Scene(scene.objects, scene.text, scene.text_cell, scene.seed + 1)
    assert render(scene).size == (IMAGE_SIZE, IMAGE_SIZE)
    assert np.array_equal(render(scene), render(scene))
    assert not np.array_equal(render(scene), render(other))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_where_they_are_said_to_be_in_their_color(shape: str) -> None:
    scene = Scene({8: (shape, "blue")}, "AB", 0, seed=3)
    pixels = np.asarray(render(scene), dtype=float)
    blue = np.abs(pixels - COLORS["blue"]).max(axis=-1) < 60
    rows, cols = np.nonzero(blue)
    assert 30 < len(rows) < CELL**2
    assert (rows // CELL == 2).mean() > 0.98
    assert (cols // CELL == 2).mean() > 0.98


def test_shapes_look_different() -> None:
    masks = []
    for shape in SHAPES:
        pixels = np.asarray(render(Scene({4: (shape, "black")}, "AB", 0, seed=7)), dtype=float)
        masks.append(pixels[CELL : 2 * CELL, CELL : 2 * CELL].max(axis=-1) < 120)
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert (one ^ other).sum() > 20


def test_half_of_existence_questions_are_true_and_most_false_ones_are_hard() -> None:
    rng = np.random.default_rng(0)
    right_color_wrong_shape = n_no = n_yes = 0
    for _ in range(2000):
        scene = random_scene(rng)
        question = ask(scene, "existence", rng)
        assert question
        color = next(word for word in question.text.split() if word in COLORS)
        n_yes += question.answer == "yes"
        if question.answer == "no":
            n_no += 1
            right_color_wrong_shape += color in {c for _, c in scene.objects.values()}
    assert 0.45 < n_yes / 2000 < 0.55
    assert right_color_wrong_shape == n_no


def test_phrasings() -> None:
    assert set(PHRASINGS) == set(TASKS)
    assert all(len(set(phrases)) >= 3 for phrases in PHRASINGS.values())


def test_splits_share_no_scene() -> None:
    seeds = {split: {exercise.scene.seed for exercise in exercises(split, 100)} for split in SPLITS}
    streams = [
        split_rng(split, *index).integers(2**62) for split in SPLITS for index in [(0,), (1,), (0, 1, 2)]
    ]
    assert len(set.union(*seeds.values())) == sum(len(s) for s in seeds.values())
    assert len(set(streams)) == len(streams)


@pytest.mark.parametrize(("split", "at_least"), [("calibration", 200), ("test", 600)])
def test_shipped_questions(split: str, at_least: int) -> None:
    samples = load_samples(demo_data_path(split))
    tasks = Counter(sample.task for sample in samples)
    assert sum(tasks[task] for task in MAIN_TASKS) + tasks["relation"] == len(samples)
    assert sum(tasks[task] for task in MAIN_TASKS) >= at_least or split == "calibration"
    assert len(samples) >= at_least
    assert len(set(tasks.values())) == 1
    assert len({sample.images for sample in samples}) == SHIPPED_IMAGES[split]
    yes = Counter(sample.answers for sample in samples if sample.task == "existence")
    assert abs(yes["yes",] - yes["no",]) <= 1


@pytest.mark.parametrize("split", SHIPPED_IMAGES)
def test_shipped_folders_come_out_of_the_generator_again(split: str, tmp_path: Path) -> None:
    shipped = demo_data_path(split)
    write_folder(split, tmp_path)
    assert (tmp_path / "samples.jsonl").read_bytes() == (shipped / "samples.jsonl").read_bytes()
    names = sorted(path.name for path in (shipped / "images").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "images").iterdir())
    for name in names:  # pixels: the bytes of a PNG depend on the version of zlib
        with Image.open(shipped / "images" / name) as one, Image.open(tmp_path / "images" / name) as other:
            assert np.array_equal(one, other), name


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CapaProbeError, match="split='dev' was given"):
        write_folder("dev", tmp_path, 1)
    with pytest.raises(CapaProbeError, match="n_images is missing for split 'validation'"):
        write_folder("validation", tmp_path)
    with pytest.raises(CapaProbeError, match="split='train' was given"):
        demo_data_path("train")


def test_an_installed_package_finds_its_own_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capa_probe.demo.locate._CHECKOUT", tmp_path / "nowhere")
    monkeypatch.setattr("capa_probe.demo.locate._INSTALLED", tmp_path / "_data")
    with pytest.raises(CapaProbeError, match="shapesqa/test lies neither in .*nowhere nor in .*_data"):
        demo_data_path()
    write_folder("test", tmp_path / "_data" / "shapesqa" / "test", 1)
    assert demo_data_path() == tmp_path / "_data" / "shapesqa" / "test"


def test_a_small_folder(tmp_path: Path) -> None:
    assert write_folder("validation", tmp_path, 7) == 21
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert Counter(line["task"] for line in lines) == dict.fromkeys(TASKS, 3)
    assert np.asarray(blank_image()).std() == 0

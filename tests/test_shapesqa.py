"""ShapesQA: exact answers, disjoint splits, and shipped folders that come out of the generator again."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from capa_probe.demo import demo_data_path
from capa_probe.demo.dataset import (
    SHIPPED_IMAGES,
    SPLITS,
    exercises,
    majority_baseline,
    split_rng,
    write_folder,
)
from capa_probe.demo.drawing import blank_image, render, render_with_marks
from capa_probe.demo.questions import ask, describe, words
from capa_probe.demo.scenes import Scene, random_scene
from capa_probe.demo.worlds import CHARACTERS, COLORS, RICH, SHAPES, SMALL, TWO_HOP, WORLDS, World
from capa_probe.errors import CapaProbeError
from capa_probe.samples import load_samples
from tests.shapesqa_solver import solve

SEEDS = st.integers(0, 2**31 - 1)
#: Every board, every option of drawing, every task.
MIXED = replace(
    RICH,
    name="mixed",
    objects={3: (2, 6), 4: (5, 12), 5: (5, 16), 6: (8, 16)},
    texts=(1, 3),
    twin_by_place=False,
    grid=False,
)
APART = replace(RICH, name="apart", apart=True, radius=(4.3, 5.3), jitter=0.5, text_jitter=0.5)
ALL_WORLDS = [SMALL, RICH, MIXED, APART]


@given(
    SEEDS, st.sampled_from([(w, task) for w in ALL_WORLDS for task in w.tasks]), st.sampled_from([0.0, 1.0])
)
def test_answers_are_those_found_by_looking_at_the_board(
    seed: int, world_and_task: tuple[World, str], easy: float
) -> None:
    world, task = world_and_task
    rng = np.random.default_rng(seed)
    scene = random_scene(rng, world)
    if question := ask(scene, task, rng, easy):
        assert question.task == task
        answer, cells = solve(scene, question.text)
        assert question.answer == answer
        assert {divmod(cell, scene.board) for cell in question.cells} == cells
        assert len(set(question.cells)) == len(question.cells)
        for mark in "?.,":
            assert mark not in question.answer
        asked = question.text.replace(",", " ").replace("?", " ").replace(".", " ").split()
        assert set(asked) <= set(words(world))
        assert question.text.endswith(world.suffix)


@pytest.mark.parametrize("world", ALL_WORLDS, ids=lambda world: world.name)
def test_every_task_is_asked_in_every_way(world: World) -> None:
    rng = np.random.default_rng(0)
    found: dict[str, set[str]] = {task: set() for task in world.tasks}
    for _ in range(250):
        scene = random_scene(rng, world)
        for task in world.tasks:
            if question := ask(scene, task, rng):
                found[task].add(question.text.split()[0] + question.text.split()[1])
    for task, ways in found.items():
        assert ways == {"".join(phrase.format_map(_Empty()).split()[:2]) for phrase in world.phrasings[task]}


class _Empty(dict[str, str]):
    """Leaves every slot as it is found in the first two words of no phrasing but "count the {k}"."""

    def __missing__(self, key: str) -> str:
        return "?"


@given(SEEDS, st.sampled_from(ALL_WORLDS))
def test_scenes(seed: int, world: World) -> None:
    scene = random_scene(np.random.default_rng(seed), world)
    fewest, most = world.objects[scene.board]
    assert fewest <= len(scene.objects) <= most
    assert world.texts[0] <= len(scene.texts) <= world.texts[1]
    assert not set(scene.texts) & set(scene.objects)
    assert set(scene.texts) | set(scene.objects) <= set(range(scene.board**2))
    for text in scene.texts.values():
        assert len(text) == 2
        assert set(text) <= set(CHARACTERS)
    answer = describe(scene).answer
    assert sum(answer.count(shape) for shape in SHAPES) == len(scene.objects)


@pytest.mark.parametrize("world", ALL_WORLDS, ids=lambda world: world.name)
def test_a_scene_always_gives_the_same_pixels_and_another_seed_others(world: World) -> None:
    scene = random_scene(np.random.default_rng(5), world)
    other = replace(scene, seed=scene.seed + 1)
    assert render(scene).size == (world.image_size, world.image_size) == blank_image(world).size
    assert np.array_equal(render(scene), render(scene))
    assert not np.array_equal(render(scene), render(other))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("world", [SMALL, RICH, replace(RICH, objects={5: (5, 16)})])
def test_shapes_are_where_they_are_said_to_be_in_their_color(shape: str, world: World) -> None:
    board = world.largest_board
    cell = board**2 - 1
    scene = Scene({cell: (shape, "blue")}, {0: "AB"}, seed=3, board=board, world=world)
    assert_blue_lies_in(scene, cell)


def assert_blue_lies_in(scene: Scene, cell: int) -> None:
    pixels = np.asarray(render(scene), dtype=float)
    rows, cols = np.nonzero(np.abs(pixels - COLORS["blue"]).max(axis=-1) < 60)
    left, top, right, bottom = scene.cell_box(cell)
    assert 20 < len(rows) < (right - left) * (bottom - top)
    assert ((top <= rows) & (rows < bottom)).mean() > 0.98
    assert ((left <= cols) & (cols < right)).mean() > 0.98


@given(SEEDS)
def test_apart_a_shape_and_its_color_touch_inside_their_cell_and_share_no_patch(seed: int) -> None:
    scene = random_scene(np.random.default_rng(seed), APART)
    _, marks = render_with_marks(scene)
    assert Counter(mark.shows for mark in marks) == {
        ("shape",): len(scene.objects),
        ("color",): len(scene.objects),
        ("text",): len(scene.texts),
    }
    for cell in scene.objects:
        shape, color = sorted((m for m in marks if m.cell == cell), key=lambda m: m.shows, reverse=True)
        left, top, right, bottom = scene.cell_box(cell)
        for mark in (shape, color):
            assert left - 1 < mark.x - mark.reach[0]
            assert mark.x + mark.reach[0] < right + 1
            assert top - 1 < mark.y - mark.reach[1]
            assert mark.y + mark.reach[1] < bottom + 1
        assert sorted((abs(shape.x - color.x), abs(shape.y - color.y))) == pytest.approx([0, 12])
        assert (shape.x // 12, shape.y // 12) != (color.x // 12, color.y // 12)
    assert_blue_lies_in(replace(scene, objects={14: ("star", "blue")}), 14)


def test_cells_tile_the_image() -> None:
    for world in ALL_WORLDS:
        for board in world.objects:
            scene = Scene({}, {}, 0, board, world)
            covered = np.zeros((world.image_size, world.image_size), dtype=int)
            for cell in range(board**2):
                left, top, right, bottom = scene.cell_box(cell)
                covered[top:bottom, left:right] += 1
            assert (covered == 1).all()


@pytest.mark.parametrize("world", [SMALL, RICH, APART], ids=lambda world: world.name)
def test_shapes_look_different(world: World) -> None:
    masks = []
    for shape in SHAPES:
        scene = Scene(
            {4: (shape, "cyan" if world.apart else "black")}, {}, seed=7, world=replace(world, grid=False)
        )
        masks.append(np.asarray(render(scene), dtype=float).max(axis=-1) < 120)
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert (one ^ other).sum() > (20 if world is SMALL else 6)


def test_half_of_existence_questions_are_true_and_most_false_ones_are_hard() -> None:
    rng = np.random.default_rng(0)
    right_color_wrong_shape = n_no = n_yes = 0
    for _ in range(2000):
        scene = random_scene(rng, SMALL)
        question = ask(scene, "existence", rng)
        assert question
        color = next(word for word in question.text.split() if word in COLORS)
        n_yes += question.answer == "yes"
        if question.answer == "no":
            n_no += 1
            right_color_wrong_shape += color in {c for _, c in scene.objects.values()}
    assert 0.45 < n_yes / 2000 < 0.55
    assert right_color_wrong_shape == n_no


def test_most_references_need_both_color_and_shape() -> None:
    rng = np.random.default_rng(0)
    both = n = 0
    for _ in range(400):
        scene = random_scene(rng, RICH)
        if question := ask(scene, "relation", rng):
            shape, color = scene.objects[question.cells[0]]
            shapes, colors = zip(*scene.objects.values(), strict=True)
            n += 1
            both += shapes.count(shape) > 1 and colors.count(color) > 1
    assert n > 300
    assert both / n > 0.7


def test_answers_are_balanced() -> None:
    """No answer of a task is much more frequent than it must be."""
    answers: dict[str, Counter[str]] = {task: Counter() for task in RICH.tasks}
    for exercise in exercises("validation", 390, RICH):
        for question in exercise.questions:
            answers[question.task][question.answer] += 1
    majority = {task: counts.most_common(1)[0][1] / counts.total() for task, counts in answers.items()}
    assert {counts.total() for counts in answers.values()} == {180}
    for task in ("existence", "comparison"):
        assert majority[task] == 0.5
    for task in ("count_kind", "count_where"):
        assert majority[task] < 0.4
    for task in ("color", "shape_at", "color_at", "relation", "relation_shape", "same_color"):
        assert majority[task] < 0.25
    assert majority["chain"] < 0.25
    for task in ("read_at", "read_next"):
        assert majority[task] < 0.05


def test_the_page_shows_every_task_and_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "shapesqa.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| (.+?) \| [\w ]+ \|$", page, re.MULTILINE)
    assert [task for task, *_ in rows] == list(dict.fromkeys(task for task, *_ in rows))
    where = {
        task: {
            (True, True): "both",
            (True, False): "small",
            (False, True): "rich",
            (False, False): "on request",
        }[task in SMALL.tasks, task in RICH.tasks]
        for task in {*SMALL.tasks, *RICH.tasks}
    }
    assert {task: place for task, place, _ in rows} == where
    known = set(words(SMALL)) | set(words(RICH))
    for _, _, example in rows:
        assert set(re.sub(r"[?,.]", "", example.lower()).split()) <= known
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(code, namespace)
    assert len(load_samples("more-shapes")) == 60
    assert {sample.task for sample in load_samples("harder-shapes")} == {"relation", "chain"}


def test_worlds() -> None:
    for world in ALL_WORLDS:
        assert set(world.tasks) <= set(world.phrasings)
        assert all(len(set(phrases)) >= 3 for phrases in world.phrasings.values())
        assert (*world.plain_tasks, *world.two_hop_tasks) == world.tasks
        assert set(world.two_hop_tasks) <= set(TWO_HOP)
    assert WORLDS == {"small": SMALL, "rich": RICH}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objects": {7: (1, 2)}}, r"objects=\{7: \(1, 2\)\} was given for world 'rich'; boards have 3 to 6"),
        ({"objects": {3: (2, 8)}}, "4 cells must be left for texts"),
        ({"objects": {6: (2, 17)}}, "up to 16 objects"),
        ({"objects": {}}, "world 'rich' has no board"),
        ({"long_places": False}, "only the cells of a 3 x 3 board have names of one word"),
        ({"tasks": ("color", "smell")}, "world 'rich' has no phrasing for smell"),
    ],
)
def test_worlds_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CapaProbeError, match=message):
        replace(RICH, **changes)


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
    assert set(tasks) == set(RICH.tasks)
    assert sum(tasks[task] for task in RICH.plain_tasks) >= at_least or split == "calibration"
    assert len(samples) >= at_least
    assert len(set(tasks.values())) == 1
    assert len({sample.images for sample in samples}) == SHIPPED_IMAGES["rich"][split]
    yes = Counter(sample.answers for sample in samples if sample.task == "existence")
    assert abs(yes["yes",] - yes["no",]) <= 1


@pytest.mark.parametrize("split", SHIPPED_IMAGES["rich"])
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
    with pytest.raises(CapaProbeError, match="n_images is missing for split 'validation' of world 'rich'"):
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


@pytest.mark.parametrize(
    ("world", "n_images", "each"),
    [(SMALL, 7, 3), (RICH, 13, 6), (replace(RICH, objects={4: (6, 12)}), 13, 6)],
)
def test_a_small_folder(world: World, n_images: int, each: int, tmp_path: Path) -> None:
    assert write_folder("validation", tmp_path, n_images, world) == n_images * world.questions_per_image
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert Counter(line["task"] for line in lines) == dict.fromkeys(world.tasks, each)
    assert all(line["question"][0].isupper() for line in lines)
    if world.suffix:
        assert all(line["question"].endswith(" Answer briefly.") for line in lines)
    assert np.asarray(blank_image(world)).std() == 0


def test_regions_are_the_cells_asked_for(tmp_path: Path) -> None:
    write_folder("validation", tmp_path, 6, MIXED)
    samples = load_samples(tmp_path)
    asked = [
        (exercise.scene, question)
        for exercise in exercises("validation", 6, MIXED)
        for question in exercise.questions
    ]
    for sample, (scene, question) in zip(samples, asked, strict=True):
        assert sample.regions is not None
        (boxes,) = sample.regions
        assert boxes == tuple(scene.cell_box(cell) for cell in question.cells)
    assert any(len(sample.regions[0]) > 1 for sample in samples if sample.regions)


def test_the_majority_baseline() -> None:
    samples = load_samples(demo_data_path("test"))
    baseline = majority_baseline(samples)
    assert set(baseline) == set(RICH.tasks)
    assert baseline["existence"][1] == 0.5
    for task, (answer, accuracy) in baseline.items():
        chosen = [sample for sample in samples if sample.task == task]
        assert accuracy == sum(answer in sample.answers for sample in chosen) / len(chosen)
        assert accuracy >= max(Counter(sample.answers for sample in chosen).values()) / len(chosen)

"""ShapesQA splits as data folders: images, and ``samples.jsonl`` beside them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from capa_probe.demo.drawing import render
from capa_probe.demo.questions import Question, ask
from capa_probe.demo.scenes import Scene, random_scene
from capa_probe.demo.worlds import RICH, World
from capa_probe.errors import CapaProbeError
from capa_probe.samples import SAMPLES_FILE, Sample

#: The first number of every seed, so that no two splits share a random stream.
SPLITS = {"train": 0, "calibration": 1, "validation": 2, "test": 3}
#: World -> images of the splits that are written by default: over 100 test and 30 calibration questions for each task.
SHIPPED_IMAGES = {"small": {"calibration": 70, "test": 245}, "rich": {"calibration": 65, "test": 260}}
_YES_OR_NO = ("existence", "comparison")


@dataclass(frozen=True)
class Exercise:
    """One scene and its questions."""

    scene: Scene
    questions: tuple[Question, ...]


def split_rng(split: str, *index: int) -> np.random.Generator:
    """The random stream of one place in a split.

    Raises:
        CapaProbeError: there is no such split.
    """
    if split not in SPLITS:
        raise CapaProbeError(f"split={split!r} was given; give one of {', '.join(SPLITS)}.")
    return np.random.default_rng([SPLITS[split], *index])


def exercises(split: str, n_images: int, world: World = RICH) -> Iterator[Exercise]:
    """The first images of a split and their questions.

    They go round the tasks, so that all come equally often, and questions of yes or no are answered by them in turn.
    """
    turns = {task: cycle(("yes", "no")) for task in _YES_OR_NO}
    n = len(world.tasks)
    per_image = min(n, world.questions_per_image)
    for i in range(n_images):
        tasks = [world.tasks[(per_image * i + k) % n] for k in range(per_image)]
        wanted = {task: next(turns[task]) for task in _YES_OR_NO if task in tasks}
        rng = split_rng(split, i)
        while True:  # until the scene offers them all
            scene = random_scene(rng, world)
            questions = [question for task in tasks if (question := ask(scene, task, rng))]
            answers = {question.task: question.answer for question in questions}
            if len(questions) == len(tasks) and wanted.items() <= answers.items():
                break
        yield Exercise(scene, tuple(questions))


def write_folder(split: str, folder: Path | str, n_images: int | None = None, world: World = RICH) -> int:
    """Write a split as a data folder: ``images/*.png`` and ``samples.jsonl``.

    Args:
        split: one of ``SPLITS``.
        folder: made if missing.
        n_images: by default those of :data:`SHIPPED_IMAGES`.
        world: what is drawn and asked.

    Returns:
        The number of questions.

    Raises:
        CapaProbeError: there is no such split, or ``n_images`` is missing for one that is not shipped.
    """
    n_images = n_images or SHIPPED_IMAGES.get(world.name, {}).get(split)
    if n_images is None:
        raise CapaProbeError(
            f"n_images is missing for split {split!r} of world {world.name!r}; give a number of images."
        )
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, exercise in enumerate(exercises(split, n_images, world)):
        name = f"images/{i:04d}.png"
        render(exercise.scene).save(folder / name, optimize=True)
        for question in exercise.questions:
            record = {
                "id": f"{split}-{i:04d}-{question.task}",
                "image": name,
                "question": _as_sentences(question.text),
                "answers": [question.answer],
                "task": question.task,
                "regions": [[exercise.scene.cell_box(cell) for cell in question.cells]],
            }
            lines.append(json.dumps(record))
    # The list comes last, under its name only when all images are there.
    temporary = folder / f"{SAMPLES_FILE}.tmp"
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(folder / SAMPLES_FILE)
    return len(lines)


def majority_baseline(samples: Sequence[Sample]) -> Mapping[str, tuple[str, float]]:
    """For each task, its most frequent answer and the accuracy of always giving it.

    Args:
        samples: with a task and one answer each.
    """
    answers: dict[str, Counter[str]] = {}
    for sample in samples:
        answers.setdefault(sample.task or "", Counter()).update(sample.answers[:1])
    best = {task: counts.most_common(1)[0] for task, counts in answers.items()}
    return {task: (answer, n / answers[task].total()) for task, (answer, n) in best.items()}


def _as_sentences(text: str) -> str:
    """With a capital at the beginning, and after a mark that closes a sentence."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if i == 0 or words[i - 1].endswith(("?", ".")):
            words[i] = word[0].upper() + word[1:]
    return " ".join(words)

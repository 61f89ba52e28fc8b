"""ShapesQA splits, and the data folders that are shipped: images, and ``samples.jsonl`` beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from capa_probe.demo.questions import TASKS, Question, ask
from capa_probe.demo.scenes import Scene, random_scene, render
from capa_probe.errors import CapaProbeError
from capa_probe.samples import SAMPLES_FILE

#: The first number of every seed, so that no two splits share a random stream.
SPLITS = {"train": 0, "calibration": 1, "validation": 2, "test": 3}
QUESTIONS_PER_IMAGE = 3
#: Images of the splits that are shipped: 105 test and 30 calibration questions for each of the seven tasks.
SHIPPED_IMAGES = {"calibration": 70, "test": 245}


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


def exercises(split: str, n_images: int) -> Iterator[Exercise]:
    """The first images of a split, three questions each.

    They go round the tasks, so that all come equally often, and existence is answered by yes and no in turn.
    """
    yes_or_no = cycle(("yes", "no"))
    for i in range(n_images):
        tasks = [TASKS[(QUESTIONS_PER_IMAGE * i + k) % len(TASKS)] for k in range(QUESTIONS_PER_IMAGE)]
        rng, existence = split_rng(split, i), next(yes_or_no) if "existence" in tasks else None
        while True:  # until the scene offers all three
            scene = random_scene(rng)
            questions = [question for task in tasks if (question := ask(scene, task, rng))]
            answers = {question.task: question.answer for question in questions}
            if len(questions) == len(tasks) and answers.get("existence") == existence:
                break
        yield Exercise(scene, tuple(questions))


def write_folder(split: str, folder: Path, n_images: int | None = None) -> int:
    """Write a split as a data folder: ``images/*.png`` and ``samples.jsonl``.

    Args:
        split: one of ``SPLITS``.
        folder: made if missing.
        n_images: by default as many as are shipped.

    Returns:
        The number of questions.

    Raises:
        CapaProbeError: there is no such split, or ``n_images`` is missing for one that is not shipped.
    """
    if n_images is None and split not in SHIPPED_IMAGES:
        raise CapaProbeError(f"n_images is missing for split {split!r}; give a number of images.")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, exercise in enumerate(exercises(split, n_images or SHIPPED_IMAGES[split])):
        name = f"images/{i:04d}.png"
        render(exercise.scene).save(folder / name, optimize=True)
        for question in exercise.questions:
            record = {
                "id": f"{split}-{i:04d}-{question.task}",
                "image": name,
                "question": question.text[0].upper() + question.text[1:],
                "answers": [question.answer],
                "task": question.task,
            }
            lines.append(json.dumps(record))
    # The list comes last, under its name only when all images are there.
    temporary = folder / f"{SAMPLES_FILE}.tmp"
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(folder / SAMPLES_FILE)
    return len(lines)

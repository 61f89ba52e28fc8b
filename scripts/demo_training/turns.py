"""Many questions about one image in one sequence, none of which sees another.

A turn sees what comes before all turns (BOS, ``USER:`` and the image) and itself, and its positions start anew after
the image. So its logits are those of the question asked alone; without the mask the model learns to read answers
off earlier turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from capa_probe.demo.questions import Question, ask, describe
from capa_probe.demo.scenes import Scene
from demo_training.stones import stepping_stone
from demo_training.vocabulary import ASSISTANT, EOS, N_PATCHES, build_tokenizer

#: Positions before the first token of a turn: BOS, USER: and the patches.
PREFIX_LENGTH = 2 + N_PATCHES
IGNORED = -100


@dataclass(frozen=True)
class TurnStyle:
    """What turns a batch is made of.

    Attributes:
        weights: how often each task comes, relative to the others.
        template: share of the questions in prompt form, closed by ``ASSISTANT:``; the others end on their last word,
            which is often what must be looked up and so is learned faster.
        mark: share of the closed questions that keep their closing mark.
        per_scene: turns for each scene.
        described: whether the first of them describes the whole scene; ``texts``: with what is printed on it.
        easy: share of the existence questions that name a shape only.
        bare: share of the questions without the suffix that closes the world's prompts, so that most end on what must
            be looked up.
        stones: share of stepping stones (see :mod:`demo_training.stones`) among the turns.
        twins: share of those among them that list the shapes in the color of an object.
    """

    weights: dict[str, float]
    template: float = 1.0
    mark: float = 0.6
    per_scene: int = 10
    described: bool = True
    easy: float = 0.3
    bare: float = 0.0
    texts: bool = False
    stones: float = 0.0
    twins: float = 0.0


@dataclass(frozen=True)
class PackedTurns:
    """Turns of a batch, one row per scene.

    Attributes:
        ids: (batch, position) token ids; padding is 0.
        labels: (batch, position) the token to predict there, or ``IGNORED``.
        turn: (batch, position) number of the turn from 1, or -1 at padding.
        positions: (batch, position) position ids.
        tasks: for each scene, the tasks of its turns.
    """

    ids: Tensor
    labels: Tensor
    turn: Tensor
    positions: Tensor
    tasks: list[list[str]]

    def mask(self, n_prefix: int) -> Tensor:
        """(batch, 1, query, key): True where a query may look, prefix included."""
        batch, length = self.turn.shape
        turn = torch.cat([torch.zeros(batch, n_prefix, dtype=self.turn.dtype), self.turn], dim=1)
        causal = torch.ones(n_prefix + length, n_prefix + length, dtype=torch.bool).tril()
        visible = (turn[:, None, :] == 0) | (turn[:, None, :] == turn[:, :, None])
        return (causal & visible)[:, None]


def draw_questions(scene: Scene, style: TurnStyle, rng: np.random.Generator) -> list[Question]:
    questions = [describe(scene, style.texts)] if style.described else []
    tasks = scene.world.tasks
    weights = np.array([style.weights[task] for task in tasks])
    while len(questions) < style.per_scene:
        if style.stones and rng.random() < style.stones:
            questions.append(stepping_stone(scene, rng, style.twins))
            continue
        task = tasks[rng.choice(len(tasks), p=weights / weights.sum())]
        if question := ask(scene, task, rng, style.easy):
            if style.bare and rng.random() < style.bare:
                question = replace(question, text=question.text.removesuffix(scene.world.suffix).rstrip())
            questions.append(question)
    return questions


def pack(
    scenes: list[list[Question]],
    style: TurnStyle,
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> PackedTurns:
    """Put each scene's questions, with their answers, into one row."""
    tokenizer = tokenizer or build_tokenizer()
    rows = [[_written(question, style, rng) for question in questions] for questions in scenes]
    flat = [text for row in rows for pair in row for text in pair]
    encoded = iter(tokenizer(flat, add_special_tokens=False)["input_ids"])
    turns = [[(next(encoded), [*next(encoded), EOS]) for _ in row] for row in rows]

    length = max(sum(len(q) + len(a) for q, a in row) for row in turns)
    ids = torch.zeros(len(turns), length, dtype=torch.long)
    labels = torch.full((len(turns), length), IGNORED)
    number = torch.full((len(turns), length), -1)
    positions = torch.zeros(len(turns), length, dtype=torch.long)
    for b, row in enumerate(turns):
        start = 0
        for t, (question, answer) in enumerate(row):
            here = slice(start, start + len(question) + len(answer))
            ids[b, here] = torch.tensor(question + answer)
            # The token before each answer token predicts it.
            labels[b, start + len(question) - 1 : here.stop - 1] = torch.tensor(answer)
            number[b, here] = t + 1
            positions[b, here] = PREFIX_LENGTH + torch.arange(len(question) + len(answer))
            start = here.stop
    return PackedTurns(ids, labels, number, positions, [[q.task for q in questions] for questions in scenes])


def right_by_task(logits: Tensor, turns: PackedTurns) -> dict[str, list[bool]]:
    """For each task, whether each of its turns has every answer token right."""
    wrong = (logits.argmax(dim=-1) != turns.labels) & (turns.labels != IGNORED)
    found: dict[str, list[bool]] = {}
    for b, tasks in enumerate(turns.tasks):
        failed = set(turns.turn[b][wrong[b]].tolist())
        for t, task in enumerate(tasks):
            found.setdefault(task, []).append(t + 1 not in failed)
    return found


def _written(question: Question, style: TurnStyle, rng: np.random.Generator) -> tuple[str, str]:
    text = question.text
    closed = rng.random() < style.template
    if not closed or rng.random() >= style.mark:
        text = text[:-1]
    return f"{text} {ASSISTANT}" if closed else text, question.answer

"""Examples: a few samples of a run, kept with their images and the model's own answers for those who read it later.

Tables hold no images and no words, and a report runs no model. So a run keeps, in its folder::

    examples/examples.jsonl   one line per example: question, prompt, answers, what the model answered, its images
    examples/0-0.png ...      the images, cut to what the visual tokens cover, scaled down
    examples/run.json         which run they belong to
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capa_probe.errors import BadImageError, CapaProbeError
from capa_probe.samples import ImageSource, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from capa_probe.lvlm import HookedLVLM

EXAMPLES, EXAMPLES_FILE, RUN_FILE = "examples", "examples.jsonl", "run.json"
#: Fields of a manifest that tell runs apart.
_RUN = ("created", "weights_hash", "data_fingerprint")
#: Longest side of a kept image in pixels; larger ones are scaled down.
LONGEST_SIDE = 512
#: A PNG of more bytes than this becomes a JPEG.
_MAX_PNG_BYTES = 100_000


@dataclass(frozen=True)
class ExampleImage:
    """One image of an example, and how the decoder's visual tokens lie on it.

    Attributes:
        file: its name, beside ``examples.jsonl``.
        grid: rows and columns of visual tokens, of each tile where the model tiles; None where unknown.
        tile_grid: rows and columns of tiles; (1, 1) unless the model tiles, None where unknown.
    """

    file: str
    grid: tuple[int, int] | None
    tile_grid: tuple[int, int] | None


@dataclass(frozen=True)
class Example:
    """One sample as the model met it.

    Attributes:
        id: of the sample.
        task: its group, if any.
        question: as the sample has it.
        prompt: as the model got it, template and image placeholders included.
        answers: accepted answers, if known.
        generated: what the model answered, greedily.
        images: in the order of the prompt.
    """

    id: str
    task: str | None
    question: str
    prompt: str
    answers: tuple[str, ...]
    generated: str
    images: tuple[ExampleImage, ...]


def write_examples(
    lvlm: HookedLVLM,
    samples: Sequence[Sample],
    out: str | os.PathLike[str],
    n: int = 4,
    max_new_tokens: int = 16,
    manifest: Mapping[str, Any] | None = None,
) -> list[Example]:
    """Keep a few samples in a run's folder, spread over tasks and over the data, with the model's greedy answers.

    The choice looks at neither answers nor measurements, and is the same every time. Samples without an image, and
    those with one that cannot be opened, are passed over. Examples of this run that already lie there are left alone.

    Args:
        lvlm: the model, with its processor.
        samples: what the run was about; prepared tensors hold no images, so that none of them is kept.
        out: the run's folder.
        n: how many.
        max_new_tokens: length of an answer, at most.
        manifest: of the run; examples of another one are replaced.

    Returns:
        The examples that the folder now holds.

    Raises:
        CapaProbeError: a prompt does not match its images, or the folder holds examples that cannot be read.
        OSError: the folder cannot be written to.
    """
    folder = Path(out) / EXAMPLES
    run = {name: manifest.get(name) for name in _RUN} if manifest else {}
    if (folder / EXAMPLES_FILE).is_file() and _run_of(folder) == run:
        return read_examples(out)
    temporary = folder.with_name(f"{EXAMPLES}.tmp")
    _remove(temporary)
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        found = [
            _example(lvlm, sample, images, temporary, number, max_new_tokens)
            for number, (sample, images) in enumerate(_choose(samples, n))
        ]
        _remove(folder)  # those of another run, or images without their list
        if found:
            lines = (json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in found)
            # JSON can hold half of a surrogate pair, which plain UTF-8 refuses.
            text = "".join(lines).encode(errors="backslashreplace")
            (temporary / EXAMPLES_FILE).write_bytes(text)
            (temporary / RUN_FILE).write_text(json.dumps(run), encoding="utf-8")
            temporary.replace(folder)
    finally:
        _remove(temporary)
    return found


def read_examples(run: str | os.PathLike[str]) -> list[Example]:
    """The examples in a run's folder; none where it keeps none.

    Raises:
        CapaProbeError: the file is damaged.
    """
    file = Path(run) / EXAMPLES / EXAMPLES_FILE
    if not file.is_file():
        return []
    try:
        return [_from_json(json.loads(line)) for line in _lines(file)]
    except (ValueError, KeyError, TypeError):
        raise CapaProbeError(
            f"{file} cannot be read; remove the folder {EXAMPLES} and run the profile again."
        ) from None


def remove_examples(run: str | os.PathLike[str]) -> None:
    """Remove the examples of a run, whole or begun, and nothing else."""
    for name in (EXAMPLES, f"{EXAMPLES}.tmp"):
        _remove(Path(run) / name)


def _run_of(folder: Path) -> Any:
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _remove(folder: Path) -> None:
    # The list goes first: without it, what is left passes for nothing.
    for file in (folder / EXAMPLES_FILE, folder / RUN_FILE, *folder.glob("[0-9]*-[0-9]*.*")):
        file.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@dataclass(frozen=True)
class _Candidate:
    """What the choice looks at; not the sample itself, whose images may be in memory."""

    index: int
    task: str | None
    key: tuple[Any, ...]


def _candidates(samples: Sequence[Sample]) -> list[_Candidate]:
    return [
        _Candidate(index, sample.task, tuple(_key(source) for source in sample.images))
        for index, sample in enumerate(samples)
        if isinstance(sample, Sample) and sample.images
    ]


def _key(source: ImageSource) -> Any:
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    return source if isinstance(source, (str, Path)) else id(source)


def _choose(samples: Sequence[Sample], n: int) -> Iterator[tuple[Sample, list[Image]]]:
    """Samples with their images, opened: of as many tasks as there are, from all over the data, no image twice."""
    usable = _candidates(samples)
    by_task: dict[str | None, list[_Candidate]] = {}
    for candidate in usable:
        by_task.setdefault(candidate.task, []).append(candidate)
    tasks = list(by_task.values())
    wanted = min(n, len(usable))
    taken: set[int] = set()
    shown: set[Any] = set()
    for place in range(wanted):
        # More tasks than wanted: every so many-th one. Fewer: in turn.
        own = tasks[place * len(tasks) // wanted if len(tasks) > wanted else place % len(tasks)]
        start = place * len(own) // wanted
        order = [*own[start:], *own[:start], *usable]
        order.sort(key=lambda candidate: candidate.key in shown)  # stable: an image not yet shown comes first
        for candidate in order:
            if candidate.index in taken:
                continue
            taken.add(candidate.index)
            sample = samples[candidate.index]
            try:
                images = sample.open_images()
            except BadImageError:
                continue
            shown.add(candidate.key)
            yield sample, images
            break


def _example(
    lvlm: HookedLVLM, sample: Sample, images: list[Image], folder: Path, number: int, max_new_tokens: int
) -> Example:
    from capa_probe.lvlm.inputs import apply_template

    processor, family, prompt = lvlm.processor, lvlm.family, sample.question
    inputs = lvlm.prepare([images], [prompt])  # says what is wrong where there is no processor
    if processor.image_token not in prompt:
        prompt = apply_template(processor, family, prompt, len(images))
    spans = {span.index: span for span in lvlm.spans(inputs).images}
    kept = []
    for index, image in enumerate(images):
        file = _save(family.seen(processor, image), folder / f"{number}-{index}")
        span = spans.get(index)
        kept.append(ExampleImage(file.name, span.grid if span else None, span.tile_grid if span else None))
    generated = _answer(lvlm, inputs, max_new_tokens)
    return Example(sample.id, sample.task, sample.question, prompt, sample.answers, generated, tuple(kept))


def _answer(lvlm: HookedLVLM, inputs: Any, max_new_tokens: int) -> str:
    import copy

    import torch

    # The model's own generation settings (stop tokens, penalties), made greedy.
    config = copy.deepcopy(lvlm.model.generation_config)
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    plain = {"return_dict_in_generate": False, "num_return_sequences": 1}
    config.update(**greedy, **plain, max_length=None, max_new_tokens=max_new_tokens)
    with torch.no_grad():
        ids = lvlm.model.generate(**inputs, generation_config=config)[0, inputs["input_ids"].shape[1] :]
    answer: str = lvlm.processor.tokenizer.decode(ids, skip_special_tokens=True)
    return answer.strip()


def _save(image: Image, stem: Path) -> Path:
    """As PNG, which is exact, or as JPEG where that would be large."""
    image = image.copy()
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    if png.tell() <= _MAX_PNG_BYTES:
        file = stem.with_suffix(".png")
        file.write_bytes(png.getvalue())
    else:
        file = stem.with_suffix(".jpg")
        image.save(file, "JPEG", quality=88, optimize=True)
    return file


def _lines(file: Path) -> list[str]:
    # Not splitlines: a question may hold a line separator of Unicode.
    return [line for line in file.read_text(encoding="utf-8").split("\n") if line]


def _from_json(record: dict[str, Any]) -> Example:
    def pair(values: Any) -> tuple[int, int] | None:
        return None if values is None else (int(values[0]), int(values[1]))

    images = tuple(
        ExampleImage(Path(image["file"]).name, pair(image["grid"]), pair(image["tile_grid"]))
        for image in record["images"]
    )
    words = {name: str(record[name]) for name in ("id", "question", "prompt", "generated")}
    task = None if record["task"] is None else str(record["task"])
    return Example(task=task, answers=tuple(map(str, record["answers"])), images=images, **words)

"""The page on data: its code runs on data of the forms that it describes, and its tables and options are complete."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import typer
from PIL import Image

import capa_probe as cp
from capa_probe.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(opening: str) -> list[str]:
    return re.findall(rf"^```{opening}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def page_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data that the page speaks of, to be in."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    image = Image.new("RGB", (4, 3), "red")
    for name in (
        "data/shapes/images/cat.jpg",
        "pictures/summer/2.png",
        "pictures/summer/10.png",
        "tables/a.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    (line,) = blocks("json")
    (tmp_path / "data" / "shapes" / "samples.jsonl").write_text(line)
    (tmp_path / "tables" / "questions.csv").write_text("picture,text\na.png,why\n")
    rows = {
        "image": [image] * 30,
        "question": ["why"] * 30,
        "question_id": list(range(30)),
        "answers": [[{"answer": "so"}]] * 30,
    }
    split = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "saved" / "vqa")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_code_runs(page_folder: Path) -> None:
    namespace: dict[str, Any] = {}
    seen = []
    for block in blocks("python"):
        exec(block, namespace)
        seen.append([sample.id for sample in namespace["samples"]][:3])
    assert seen == [["cat-1"], ["summer/2", "summer/10"], ["0", "1", "2"]]
    assert {sample.question for sample in namespace["samples"]} == {"Describe the image."}


def test_the_code_that_needs_the_network_names_real_arguments() -> None:
    (code,) = blocks('python title="needs the network"')
    used = set(re.findall(r"\b(\w+)=", code))
    assert used <= set(inspect.signature(cp.load_samples).parameters)
    assert {"split", "streaming"} <= used


def test_fields_and_columns_are_complete(page_folder: Path) -> None:
    names = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    fields = {"id", "image", "images", "question", "answers", "task", "regions"}
    assert names == fields
    assert set(json.loads(blocks("json")[0])) <= fields
    keywords = set(inspect.signature(cp.load_samples).parameters) - {"source"}
    assert keywords <= {*re.findall(r"`(\w+)`", PAGE), *re.findall(r"(\w+)=", PAGE)}


def test_options_are_options() -> None:
    command = typer.main.get_command(app).commands["profile"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE))
    assert {"--prompt", "--image-column", "--split", "--strict"} <= named
    assert named <= known

"""Everything a user can get wrong: one sentence on stderr, exit status 2, and nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, LlamaConfig, LlavaConfig, PaliGemmaConfig
from typer.testing import CliRunner, Result

from capa_probe.cli import app
from tests import processors

WIDTH = 256


@dataclass
class Place:
    """Where a case happens: a sound model, sound data, a finished run of the two, and a folder of its own."""

    model: Path
    data: Path
    run: Path
    tmp: Path

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(getattr(self, name), self.tmp / f"{name}-copy"))


@dataclass(frozen=True)
class Case:
    """Arguments with MODEL, DATA, OUT and RUN in them, what the line must say, and what is spoilt before."""

    name: str
    args: str
    said: tuple[str, ...]
    spoil: Callable[[Place], dict[str, Any]] | None = None
    #: Whether the profile was begun: what is finished of it then stays.
    begun: bool = field(default=False)


PROFILE = "profile MODEL DATA --out OUT"


def model_with(**files: str | None) -> Callable[[Place], dict[str, Any]]:
    """A copy of the model with files replaced by texts, or removed; __ stands for a dot."""

    def spoil(place: Place) -> dict[str, Any]:
        folder = place.copy("model")
        for name, text in files.items():
            file = folder / name.replace("__", ".")
            file.unlink() if text is None else file.write_text(text)
        return {"MODEL": folder}

    return spoil


def config_with(**text: Any) -> Callable[[Place], dict[str, Any]]:
    """A copy of the model whose text config says something else."""

    def spoil(place: Place) -> dict[str, Any]:
        folder = place.copy("model")
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= text
        (folder / "config.json").write_text(json.dumps(config))
        return {"MODEL": folder}

    return spoil


def config_of(config: Any) -> Callable[[Place], dict[str, Any]]:
    """A folder with nothing but a config."""

    def spoil(place: Place) -> dict[str, Any]:
        config.save_pretrained(place.tmp / "other")
        return {"MODEL": place.tmp / "other"}

    return spoil


def a_little_louder(tensors: dict[str, torch.Tensor]) -> None:
    """One matrix, by a thousandth."""
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name] = tensors[name] * 1.001


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Place], dict[str, Any]]:
    """A copy of the model with changed weights."""

    def spoil(place: Place) -> dict[str, Any]:
        folder = place.copy("model")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return {"MODEL": folder}

    return spoil


def truncated(place: Place) -> dict[str, Any]:
    folder = place.copy("model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    return {"MODEL": folder}


def remote_code(place: Place) -> dict[str, Any]:
    folder = place.copy("model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "configuration.InternVLChatConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration.py").write_text("raise SystemExit('remote code ran')")
    return {"MODEL": folder}


def set_weight(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        (name,) = (
            name
            for name in tensors
            if name.endswith("layers.2.mlp.down_proj.weight") and "vision" not in name
        )
        tensors[name].fill_(value)

    return change


def lose_weight(tensors: dict[str, torch.Tensor]) -> None:
    (name,) = (
        name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight") and "vision" not in name
    )
    del tensors[name]


def lines(*texts: str | bytes) -> Callable[[Place], dict[str, Any]]:
    """A data folder with these lines after one that is sound."""

    def spoil(place: Place) -> dict[str, Any]:
        folder = place.tmp / "data"
        folder.mkdir()
        Image.new("RGB", (16, 16), "red").save(folder / "red.png")
        (folder / "empty.png").touch()
        (folder / "text.png").write_text("no image")
        first = {"id": "first", "image": "red.png", "question": "what is it"}
        encoded = [json.dumps(first).encode(), *(t.encode() if isinstance(t, str) else t for t in texts)]
        (folder / "samples.jsonl").write_bytes(b"\n".join(encoded))
        return {"DATA": folder}

    return spoil


def only(*records: dict[str, Any]) -> Callable[[Place], dict[str, Any]]:
    """A data folder with these records and no other."""

    def spoil(place: Place) -> dict[str, Any]:
        found = lines()(place)
        (found["DATA"] / "samples.jsonl").write_text("\n".join(map(json.dumps, records)))
        return found

    return spoil


def file_of(name: str, content: bytes | str = b"") -> Callable[[Place], dict[str, Any]]:
    def spoil(place: Place) -> dict[str, Any]:
        file = place.tmp / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return {"DATA": file}

    return spoil


def folder_of(*names: str) -> Callable[[Place], dict[str, Any]]:
    def spoil(place: Place) -> dict[str, Any]:
        folder = place.tmp / "folder"
        folder.mkdir()
        for name in names:
            Image.new("RGB", (16, 16), "red").save(folder / name)
        return {"DATA": folder}

    return spoil


def parquet(place: Place) -> dict[str, Any]:
    file = place.tmp / "table.parquet"
    pd.DataFrame({"picture": ["a.png"], "question": ["what"]}).to_parquet(file)
    return {"DATA": file}


def run_with(**changes: Any) -> Callable[[Place], dict[str, Any]]:
    """A copy of the run with another manifest."""

    def spoil(place: Place) -> dict[str, Any]:
        folder = place.copy("run")
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | changes))
        return {"OUT": folder, "RUN": folder}

    return spoil


def begun_by_a_newer_version(place: Place) -> dict[str, Any]:
    place.tmp.joinpath("run").mkdir()
    (place.tmp / "run" / "unfinished.json").write_text('{"format_version": 99, "begun_with": {"model": "m"}}')
    return {"OUT": place.tmp / "run"}


def damaged_layers(place: Place) -> dict[str, Any]:
    folder = place.copy("run")
    (folder / "layers.parquet").write_bytes(b"PAR1 nonsense")
    return {"RUN": folder}


def fewer_parts(place: Place) -> dict[str, Any]:
    folder = place.copy("run")
    (folder / "tokens" / "part-00000.parquet").unlink()
    return {"RUN": folder}


TWO = {"id": "two", "images": ["red.png", "red.png"], "question": "<image> which"}
GOOD = {"id": "good", "image": "red.png", "question": "what"}
HUGE = LlavaConfig(
    vision_config=CLIPConfig().vision_config.to_dict(),
    text_config=LlamaConfig(
        hidden_size=16384, intermediate_size=65536, num_hidden_layers=400, num_attention_heads=128
    ).to_dict(),
)

CASES = [
    # -- the command itself
    Case("unknown command", "nonsense", ("No such command 'nonsense'",)),
    Case("unknown option", "profile MODEL DATA --out OUT --nonsense", ("No such option", "--nonsense")),
    Case("no model", "profile", ("MODEL",)),
    Case("no output", "profile MODEL DATA", ("--out",)),
    # -- the model
    Case(
        "no such model folder",
        "profile /no/model DATA --out OUT",
        ("/no/model does not exist", "existing one"),
    ),
    Case(
        "no such model on the hub",
        "profile nobody/nothing DATA --out OUT",
        ("nobody/nothing", "check the name"),
    ),
    Case("folder without config", "profile DATA DATA --out OUT", ("holds no config.json",)),
    Case("config is no JSON", PROFILE, ("config", "cannot be read"), model_with(config__json="{")),
    Case("text-only model", PROFILE, ("llama", "supported"), config_of(LlamaConfig())),
    Case("another kind of model", PROFILE, ("paligemma", "supported"), config_of(PaliGemmaConfig())),
    Case(
        "remote code",
        PROFILE,
        ("never executed", "transformers-native", "OpenGVLab/InternVL3-8B-hf"),
        remote_code,
    ),
    Case(
        "no weights",
        PROFILE,
        ("could not be loaded", "model.safetensors"),
        model_with(model__safetensors=None),
    ),
    Case("cut weights", PROFILE, ("could not be loaded",), truncated),
    Case("a weight is missing", PROFILE, ("lacks", "layers.1.mlp.up_proj.weight"), weights(lose_weight)),
    Case("no tokenizer", PROFILE, ("could not be loaded",), model_with(tokenizer__json=None)),
    Case("too large", PROFILE, ("needs", "GB", "billion weights", "free"), config_of(HUGE)),
    Case("no GPU", f"{PROFILE} --device cuda", ("PyTorch sees no GPU",)),
    Case("no such dtype", f"{PROFILE} --dtype float17", ("--dtype", "float17")),
    Case(
        "config is a list",
        PROFILE,
        ("config.json cannot be read", "no JSON object"),
        model_with(config__json="[]"),
    ),
    Case("odd config", PROFILE, ("model-copy",), config_with(hidden_act="foo")),
    Case("odd sizes", PROFILE, ("model-copy", "num_hidden_layers=-1"), config_with(num_hidden_layers=-1)),
    Case(
        "other sizes",
        PROFILE,
        ("of shape", "but its config asks for", "96"),
        config_with(intermediate_size=96),
    ),
    Case("processor is a list", PROFILE, ("could not be loaded",), model_with(processor_config__json="[]")),
    Case(
        "broken template",
        PROFILE,
        ("chat template",),
        model_with(chat_template__jinja="{% for %}"),
        begun=True,
    ),
    # -- the data
    Case("no such folder", "profile MODEL /no/data --out OUT", ("/no/data does not exist",)),
    Case("empty folder", PROFILE, ("no samples.jsonl, no images",), folder_of()),
    Case("a file of another kind", PROFILE, ("is a file of another kind",), file_of("notes.txt", "hello")),
    Case("empty samples.jsonl", PROFILE, ("holds no samples",), only()),
    Case("a line is no JSON", PROFILE, ("samples.jsonl, line 2", "not JSON"), lines("{no")),
    Case("a line is a list", PROFILE, ("samples.jsonl, line 2", "not an object"), lines("[1]")),
    Case("not UTF-8", PROFILE, ("samples.jsonl", "UTF-8"), lines(b"\xff\xfe")),
    Case(
        "no question", PROFILE, ("line 2", '"question" is missing'), lines('{"id": "a", "image": "red.png"}')
    ),
    Case("no id", PROFILE, ("line 2", '"id" is missing'), lines('{"question": "a", "image": "red.png"}')),
    Case("no image field", PROFILE, ("line 2", "neither was given"), lines('{"id": "a", "question": "q"}')),
    Case(
        "image and images",
        PROFILE,
        ("line 2", "both"),
        lines('{"id": "a", "question": "q", "image": "red.png", "images": []}'),
    ),
    Case("image is a number", PROFILE, ("line 2", "path"), lines('{"id": "a", "question": "q", "image": 7}')),
    Case("blank question", PROFILE, ("line 2", "question=' '"), lines(json.dumps(GOOD | {"question": " "}))),
    Case(
        "answers are numbers", PROFILE, ("line 2", "answers="), lines(json.dumps(GOOD | {"answers": [1.5]}))
    ),
    Case("id is a fraction", PROFILE, ("line 2", "1.5"), lines(json.dumps(GOOD | {"id": 1.5}))),
    Case(
        "half a character",
        PROFILE,
        ("line 2", "UTF-8"),
        lines('{"id": "\\ud800", "image": "red.png", "question": "q"}'),
    ),
    Case("a huge number", PROFILE, ("line 2", "cannot be read"), lines('{"id": ' + "9" * 5000 + "}")),
    Case("deep nesting", PROFILE, ("line 2", "cannot be read"), lines("[" * 100_000)),
    Case(
        "duplicate ids", PROFILE, ("line 2", "'first'", "line 1"), lines(json.dumps(GOOD | {"id": "first"}))
    ),
    Case("images without a prompt", PROFILE, ("--prompt",), folder_of("a.png")),
    Case("prompt beside questions", f"{PROFILE} --prompt why", ("prompt='why'", "of its own")),
    Case("blank prompt", f"{PROFILE} --prompt=", ("prompt=''",), folder_of("a.png")),
    Case("column of a folder", f"{PROFILE} --image-column picture", ("image was given", "no dataset")),
    Case("no such column", PROFILE, ("image", "picture", "question"), parquet),
    Case("no such split", f"{PROFILE} --image-column picture --split dev", ("dev", "train"), parquet),
    Case("damaged table", PROFILE, ("table.parquet",), file_of("table.parquet", b"PAR1 nonsense")),
    Case("no such dataset", "profile MODEL nobody/nothing --out OUT", ("nobody/nothing",)),
    # -- images and prompts
    Case(
        "a missing image, strictly",
        f"{PROFILE} --strict",
        ("gone.png of sample 'good'", "does not exist"),
        lines(json.dumps(GOOD | {"image": "gone.png"})),
        begun=True,
    ),
    Case(
        "a corrupt image, strictly",
        f"{PROFILE} --strict",
        ("text.png of sample 'good'", "cannot be read as an image"),
        lines(json.dumps(GOOD | {"image": "text.png"})),
        begun=True,
    ),
    Case(
        "an empty image, strictly",
        f"{PROFILE} --strict",
        ("empty.png of sample 'good'",),
        lines(json.dumps(GOOD | {"image": "empty.png"})),
        begun=True,
    ),
    Case(
        "no image can be used",
        PROFILE,
        ("None of the 1 samples could be used", "text.png"),
        only(GOOD | {"image": "text.png"}),
        begun=True,
    ),
    Case(
        "too few placeholders",
        PROFILE,
        ("Sample two", "1 image placeholders", "2 images"),
        only(TWO),
        begun=True,
    ),
    Case(
        "too many placeholders",
        PROFILE,
        ("Sample good", "2 image placeholders", "1 images"),
        only(GOOD | {"question": "<image> <image>"}),
        begun=True,
    ),
    Case(
        "no image at all",
        PROFILE,
        ("visual token",),
        only({"id": "a", "images": [], "question": "q"}),
        begun=True,
    ),
    Case("NaN", PROFILE, ("sample q0", "layer 2", "NaN"), weights(set_weight(float("nan"))), begun=True),
    Case(
        "infinity",
        PROFILE,
        ("sample q0", "layer 2", "infinite"),
        weights(set_weight(float("inf"))),
        begun=True,
    ),
    # -- settings
    Case("limit without end", f"{PROFILE} --limit 1{'0' * 30}", ("limit=1000",)),
    Case("batch size without end", f"{PROFILE} --batch-size 1{'0' * 30}", ("batch_size=1000",)),
    Case("limit 0", f"{PROFILE} --limit 0", ("--limit",)),
    Case("steps -1", f"{PROFILE} --steps -1", ("--steps",)),
    Case("batch size 0", f"{PROFILE} --batch-size 0", ("--batch-size",)),
    Case("rows", f"{PROFILE} --rows some", ("--rows", "some")),
    Case("unknown probe", f"{PROFILE} --probes luck", ("luck", "attention, contribution")),
    Case("tau is a word", f"{PROFILE} --tau lots", ("--tau lots", "positive number")),
    Case("tau is negative", f"{PROFILE} --tau -1", ("--tau -1",)),
    Case("tau out of reach", f"{PROFILE} --tau 20", ("tau=20 can never be reached", "width 256", "relative")),
    Case("eta is no cosine", f"{PROFILE} --eta 1.5", ("--eta 1.5",)),
    Case("dimensions are words", f"{PROFILE} --sink-dims a,b", ("--sink-dims a,b",)),
    Case("dimension out of range", f"{PROFILE} --sink-dims 256", ("sink_dims=[256]", "255")),
    Case(
        "no published dimensions", f"{PROFILE} --sink-dims published", ("No sink dimensions are published",)
    ),
    # -- the output
    Case("output is a file", "profile MODEL DATA --out DATA/samples.jsonl", ("is a file",)),
    Case("output under a file", "profile MODEL DATA --out DATA/samples.jsonl/run", ("samples.jsonl",)),
    Case(
        "output among images",
        "profile MODEL DATA --out DATA/run --prompt what",
        ("lies in the data folder",),
        folder_of("a.png"),
    ),
    Case("output is no run", "profile MODEL DATA --out DATA", ("is not empty and holds no profile",)),
    Case(
        "other settings",
        "profile MODEL DATA --out RUN --steps 1",
        ("settings.steps = 0, but now it is 1", "--overwrite"),
    ),
    Case("other model", "profile MODEL DATA --out RUN", ("made with model =",), weights(a_little_louder)),
    Case("other data", "profile MODEL DATA --out RUN", ("data_fingerprint",), only(GOOD)),
    Case("newer format", PROFILE, ("newer capa_probe", "format 99"), run_with(format_version=99)),
    # -- the report
    Case("report of nothing", "report /no/run", ("/no/run does not exist",)),
    Case("report of a file", "report DATA/samples.jsonl", ("no profile", "give the folder")),
    Case("report of another folder", "report DATA", ("holds no profile", "manifest.json is missing")),
    Case(
        "report of a run begun", "report OUT", ("was not finished", "run it again"), begun_by_a_newer_version
    ),
    Case("report of a newer run", "report RUN", ("newer capa_probe",), run_with(format_version=99)),
    Case("report of a damaged run", "report RUN", ("layers.parquet cannot be read",), damaged_layers),
    Case("report of half a run", "report RUN", ("is damaged: 0 token parts",), fewer_parts),
    Case("report into a folder", "report RUN --out DATA", ("is a folder",)),
    Case("negative examples", "report RUN --examples -1", ("--examples",)),
    Case("begun by a newer version", PROFILE, ("newer capa_probe",), begun_by_a_newer_version),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    home = tmp_path_factory.mktemp("world")
    model = processors.save("llava", home / "tiny-llava", hidden_size=WIDTH)
    data = home / "data"
    data.mkdir()
    records = []
    for number in range(2):
        processors.image(16, 16, seed=number).save(data / f"{number}.png")
        records.append({"id": f"q{number}", "image": f"{number}.png", "question": "what is it"})
    (data / "samples.jsonl").write_text("\n".join(map(json.dumps, records)))
    done = invoke(f"profile {model} {data} --out {home / 'run'}", {})
    assert done.exit_code == 0, done.output
    return model, data, home / "run"


def invoke(args: str, words: dict[str, Any]) -> Result:
    for word, value in words.items():
        args = args.replace(word, str(value))
    return CliRunner().invoke(app, args.split(" "))


def everything(*folders: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for folder in folders for file in folder.rglob("*") if file.is_file()}


def test_there_are_many_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_sentence_status_2_and_nothing_lost(
    case: Case, world: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    place = Place(*world, tmp_path)
    words: dict[str, Any] = {
        "MODEL": place.model,
        "DATA": place.data,
        "RUN": place.run,
        "OUT": tmp_path / "out",
    }
    if case.spoil is not None:
        words |= case.spoil(place)
    before = everything(*world, tmp_path)

    done = invoke(case.args, words)

    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    shown = done.stderr.replace("\r", "\n").splitlines()
    bars = ("profile:", "Generating ")
    (line,) = (line for line in shown if line.strip() and not line.startswith(bars))
    assert line.startswith("error: ")
    for text in case.said:
        assert text in line
    assert "Traceback" not in line
    after = everything(*world, tmp_path)
    assert {file: after.get(file) for file in before} == before
    if not case.begun:
        assert set(after) == set(before)


class TestWhatGoesOn:
    """Bad images leave their samples out, and nothing else."""

    def test_bad_images_are_listed(self, world: tuple[Path, Path, Path], tmp_path: Path) -> None:
        bad = [GOOD | {"id": name, "image": f"{name}.png"} for name in ("gone", "text", "empty")]
        words = lines(*map(json.dumps, bad))(Place(*world, tmp_path))
        done = invoke(PROFILE, {"MODEL": world[0], "OUT": tmp_path / "out", **words})
        assert done.exit_code == 0, done.output
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert [entry["sample"] for entry in manifest["skipped"]] == ["gone", "text", "empty"]
        assert manifest["n_samples"] == 1
        assert "3 of 4 samples are left out" in done.stdout + done.stderr

    def test_a_sound_line_after_a_mistake_goes_on(
        self, world: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        words = only(GOOD, TWO)(Place(*world, tmp_path))
        out = tmp_path / "out"
        assert invoke(PROFILE, {"MODEL": world[0], "OUT": out, **words}).exit_code == 2
        (words["DATA"] / "samples.jsonl").write_text(
            "\n".join(map(json.dumps, [GOOD, TWO | {"question": "<image> <image> which"}]))
        )
        done = invoke(PROFILE, {"MODEL": world[0], "OUT": out, **words})
        assert done.exit_code == 0, done.output
        assert json.loads((out / "manifest.json").read_text())["n_samples"] == 2

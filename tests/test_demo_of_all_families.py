"""``capa-probe demo --model``: the same job on the demo model of every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from typer.testing import CliRunner

from capa_probe.cli import app
from capa_probe.cli.demo import demo
from capa_probe.demo import DEMO_MODELS, demo_data_path, demo_model_path
from capa_probe.demo.dataset import write_folder
from capa_probe.demo.worlds import WIDE, WORLDS
from capa_probe.errors import CapaProbeError
from capa_probe.tables import LayerProfile
from demo_training.architecture import Parts
from demo_training.families import FAMILIES, Sizes
from demo_training.recipes import RECIPES


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder in which only the LLaVA model and its questions are the shipped ones."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "demo-lvlm").symlink_to(demo_model_path())
    (data / "shapesqa").symlink_to(demo_data_path().parent)
    monkeypatch.setattr("capa_probe.demo.locate._CHECKOUT", data)
    monkeypatch.setattr("capa_probe.demo.locate._INSTALLED", tmp_path / "nowhere")
    return data


def test_what_is_missing_is_said_before_anything_runs(checkout: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--model", "all", "--out", str(tmp_path / "runs")])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: demo-qwen2.5-vl lies neither in")
    assert not (tmp_path / "runs").exists()


def test_all_of_them(checkout: Path, tmp_path: Path) -> None:
    for name in ("qwen2.5-vl", "internvl"):
        torch.manual_seed(0)
        recipe = replace(RECIPES[name], sizes=Sizes(d_vision=32, vision_layers=2, d_mlp=64, layers=2))
        Parts(recipe).lvlm.save_pretrained(checkout / DEMO_MODELS[name].folder)
        FAMILIES[name].processor(WIDE).save_pretrained(checkout / DEMO_MODELS[name].folder)
    write_folder("test", checkout / "shapesqa-wide" / "test", 3, WIDE)
    args = ["demo", "--model", "all", "--limit", "2", "--out", str(tmp_path / "runs")]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    for name in DEMO_MODELS:
        prof = LayerProfile.load(tmp_path / "runs" / name)
        assert prof.manifest["n_samples"] == 2
        assert prof.manifest["model"] == str(demo_model_path(name).resolve())
        assert (tmp_path / "runs" / name / "report.html").is_file()
        assert set(prof.tokens.kind) == {"visual", "text"}
    tiles = LayerProfile.load(tmp_path / "runs" / "internvl").tokens.query("kind == 'visual'").tile
    assert set(tiles) > {0, -1}  # tiles and a thumbnail


@pytest.mark.parametrize(
    ("args", "folders"),
    [
        ([], ["runs/demo"]),
        (["--limit", "5"], ["runs/demo-5"]),
        (["--model", "internvl"], ["runs/demo-internvl"]),
        (["--model", "all", "--limit", "5"], [f"runs/demo-all-5/{name}" for name in DEMO_MODELS]),
    ],
)
def test_a_short_demo_leaves_the_whole_one_alone(
    args: list[str], folders: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    scope, found = demo.__globals__, []
    monkeypatch.setitem(scope, "load_data", lambda *_: [])
    monkeypatch.setitem(scope, "start", lambda _model, _samples, out, **_: found.append(out.as_posix()))
    for place in ("demo_model_path", "demo_data_path"):
        monkeypatch.setattr(f"capa_probe.demo.{place}", lambda *_: Path())
    done = CliRunner().invoke(app, ["demo", *args])
    assert done.exit_code == 0, done.output
    assert found == folders


def test_they_are_the_models_that_are_trained() -> None:
    assert {name: model.folder for name, model in DEMO_MODELS.items()} == {
        name: family.folder for name, family in FAMILIES.items()
    }
    for name, model in DEMO_MODELS.items():
        assert RECIPES[name].world is WORLDS[model.world]
    assert get_args(get_type_hints(demo)["model"]) == (*DEMO_MODELS, "all")
    with pytest.raises(
        CapaProbeError, match="family='blip' was given; give one of llava, qwen2.5-vl, internvl"
    ):
        demo_model_path("blip")
    with pytest.raises(CapaProbeError, match="world='small' was given; shipped are 'rich' and 'wide'"):
        demo_data_path("test", "small")

"""``capa-probe calibrate``: from a checkpoint and data to a file, and every mistake is one line and a status of 2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import capa_probe as cp
from capa_probe.cli.options import parse_layers
from capa_probe.errors import CapaProbeError
from capa_probe.pruning.ffn import HadamardFFN
from tests import processors
from tests.test_cli import invoke, refused, write_data
from tests.test_ffn_resume import same


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processors.save("llava", tmp_path_factory.mktemp("model") / "tiny-llava")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "shapes")


class TestCalibrate:
    def test_writes_what_the_function_returns(self, model: Path, data: Path, tmp_path: Path) -> None:
        out = tmp_path / "new" / "alpha.safetensors"
        done = invoke("calibrate", model, data, "--layers", "0,2-3", "--out", out)
        assert done.exit_code == 0, done.output
        lvlm = cp.HookedLVLM.from_pretrained(model)
        found = HadamardFFN.load(out, lvlm)
        same(found, cp.calibrate_hadamard(lvlm, cp.load_samples(data), [0, 2, 3], progress=False))
        rows = [line.split() for line in done.stdout.splitlines()]
        assert rows[0] == ["layer", "R²"]
        assert rows[1:4] == [[str(layer), f"{found.r2[layer]:.4f}"] for layer in (0, 2, 3)]
        assert done.stdout.splitlines()[4] == f"48 visual tokens of 3 samples, in {out}"
        stderr = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
        assert [line for line in stderr if not line.startswith("calibrate:")] == []
        assert [file.name for file in out.parent.iterdir()] == [out.name]

    def test_options(self, model: Path, data: Path, tmp_path: Path) -> None:
        out = tmp_path / "alpha.safetensors"
        args = ("--layers", "1", "--out", out, "--x", "normed", "--limit", "2", "--batch-size", "2")
        done = invoke("calibrate", model, data, *args, "--dtype", "bfloat16", "--device", "cpu")
        assert done.exit_code == 0, done.output
        found = HadamardFFN.load(out)
        assert (found.x, found.layers, found.n_samples) == ("normed", (1,), 2)
        assert (found.manifest["dtype"], found.manifest["settings"]["batch_size"]) == ("bfloat16", 2)
        line = refused(invoke("calibrate", model, data, *args))
        assert 'was made with dtype = "bfloat16", but now it is "float32"' in line
        line = refused(invoke("calibrate", model, data, "--layers", "1", "--out", out))
        assert "was made with settings.layers" not in line
        assert 'was made with settings.x = "normed", but now it is "residual"' in line
        done = invoke("calibrate", model, data, "--layers", "1", "--out", out, "--overwrite")
        assert done.exit_code == 0, done.output
        assert HadamardFFN.load(out).x == "residual"

    def test_an_image_that_cannot_be_used(self, model: Path, tmp_path: Path) -> None:
        data, out = write_data(tmp_path / "data"), tmp_path / "alpha.safetensors"
        (data / "1.png").write_bytes(b"")
        done = invoke("calibrate", model, data, "--layers", "1", "--out", out)
        assert done.exit_code == 0, done.output
        assert "warning: 1 of 3 samples" in done.stderr
        assert "of 2 samples" in done.stdout
        out.unlink()
        line = invoke("calibrate", model, data, "--layers", "1", "--out", out, "--strict")
        assert line.exit_code == 2
        assert "1.png of sample 'q1'" in line.stderr.splitlines()[-1]

    def test_ctrl_c_says_that_it_goes_on(
        self, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "alpha.safetensors"
        real = cp.HookedLVLM.spans
        calls: list[int] = []

        def spans(self: cp.HookedLVLM, inputs: object) -> object:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(self, inputs)  # type: ignore[arg-type]

        monkeypatch.setattr(cp.HookedLVLM, "spans", spans)
        done = invoke("calibrate", model, data, "--layers", "1", "--out", out)
        assert done.exit_code == 130
        assert "the same command goes on from here" in done.stderr
        done = invoke("calibrate", model, data, "--layers", "1", "--out", out)
        assert done.exit_code == 0, done.output
        assert len(calls) == 4  # two before, one that was interrupted, and that one again
        assert "48 visual tokens of 3 samples" in done.stdout


class TestMistakes:
    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["MODEL", "DATA", "--out", "OUT"], "--layers"),
            (["MODEL", "DATA", "--layers", "1"], "--out"),
            (["MODEL", "DATA", "--layers", "5-2", "--out", "OUT"], "--layers 5-2 was given; give"),
            (["MODEL", "DATA", "--layers", "1,1", "--out", "OUT"], "layers=[1, 1] was given"),
            (["MODEL", "DATA", "--layers", "2-9", "--out", "OUT"], "Layer 9 was given, but the model has"),
            (["MODEL", "DATA", "--layers", "1", "--x", "mid", "--out", "OUT"], "--x"),
            (["MODEL", "DATA", "--layers", "1", "--out", "DATA"], "is a folder; give a file"),
            (
                ["MODEL", "DATA", "--layers", "1", "--out", "DATA/0.png"],
                "0.png is damaged or was not written",
            ),
            (["MODEL", "/nowhere", "--layers", "1", "--out", "OUT"], "/nowhere does not exist"),
            (["/no/model", "DATA", "--layers", "1", "--out", "OUT"], "/no/model does not exist"),
        ],
    )
    def test_one_line_and_status_2(
        self, args: list[str], said: str, model: Path, data: Path, tmp_path: Path
    ) -> None:
        names = {"MODEL": model, "DATA": data, "OUT": tmp_path / "alpha.safetensors"}
        filled = [arg if "/" in arg[:1] else _fill(arg, names) for arg in args]
        before = sorted(os.listdir(data))  # noqa: PTH208
        assert said in refused(invoke("calibrate", *filled))
        assert sorted(os.listdir(data)) == before  # noqa: PTH208
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("text", "layers"),
        [("2-5,7", [2, 3, 4, 5, 7]), ("0", [0]), (" 3 - 4 , 1", [3, 4, 1]), ("2-2", [2])],
    )
    def test_layers(self, text: str, layers: list[int]) -> None:
        assert parse_layers(text) == layers

    @pytest.mark.parametrize("text", ["", ",", "1,", "a", "-1", "1-", "3-1", "1.5", "0-99999", "1--2"])
    def test_layers_that_are_none(self, text: str) -> None:
        with pytest.raises(CapaProbeError, match="--layers .* was given; give layers or rising ranges"):
            parse_layers(text)


def _fill(arg: str, names: dict[str, Path]) -> str:
    for name, path in names.items():
        if arg == name or arg.startswith(f"{name}/"):
            return str(path) + arg.removeprefix(name)
    return arg

"""The command line does the whole job on a real checkpoint folder, and every mistake is one line and a status of 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers.utils import logging
from typer.testing import CliRunner, Result

from capa_probe import __version__, findings, jobs, measures
from capa_probe.analysis import classify_sinks, redundant_layers, sink_summary
from capa_probe.cli import app
from capa_probe.console import quiet_transformers
from capa_probe.demo import demo_model_path
from capa_probe.errors import CapaProbeError
from capa_probe.tables import LayerProfile
from capa_probe.writing import ProfileWriter
from tests import processors, synthetic
from tests.synthetic import World

WIDTH = 256  # the narrowest that has a relative tau
TAU = "3"  # low enough for a random model to have sinks


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def refused(done: Result) -> str:
    """The one line of a refusal."""
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def write_data(folder: Path, n: int = 3, images: bool = True) -> Path:
    folder.mkdir()
    lines = []
    for number in range(n):
        names = [f"{number}.png"] if images else []
        for name in names:
            processors.image(16, 16, seed=number).save(folder / name)
        question = "what is it" + " now" * number
        lines.append(json.dumps({"id": f"q{number}", "images": names, "question": question}))
    (folder / "samples.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processors.save("llava", tmp_path_factory.mktemp("model") / "tiny-llava", hidden_size=WIDTH)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def done(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    args = ("--out", out, "--batch-size", "2", "--tau", TAU, "--eta", "0.5")
    return out, invoke("profile", model, data, *args)


class TestProfile:
    def test_writes_profile_tables_and_figures(self, done: tuple[Path, Result]) -> None:
        out, result = done
        assert result.exit_code == 0, result.output
        prof = LayerProfile.load(out)
        assert prof.manifest["n_samples"] == 3
        assert prof.manifest["settings"]["batch_size"] == 2
        sinks, layers = classify_sinks(prof, tau=float(TAU)), redundant_layers(prof, eta=0.5)
        assert len(sinks) > 0
        assert layers["redundant"].any()
        written = pd.read_parquet(out / "sinks.parquet")
        pd.testing.assert_frame_equal(written, sinks)
        assert written.attrs["tau"] == float(TAU)
        pd.testing.assert_frame_equal(
            pd.read_csv(out / "sinks_by_layer.csv", keep_default_na=False),
            sink_summary(sinks),
            check_dtype=False,
        )
        pd.testing.assert_frame_equal(pd.read_csv(out / "redundant_layers.csv"), layers, check_dtype=False)
        for name in findings.FIGURE_NAMES:
            assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert list(out.rglob("*.tmp")) == []
        asked = findings.read_settings(out)
        assert (asked["tau"], asked["eta"]) == (float(TAU), 0.5)

    def test_prints_one_row_per_layer(self, done: tuple[Path, Result]) -> None:
        out, result = done
        prof = LayerProfile.load(out)
        summary = findings.find(prof, tau=float(TAU), eta=0.5).summary()
        rows = [line.split() for line in result.stdout.splitlines() if line.strip()[:1].isdigit()]
        assert len(rows) == prof.manifest["n_layers"]
        for row, (_, expected) in zip(rows, summary.iterrows(), strict=True):
            assert row[0] == str(expected["layer"])
            assert row[1] == f"{expected['visual_cosine']:.4f}"
            assert row[2] == f"{expected['text_cosine']:.4f}"
            assert " ".join(row[3:-5]) == expected["redundant"]
            assert row[-5:-2] == [str(expected[name]) for name in ("n_sinks", "n_dump", "n_anchor")]
            assert row[-2:] == [f"{expected[f'{name}_share']:.1%}" for name in ("attention", "contribution")]
        assert max(map(len, result.stdout.splitlines()[: len(rows) + 5])) <= 80

    def test_says_where_everything_lies_and_what_was_found(self, done: tuple[Path, Result]) -> None:
        out, result = done
        files = [line.strip() for line in result.stdout.splitlines() if line.startswith("  /")]
        assert sorted(files) == sorted(str(out / name) for name in (*findings.FILES, "report.html"))
        assert "Redundant FFN (visual cosine > 0.5): layer" in result.stdout
        assert "tiny-llava, 3 samples, tau = 3, eta = 0.5" in result.stdout

    def test_only_our_progress_bar_is_on_stderr(self, done: tuple[Path, Result]) -> None:
        lines = [line for line in done[1].stderr.replace("\r", "\n").splitlines() if line.strip()]
        assert lines
        assert [line for line in lines if not line.startswith("profile:")] == []

    @pytest.mark.parametrize("verbosity", [logging.WARNING, logging.INFO])
    def test_transformers_is_quiet_only_meanwhile(self, verbosity: int) -> None:
        before = logging.get_verbosity()
        logging.set_verbosity(verbosity)
        try:
            with quiet_transformers():
                assert logging.get_verbosity() == logging.ERROR
                assert not logging.is_progress_bar_enabled()
            assert logging.get_verbosity() == verbosity
            assert logging.is_progress_bar_enabled()
        finally:
            logging.set_verbosity(before)

    def test_sink_dimensions(self, model: Path, data: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        result = invoke("profile", model, data, "--out", out, "--limit", "2", "--sink-dims", "3, 17")
        assert result.exit_code == 0, result.output
        loaded = LayerProfile.load(out)
        assert loaded.manifest["sink_dims"] == [3, 17]
        assert set(loaded.tokens["sink_dim"]) <= {3, 17}
        line = refused(invoke("profile", model, data, "--out", tmp_path / "b", "--sink-dims", "3;x"))
        assert "--sink-dims 3;x was given" in line
        line = refused(invoke("profile", model, data, "--out", tmp_path / "c", "--sink-dims", "published"))
        assert "No sink dimensions are published" in line

    def test_options_reach_the_profile(self, model: Path, data: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        args = ("--limit", "1", "--steps", "2", "--probes", "ffn_cosine, attention", "--device", "cpu")
        result = invoke("profile", model, data, "--out", out, *args, "--dtype", "bfloat16")
        assert result.exit_code == 0, result.output
        manifest = LayerProfile.load(out).manifest
        assert manifest["settings"] == {
            "steps": 2,
            "batch_size": 1,
            "rows": "visual",
            "limit": 1,
            "probes": ["ffn_cosine", "attention"],
        }
        assert (manifest["n_samples"], manifest["dtype"], manifest["device"]) == (1, "bfloat16", "cpu")
        assert "the profile lacks the probe contribution and sink_strength" in result.stdout
        assert "A single sample gives no intervals" in result.stdout
        assert not (out / "sinks.parquet").exists()
        assert (out / "figures" / "ffn_cosine.png").exists()

    def test_no_sinks_is_a_finding(self, model: Path, data: Path, tmp_path: Path) -> None:
        result = invoke("profile", model, data, "--out", tmp_path / "run", "--tau", "15.9")
        assert result.exit_code == 0, result.output
        strength = LayerProfile.load(tmp_path / "run").tokens.query("kind == 'visual' and layer >= 2")
        largest = strength["sink_strength"].max()
        assert (
            f"No sinks at tau = 15.9; the largest sink strength of a visual token is {largest:.3g}"
            in result.stdout
        )
        assert len(pd.read_parquet(tmp_path / "run" / "sinks.parquet")) == 0

    def test_a_profile_survives_what_comes_after_it(self, model: Path, tmp_path: Path) -> None:
        blind = write_data(tmp_path / "blind", n=1, images=False)
        line = refused(_without_bar(invoke("profile", model, blind, "--out", tmp_path / "run")))
        assert f"The profile is finished and lies in {tmp_path / 'run'}" in line
        assert "without a visual token" in line
        assert LayerProfile.load(tmp_path / "run").manifest["n_samples"] == 1


class TestMistakes:
    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["nonsense"], "No such command 'nonsense'"),
            (["--nonsense"], "No such option"),
            (["profile"], "MODEL"),
            (["profile", "m", "DATA"], "--out"),
            (["profile", "m", "/nowhere", "--out", "OUT"], "/nowhere does not exist"),
            (["profile", "m", "DATA", "--out", "OUT", "--limit", "0"], "--limit"),
            (["profile", "m", "DATA", "--out", "OUT", "--rows", "some"], "--rows"),
            (["profile", "m", "DATA", "--out", "OUT", "--tau", "lots"], "--tau lots"),
            (["profile", "m", "DATA", "--out", "OUT", "--tau", "-1"], "--tau -1"),
            (["profile", "m", "DATA", "--out", "OUT", "--tau", "nan"], "--tau nan"),
            (["profile", "m", "DATA", "--out", "OUT", "--eta", "1.5"], "--eta 1.5"),
            (["profile", "m", "DATA", "--out", "DATA"], "is not empty and holds no profile"),
            (["profile", "m", "DATA", "--out", "DATA/samples.jsonl"], "is a file"),
            (["profile", "m", "DATA", "--out", "OUT", "--probes", "luck"], "probes=['luck']"),
            (["profile", "/no/model", "DATA", "--out", "OUT"], "The model folder /no/model does not exist"),
            (["demo", "--limit", "none"], "--limit"),
            (["demo", "--model", "llama"], "Invalid value for '--model': 'llama' is not one of 'llava',"),
        ],
    )
    def test_one_line_and_status_2(self, args: list[str], said: str, data: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        assert said in refused(
            invoke(*(arg.replace("DATA", str(data)).replace("OUT", str(out)) for arg in args))
        )
        assert not out.exists()

    def test_thresholds_are_checked_before_the_long_part(
        self, model: Path, data: Path, tmp_path: Path
    ) -> None:
        line = refused(invoke("profile", model, data, "--out", tmp_path / "run", "--tau", "20"))
        assert "tau=20 can never be reached by a model of width 256" in line
        assert not (tmp_path / "run").exists()

    def test_a_finished_profile_is_not_overwritten_unless_asked_for(
        self, model: Path, data: Path, done: tuple[Path, Result], tmp_path: Path
    ) -> None:
        before = {file: file.read_bytes() for file in done[0].rglob("*") if file.is_file()}
        line = refused(invoke("profile", model, data, "--out", done[0]))
        assert "settings.batch_size = 2, but now it is 1" in line
        assert "--overwrite" in line
        assert {file: file.read_bytes() for file in done[0].rglob("*") if file.is_file()} == before
        copy = shutil.copytree(done[0], tmp_path / "copy")
        assert invoke("profile", model, data, "--out", copy, "--overwrite").exit_code == 0
        assert LayerProfile.load(copy).manifest["settings"]["batch_size"] == 1

    def test_the_same_command_analyses_a_finished_profile_again(
        self, model: Path, data: Path, done: tuple[Path, Result], tmp_path: Path
    ) -> None:
        copy = shutil.copytree(done[0], tmp_path / "copy")
        manifest = (copy / "manifest.json").read_bytes()
        result = invoke(
            "profile", model, data, "--out", copy, "--batch-size", "2", "--tau", "20000", "--eta", "0.1"
        )
        assert "tau=20000 can never be reached" in refused(result)
        result = invoke(
            "profile", model, data, "--out", copy, "--batch-size", "2", "--tau", "5", "--eta", "0.1"
        )
        assert result.exit_code == 0, result.output
        assert "The profile was there already, and no model ran" in result.stdout
        assert (copy / "manifest.json").read_bytes() == manifest
        asked = findings.read_settings(copy)
        assert (asked["tau"], asked["eta"]) == (5.0, 0.1)

    def test_no_gpu(self, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        args = ("profile", model, data, "--out", tmp_path / "run", "--device", "cuda")
        assert "PyTorch sees no GPU" in refused(invoke(*args))

    def test_interrupt(
        self, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: Any, out: Path, **__: Any) -> None:
            ProfileWriter(out)  # begun, as a real one
            raise KeyboardInterrupt

        out = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "profile", interrupted)
            result = invoke("profile", model, data, "--out", out)
        assert result.exit_code == 130
        assert (
            result.stderr
            == f"interrupted; the profile in {out} is not finished; 0 samples are kept, and the same command goes on "
            "from there\n"
        )
        # It does.
        assert invoke("profile", model, data, "--out", out, "--limit", "1").exit_code == 0

    def test_no_room_for_the_tables(
        self, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device", "sinks.parquet")

        monkeypatch.setattr(jobs, "write", full)
        result = _without_bar(invoke("profile", model, data, "--out", tmp_path / "run", "--limit", "1"))
        assert "The profile is finished" in refused(result)
        assert "No space left on device" in result.stderr
        LayerProfile.load(tmp_path / "run")

    def test_a_bug_keeps_its_traceback(
        self, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(jobs, "profile", broken)
        result = invoke("profile", model, data, "--out", tmp_path / "run")
        assert isinstance(result.exception, ZeroDivisionError)

    def test_examples_are_those_of_the_run(
        self, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "run"
        args = ("profile", model, data, "--out", out)
        assert invoke(*args).exit_code == 0
        examples = out / "examples" / "examples.jsonl"
        examples.write_text(examples.read_text().replace('"generated": "', '"generated": "of the old run '))

        def killed(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(jobs, "write_examples", killed)
            assert invoke(*args, "--overwrite").exit_code == 130
        assert invoke(*args).exit_code == 0
        assert "of the old run" not in examples.read_text() + (out / "report.html").read_text()
        before = examples.stat().st_mtime_ns
        assert invoke(*args).exit_code == 0
        assert examples.stat().st_mtime_ns == before

    def test_probes_that_nothing_can_be_analysed_with(self, model: Path, data: Path, tmp_path: Path) -> None:
        done = invoke("profile", model, data, "--out", tmp_path / "run", "--probes", "attention")
        assert done.exit_code == 0, done.output
        assert "Nothing to analyse" in done.stdout
        assert LayerProfile.load(tmp_path / "run").tokens["attention"].notna().all()
        assert not (tmp_path / "run" / "report.html").exists()


class TestDemo:
    def test_twice_in_one_folder(self, tmp_path: Path) -> None:
        out = tmp_path / "demo"
        first = invoke("demo", "--out", out, "--limit", "3")
        assert first.exit_code == 0, first.output
        prof = LayerProfile.load(out)
        assert prof.manifest["n_samples"] == 3
        assert prof.manifest["model"] == str(demo_model_path())
        assert "tau is relative: 0.3125 * sqrt(256) = 5" in first.stdout
        assert (out / "figures" / "ffn_cosine.png").exists()

        # Again: replaced. With somebody's notes in it: left alone.
        assert invoke("demo", "--out", out, "--limit", "2").exit_code == 0
        assert LayerProfile.load(out).manifest["n_samples"] == 2
        for name in ("notes.txt", "figures/mine.png"):
            (out / name).write_text("mine")
            assert f"holds {name} beside" in refused(invoke("demo", "--out", out, "--limit", "1"))
            assert LayerProfile.load(out).manifest["n_samples"] == 2
            (out / name).unlink()

    def test_another_profile_is_left_alone(self, tmp_path: Path) -> None:
        world = World(samples=("a",))
        writer = ProfileWriter(tmp_path)
        writer.add(synthetic.tokens(world))
        writer.finish(synthetic.facts(world, model="llava-hf/llava-1.5-7b-hf"))
        with pytest.raises(
            CapaProbeError, match=r"holds a profile of llava-hf/llava-1.5-7b-hf, not of demo-lvlm"
        ):
            jobs.clear(tmp_path, Path("data/demo-lvlm"))
        assert LayerProfile.load(tmp_path).manifest["n_samples"] == 1

    def test_clearing_leaves_an_empty_folder(self, tmp_path: Path) -> None:
        world = World(samples=("a", "b"))
        writer = ProfileWriter(tmp_path)
        writer.add(synthetic.tokens(world))
        prof = writer.finish(synthetic.facts(world, model="/elsewhere/data/demo-lvlm"))
        findings.write(prof, findings.find(prof), tmp_path)
        assert len(list(tmp_path.iterdir())) > 4
        jobs.clear(tmp_path, Path("data/demo-lvlm"))
        assert list(tmp_path.iterdir()) == []


class TestFindings:
    def test_auto_tau(self) -> None:
        assert measures.choose_tau("auto", 4096) == 20
        assert measures.choose_tau("auto", 400) == "relative"
        assert measures.choose_tau(7.0, 400) == 7
        with pytest.raises(CapaProbeError, match="width 128"):
            measures.choose_tau("auto", 128)

    def test_redundant_layers_in_words(self) -> None:
        world = World(cosines={layer: (0.99 if layer in (1, 2, 4) else 0.5, 0.9) for layer in range(5)})
        found = findings.find(synthetic.profile(world), tau=synthetic.TAU)
        assert found.sentences()[0] == (
            "Redundant FFN (visual cosine > 0.96): layers 1-2 & 4; for visual tokens only: 1-2 & 4."
        )
        assert list(found.summary()["redundant"]) == ["no", "visual only", "visual only", "no", "visual only"]
        world = World(cosines=dict.fromkeys(range(5), (0.5, 0.5)))
        found = findings.find(synthetic.profile(world), tau=synthetic.TAU)
        assert found.sentences()[0].endswith("no layer.")

    def test_redundant_for_text_too_is_said(self) -> None:
        world = World(cosines=dict.fromkeys(range(5), (0.99, 0.98)))
        found = findings.find(synthetic.profile(world), tau=synthetic.TAU)
        assert any("say nothing particular about visual tokens" in remark for remark in found.remarks)
        assert list(found.summary()["redundant"]) == ["yes"] * 5

    def test_warnings_of_the_analyses_become_remarks(self) -> None:
        # A dimension that is large on every visual token is an offset, and classify_sinks warns of it.
        world = World(n_layers=3, sinks=tuple(
            synthetic.Planted(s, 2, p, dim=7) for s in "abc" for p in range(1, 17)
        ))  # fmt: skip
        found = findings.find(synthetic.profile(world), tau=synthetic.TAU)
        assert any("offset" in remark for remark in found.remarks)
        assert found.sinks is not None
        assert found.sinks.empty

    def test_nothing_to_say(self) -> None:
        prof = synthetic.profile(World(), settings={"probes": ["value_norm"]})
        with pytest.raises(CapaProbeError, match=r"Sinks were not looked for.*Redundant layers were not"):
            findings.find(prof)

    def test_facts_on_disk(self, tmp_path: Path) -> None:
        prof = synthetic.profile(World())
        findings.write(prof, findings.find(prof, tau="relative", eta=0.9), tmp_path)
        asked = {"tau": "relative", "eta": 0.9, "split": "non-sink-median", "quantile": None, "groups": None}
        assert findings.read_settings(tmp_path) == asked
        facts = json.loads((tmp_path / "findings.json").read_text())
        assert facts["tau"] == pytest.approx(0.3125 * np.sqrt(synthetic.D_MODEL))
        assert any(remark.startswith("No sinks at tau = 10") for remark in facts["remarks"])
        for damaged in (
            "{",
            "[]",
            '{"tau": 20}',
            '{"settings": {"tau": 20}}',
            json.dumps({"settings": asked | {"eta": None}}),
        ):
            (tmp_path / "findings.json").write_text(damaged)
            with pytest.raises(CapaProbeError, match="does not say what the findings were made with"):
                findings.read_settings(tmp_path)
        assert findings.read_settings(tmp_path / "missing") == asked | {"tau": "auto", "eta": 0.96}


class TestEntryPoint:
    @pytest.mark.parametrize("command", ["profile", "demo"])
    def test_help_has_an_example(self, command: str) -> None:
        result = invoke(command, "--help")
        assert result.exit_code == 0
        assert f"Example: capa-probe {command}" in result.stdout

    def test_version_and_bare_call(self) -> None:
        assert invoke("--version").stdout == f"capa-probe {__version__}\n"
        bare = invoke()
        assert bare.exit_code == 0
        assert "profile" in bare.stdout
        assert "demo" in bare.stdout

    def test_exit_status_of_the_process(self, tmp_path: Path) -> None:
        code = "from capa_probe.cli import main; main()"
        args = ["profile", "any/model", str(tmp_path / "missing"), "--out", str(tmp_path / "run")]
        process = subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False
        )
        assert process.returncode == 2
        assert process.stdout == ""
        assert process.stderr.startswith("error: ")
        assert process.stderr.count("\n") == 1

    @pytest.mark.parametrize("args", [["--help"], ["profile", "m", "/nowhere", "--out", "x"]])
    def test_nothing_heavy_is_loaded_for_help_or_a_missing_folder(self, args: list[str]) -> None:
        code = (
            "import sys, capa_probe.cli as cli\n"
            "try:\n    cli.main()\n"
            "except SystemExit:\n"
            "    print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
        )
        process = subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
        )
        assert process.stdout.splitlines()[-1] == "[]"


def _without_bar(done: Result) -> Result:
    """The same result without the progress bar's lines on stderr."""
    lines = done.stderr.replace("\r", "\n").splitlines(keepends=True)
    done.stderr_bytes = "".join(
        line for line in lines if not line.startswith("profile:") and line.strip()
    ).encode()
    return done

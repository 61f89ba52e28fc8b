"""``capa-probe depth``: from a checkpoint and a folder to tables and a figure; every mistake is one line."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner, Result

from capa_probe.benchmark.depth_verdict import COLUMNS
from capa_probe.benchmark.store import read_tables
from capa_probe.cli import app
from capa_probe.errors import CapaProbeError
from capa_probe.figures.depth import depth
from capa_probe.figures.save import save
from tests import processors


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["depth", *map(str, args)])


def refused(done: Result) -> str:
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processors.save("qwen2_5_vl", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number in range(4):
        processors.image(16, 32, seed=number).save(folder / f"{number}.png")
        lines.append(
            {
                "id": f"q{number}", "image": f"{number}.png", "question": "what is it", "answers": ["a"],
                "task": ("shape", "color")[number % 2], "regions": [[[0, 0, 8, 8]]],
            }
        )  # fmt: skip
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("runs") / "depth"
    done = invoke(model, data, "--out", out, "--keep", "0.5", "--draws", "1", "--max-new-tokens", "1")
    assert done.exit_code == 0, done.output
    return done, out


class TestCommand:
    def test_what_it_writes_and_says(self, run: tuple[Result, Path]) -> None:
        done, out = run
        tables = read_tables(out)
        assert set(tables) == {
            "depth", "depth_notes",
            *(f"depth_{of}{what}" for of in ("gone", "kept", "regions") for what in ("", "_tests", "_rows")),
        }  # fmt: skip
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["family"] == "qwen2_5_vl"
        assert manifest["n_samples"] == 4
        assert manifest["asked"] == {"keeps": [0.5], "layers": [1, 2], "scores": [], "draws": 1}
        assert manifest["tables"]["depth_gone_rows"] == 4 * 4
        assert (out / "figures" / "depth.png").stat().st_size > 10_000
        assert (out / "figures" / "depth.svg").read_text().lstrip().startswith("<?xml")
        assert "unpruned" in done.stdout
        assert "Over 4 samples of 4 images, accuracy is" in done.stdout
        assert str(out / "figures" / "depth.svg") in done.stdout

    def test_again_with_a_score(self, run: tuple[Result, Path], model: Path, data: Path) -> None:
        """The parts that are there are used, and the figure is drawn anew."""
        _, out = run
        before = {file: file.stat().st_mtime_ns for file in (out / "parts").rglob("*.parquet")}
        done = invoke(
            model, data, "--out", out, "--keep", "0.5", "--draws", "1", "--max-new-tokens", "1",
            "--score", "attention",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        after = {file: file.stat().st_mtime_ns for file in (out / "parts").rglob("*.parquet")}
        assert before.items() <= after.items()
        assert len(after) == len(before) + 2
        assert set(read_tables(out)["depth_kept"]["score"]) == {"random", "attention"}

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (["--keep", "half"], "--keep half was given; give shares between 0 and 1"),
            (["--keep", "1,0.5"], "--keep 1,0.5 was given"),
            (["--score", "best"], "--score best was given; give some of contribution"),
            (["--layers", "a"], "--layers a was given"),
            (["--layers", "9"], r"layers=\(9,\) was given for a model of 4 layers; give some from 1 to 3"),
            (["--limit", "0"], "limit"),
            (["--seed", "-1"], "seed"),
        ],
    )
    def test_bad_options(
        self, tmp_path: Path, model: Path, data: Path, options: list[str], match: str
    ) -> None:
        assert re.search(match, refused(invoke(model, data, "--out", tmp_path / "run", *options)))
        assert not (tmp_path / "run").exists()

    def test_bad_places(self, tmp_path: Path, model: Path, data: Path) -> None:
        assert "nowhere" in refused(invoke(model, tmp_path / "nowhere", "--out", tmp_path / "run"))
        assert "nowhere" in refused(invoke(tmp_path / "nowhere", data, "--out", tmp_path / "run"))
        (tmp_path / "file").write_text("mine")
        assert "is a file" in refused(invoke(model, data, "--out", tmp_path / "file"))
        assert "holds no benchmark run" in refused(invoke(model, data, "--out", tmp_path))
        bad = tmp_path / "bad"
        bad.mkdir()
        (bad / "samples.jsonl").write_text(
            '{"id": "a", "image": "a.png", "question": "what", "regions": [[[9, 0, 3, 8]]]}'
        )
        assert "line 1: the region" in refused(invoke(model, bad, "--out", tmp_path / "run"))

    def test_a_run_with_other_settings(self, run: tuple[Result, Path], model: Path, data: Path) -> None:
        message = refused(invoke(model, data, "--out", run[1], "--seed", "3", "--max-new-tokens", "1"))
        assert "settings.seed = 0, but now it is 3" in message

    def test_help(self) -> None:
        done = invoke("--help")
        assert done.exit_code == 0
        assert "Example" in done.stdout
        assert "--score" in done.stdout


def table(measure: str = "correct") -> dict[str, pd.DataFrame]:
    """Tables of a made-up run of 6 layers that reads up to layer 3."""

    def rows(task: str, values: list[float], **columns: Any) -> pd.DataFrame:
        frame = pd.DataFrame({"task": task, "n": 30, "n_images": 10, measure: values, **columns})
        return frame.assign(
            **{f"{measure}_low": frame[measure] - 0.05, f"{measure}_high": frame[measure] + 0.05}
        )

    curve = [0.1, 0.2, 0.3, 0.5, 0.9, 0.9, 0.9]
    gone = pd.concat([rows(task, curve, layer=range(7)) for task in ("all", "count", "color")])
    kept = pd.concat(
        rows(
            "all",
            [0.8, 0.6] if score == "random" else [0.7, 0.65],
            keep=[0.5, 0.25],
            layer=layer,
            score=score,
        )
        for layer in (2, 3)
        for score in ("random", "contribution")
    )
    tokens = ("all", "region_removed", "others_removed", "region_kept", "others_kept")
    regions = pd.concat(
        rows("all", [0.9, 0.3, 0.8, 0.7, 0.2], tokens=tokens, layer=layer) for layer in (0, 2, 3)
    )
    verdict = pd.DataFrame(index=range(1), columns=list(COLUMNS)).assign(
        task="all", measure=measure, n=30, n_images=10, whole=0.9, whole_low=0.85, whole_high=0.95, blank=0.1,
        last_layer=3,
    )  # fmt: skip
    return {"depth": verdict, "depth_gone": gone, "depth_kept": kept, "depth_regions": regions}


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def curves(axes: Any, n: int) -> list[Any]:
    """The lines through so many points."""
    return [line for line in axes.lines if len(line.get_xdata()) == n]


def texts(figure: Figure) -> str:
    own = [text.get_text() for text in figure.texts]
    return "\n".join([*own, *(axes.get_title(loc="left") for axes in figure.axes)])


class TestFigure:
    def test_it_shows_the_numbers(self) -> None:
        figure = depth(table())
        gone, kept, regions = figure.axes
        labels = legend(gone)
        assert labels == ["count (n = 30)", "color (n = 30)", "all (n = 30; band: 95 %)"]
        for line in curves(gone, 7):
            assert list(line.get_ydata()) == [0.1, 0.2, 0.3, 0.5, 0.9, 0.9, 0.9]
        random = next(line for line in kept.lines if line.get_label() == "from layer 2 on")
        # From all, over the shares, to none, where it meets the first panel.
        assert np.allclose(random.get_ydata(), [0.9, 0.8, 0.6, 0.3])
        scored = curves(kept, 2)
        assert [list(line.get_ydata()) for line in scored] == [[0.7, 0.65]] * 2
        labels = legend(kept)
        assert labels == ["from layer 2 on", "from layer 3 on", "at random", "by contribution"]
        assert [text.get_text() for text in kept.get_xticklabels()] == ["all", "50 %", "25 %", "none"]
        assert regions.get_title(loc="left") == "What is asked about (n = 30)"
        assert [text.get_text() for text in regions.get_xticklabels()] == ["0", "2", "3"]
        assert "30 questions about 10 images" in texts(figure)
        assert "costs something: 3" in texts(figure)

    def test_colours_of_tasks_differ(self) -> None:
        lines = curves(depth(table()).axes[0], 7)
        assert len({to_hex(line.get_color()) for line in lines}) == 3

    def test_without_regions_two_panels(self) -> None:
        tables = table()
        del tables["depth_regions"]
        assert len(depth(tables).axes) == 2

    def test_agreement_is_said(self) -> None:
        assert depth(table("agrees")).axes[0].get_ylabel() == "agreement with the unpruned model"

    def test_nothing_lies_outside_or_on_top(self) -> None:
        figure = depth(table())
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        width, height = figure.bbox.size
        panels: list[Any] = list(figure.axes)
        for axes in panels:
            box = axes.get_tightbbox(renderer)
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= width + 1
            assert box.y1 <= min(text.get_window_extent(renderer).y0 for text in figure.texts)
            assert (
                axes.get_legend().get_window_extent(renderer).y1
                < axes.xaxis.label.get_window_extent(renderer).y0
            )
        legends = [axes.get_legend().get_window_extent(renderer) for axes in panels]
        assert not any(a.overlaps(b) for a, b in pairwise(legends))

    def test_files_are_the_same_each_time(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            files = save(depth(table()), tmp_path / name / "depth", svg=True)
            assert [file.suffix for file in files] == [".png", ".svg"]
        for file in files:
            assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()
        with Image.open(files[0]) as image:
            assert image.width > 1500

    def test_what_is_missing_is_named(self) -> None:
        with pytest.raises(CapaProbeError, match="depth_kept lacks the columns task, layer, keep, score"):
            depth({name: own for name, own in table().items() if name != "depth_kept"})

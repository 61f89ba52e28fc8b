"""The set of figures: collected from runs, kept beside its tables, written with their hash, checked against them."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageColor
from typer.testing import CliRunner, Result

from capa_probe.cli import app
from capa_probe.demo import DEMO_MODELS
from capa_probe.errors import CapaProbeError
from capa_probe.figure_set import collect, keep_tables, kept_tables, stale, strays, tables_hash, write_set
from capa_probe.figure_set.writing import PIXELS_DPI, drawings
from capa_probe.figures.entry import Entry, Source
from capa_probe.figures.registry import ENTRIES, markdown
from capa_probe.figures.save import DATA_KEY, DPI, save, saved_data
from capa_probe.figures.score_ranks import score_ranks_tables
from capa_probe.figures.style import ROLES, styled
from capa_probe.tables import LayerProfile
from demo_training.training_table import training_table, write_training
from scripts import add_training_log, figures
from tests import benchmark_tables, runs

ROOT = Path(__file__).parents[1]
ORDER = tuple(model.folder for model in DEMO_MODELS.values())
NAMES = ("accuracy_budget", "score_ranks")
SOME = tuple(entry for entry in ENTRIES if entry.name in NAMES)


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["figures", *map(str, args)])


def refused(done: Result) -> str:
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark_tables.write_run(tmp_path_factory.mktemp("runs") / "one", benchmark_tables.tables())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "demo-small"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    results = {row.pop("task"): row for row in benchmark_tables.evaluation().to_dict("records")}
    (folder / "evaluation.json").write_text(json.dumps(results))
    write_training(benchmark_tables.log(), folder)
    return folder


@pytest.fixture(scope="module")
def kept(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of two figures with its tables."""
    folder = tmp_path_factory.mktemp("set")
    keep_tables(collect([run], SOME).models, folder)
    list(write_set(kept_tables(folder), folder, SOME, folders=True, small=True))
    return folder


class TestHash:
    def test_stays_the_same_on_disk(self, run: Path, tmp_path: Path) -> None:
        found = collect([run]).models
        keep_tables(found, tmp_path)
        again = kept_tables(tmp_path)
        assert list(again["small"]) == sorted(found["small"])
        for name in found["small"]:
            assert tables_hash({"small": again["small"][name]}) == tables_hash(
                {"small": found["small"][name]}
            )

    def test_is_another_one_after_any_change(self) -> None:
        table = pd.DataFrame({"layer": [1, 2], "value": [0.5, 0.25], "png": [b"a", b"b"]})
        table.attrs = {"tau": 5.0}
        other_number = table.assign(value=[0.5, np.nextafter(0.25, 1)])
        other_bytes = table.assign(png=[b"a", b"c"])
        other_attrs = table.copy()
        other_attrs.attrs = {"tau": 6.0}
        hashes = {
            tables_hash({"m": {"t": table}}),
            tables_hash({"m": {"u": table}}),
            tables_hash({"n": {"t": table}}),
            tables_hash({"m": {"t": table, "u": table}}),
            tables_hash({"m": {"t": other_number}}),
            tables_hash({"m": {"t": other_bytes}}),
            tables_hash({"m": {"t": other_attrs}}),
            tables_hash({"m": {"t": table.rename(columns={"layer": "step"})}}),
        }
        assert len(hashes) == 8
        assert tables_hash({"m": {"t": table.astype({"layer": "int32"})}}) in hashes  # however it is stored


class TestFiles:
    def test_say_which_data_they_were_drawn_from(self, kept: Path) -> None:
        for drawing in drawings(kept_tables(kept), SOME):
            assert re.fullmatch(r"[0-9a-f]{64}", drawing.data)
            with Image.open(kept / f"{drawing.file}.png") as image:
                assert image.info[DATA_KEY] == drawing.data
            assert f"<dc:identifier>sha256:{drawing.data}<" in (kept / f"{drawing.file}.svg").read_text()
            assert saved_data(kept / f"{drawing.file}.png") == drawing.data
            assert saved_data(kept / f"{drawing.file}.svg") == drawing.data

    def test_are_the_same_bytes_every_time(self, kept: Path, tmp_path: Path) -> None:
        files = list(write_set(kept_tables(kept), tmp_path, SOME, folders=True, small=True))
        assert sorted(file.name for file in files) == sorted(
            f"{n}.{s}" for n in NAMES for s in ("png", "svg")
        )
        for file in files:
            assert file.read_bytes() == (kept / file.name).read_bytes()
            assert b"20" + b"26-" not in file.read_bytes()[:2000]  # no date

    def test_without_a_hash_have_none(self, tmp_path: Path) -> None:
        png, svg = save(Figure(figsize=(1, 1)), tmp_path / "plain", svg=True)
        assert saved_data(png) is None
        assert saved_data(svg) is None
        assert saved_data(tmp_path / "nowhere.png") is None
        (tmp_path / "broken.png").write_bytes(b"nothing")
        assert saved_data(tmp_path / "broken.png") is None

    def test_a_shortened_drawing_says_the_same(self, tmp_path: Path) -> None:
        figure = Figure(figsize=(2, 2))
        axes = figure.subplots()
        axes.plot([0, 1, 2], [0, 1 / 3, 2 / 7], "o-", color="#0072B2", gid="mine")
        axes.errorbar([1], [0.3], yerr=[0.1], fmt="s", color="#D55E00")
        _, short = save(figure, tmp_path / "short", svg=True)
        save_plainly(figure, tmp_path / "long.svg", "short")
        one, other = (marks(file) for file in (short, tmp_path / "long.svg"))
        assert len(one) == len(other) > 20
        for (tag, look, numbers), (old_tag, old_look, old_numbers) in zip(one, other, strict=True):
            assert (tag, look) == (old_tag, old_look)
            np.testing.assert_allclose(numbers, old_numbers, atol=0.0051)
        assert short.stat().st_size < 0.9 * (tmp_path / "long.svg").stat().st_size

    def test_a_small_picture_looks_the_same(self, tmp_path: Path) -> None:
        figure = Figure(figsize=(2, 2))
        figure.subplots().plot([0, 1], [0, 1], color="#0072B2")
        (large,) = save(figure, tmp_path / "large", data="ab")
        (small,) = save(figure, tmp_path / "small", data="ab", small=True)
        assert small.stat().st_size < large.stat().st_size
        with Image.open(large) as one, Image.open(small) as two:
            assert one.size == two.size
            difference = np.asarray(one.convert("RGB"), dtype=int) - np.asarray(two.convert("RGB"))
        assert abs(difference).max() < 40
        assert saved_data(small) == "ab"

    def test_colours_that_stand_for_something_stay_in_a_small_picture(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        figure = Figure(figsize=(4, 4))
        axes = figure.subplots()
        axes.imshow(rng.uniform(size=(400, 400, 3)))  # of far more than 256 colours
        for number, (colour, marker) in enumerate(ROLES.values()):
            axes.plot([100 * (number + 1)], [200], marker, color=colour, markersize=9)
        (small,) = save(figure, tmp_path / "small", small=True)
        with Image.open(small) as image:
            found = {colour for _, colour in image.convert("RGB").getcolors(2**24) or ()}
            assert len(found) <= 256
        assert {ImageColor.getrgb(colour) for colour, _ in ROLES.values()} | {(255, 255, 255)} <= found

    def test_tables_that_cannot_be_written_leave_the_old_ones(
        self, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "set"
        shutil.copytree(kept, folder)
        before = {file: file.read_bytes() for file in folder.rglob("*.parquet")}

        def full(*args: object, **kwargs: object) -> None:
            raise OSError("No space left on device")

        tables = kept_tables(kept)
        monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
        with pytest.raises(OSError, match="No space left"):
            keep_tables(tables, folder)
        assert {file: file.read_bytes() for file in folder.rglob("*.parquet")} == before

    def test_tables_that_a_figure_no_longer_has_go(self, tmp_path: Path) -> None:
        table = pd.DataFrame({"a": [1]})
        keep_tables({"m": {"f": {"one": table, "two": table}}}, tmp_path)
        keep_tables({"m": {"f": {"two": table}}}, tmp_path)
        assert list(kept_tables(tmp_path)["m"]["f"]) == ["two"]


class TestStale:
    def test_a_fresh_set_is_up_to_date(self, kept: Path) -> None:
        assert list(stale(kept, entries=SOME)) == []

    def test_tells_of_other_tables_and_of_missing_and_foreign_files(self, kept: Path, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        shutil.copytree(kept, folder)
        file = folder / "data" / "small" / "score_ranks.knockout.parquet"
        table = pd.read_parquet(file)
        table.loc[0, "spearman"] += 1e-9
        table.to_parquet(file, index=False)
        (folder / "accuracy_budget.svg").unlink()
        (folder / "mine.png").write_bytes(b"")
        said = list(stale(folder, entries=SOME))
        assert len(said) == 4
        assert "accuracy_budget.svg is missing" in said[0]
        assert "score_ranks.png was not drawn from the tables" in said[1]
        assert "score_ranks.svg was not drawn from the tables" in said[2]
        assert "mine.png belongs to no figure" in said[3]
        assert [path.name for path in strays(folder, entries=SOME)] == ["mine.png"]

    def test_tables_of_other_figures_stay(self, kept: Path, run: Path, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        shutil.copytree(kept, folder)
        only = collect([run], [entry for entry in ENTRIES if entry.name == "score_ranks"])
        keep_tables(only.models, folder)
        assert set(kept_tables(folder)["small"]) == set(NAMES)

    def test_no_tables_and_damaged_ones(self, tmp_path: Path) -> None:
        with pytest.raises(CapaProbeError, match="holds no tables of figures"):
            kept_tables(tmp_path)
        (tmp_path / "data" / "m").mkdir(parents=True)
        (tmp_path / "data" / "m" / "a.b.parquet").write_bytes(b"nothing")
        with pytest.raises(CapaProbeError, match=r"a\.b\.parquet cannot be read"):
            kept_tables(tmp_path)

    def test_models_come_in_the_order_named(self, tmp_path: Path) -> None:
        table = pd.DataFrame({"a": [1]})
        for name in ("x", "b", "a"):
            keep_tables({name: {"f": {"t": table}}}, tmp_path)
        assert list(kept_tables(tmp_path, ("x", "nowhere"))) == ["x", "a", "b"]


class TestCollect:
    def test_runs_and_models_of_two_names(self, run: Path, model: Path, tmp_path: Path) -> None:
        other = benchmark_tables.write_run(tmp_path / "two", benchmark_tables.tables(5), "other")
        found = collect([run, other, model])
        assert list(found.models) == ["small", "other", "demo-small"]
        assert set(found.models["demo-small"]) == {"training"}
        assert found.left_out == ()
        pd.testing.assert_frame_equal(
            found.models["demo-small"]["training"]["training"],
            training_table(benchmark_tables.log()),
            check_dtype=False,
        )
        both = {d.file: list(d.models) for d in drawings(found.models)}
        assert both["accuracy_budget"] == ["small", "other"]
        assert both["training"] == ["demo-small"]

    def test_a_profile_and_a_confirmation_of_one_model(self, tmp_path: Path) -> None:
        prof = runs.write(tmp_path / "prof", weights_hash="hash of small", data_fingerprint="data")
        confirmed = benchmark_tables.write_run(tmp_path / "run", benchmark_tables.tables())
        (tables,) = collect([prof, confirmed]).models.values()
        whole = LayerProfile.load(prof).tokens
        whole = whole[(whole["kind"] == "visual") & (whole["step"] == 0)]
        points = tables["attention_contribution"]["points"]
        assert sorted(points["attention"]) == pytest.approx(sorted(whole["attention"]), rel=1e-6)
        assert (points["role"] != "non-sink").sum() == 3
        assert set(tables) >= {"attention_contribution", "ffn_cosine", "score_ranks"}

    def test_an_experiment_that_was_not_run_is_left_out_with_a_reason(self, tmp_path: Path) -> None:
        tables = {name: table for name, table in benchmark_tables.tables().items() if "knockout" not in name}
        found = collect([benchmark_tables.write_run(tmp_path / "run", tables)])
        assert "score_ranks" not in found.models["small"]
        (sentence,) = found.left_out
        assert sentence.startswith("score_ranks of small is left out: There is no table knockout")

    def test_a_table_without_rows_is_said(self, tmp_path: Path) -> None:
        tables = benchmark_tables.tables()
        empty = {name: tables[name].iloc[:0] for name in ("budget", "together", "over_steps", "knockout")}
        found = collect([benchmark_tables.write_run(tmp_path / "run", tables | empty)])
        assert set(found.models["small"]) == {"ffn_kinds", "sink_removal"}
        assert len(found.left_out) == 4
        for sentence in found.left_out:
            assert "has no rows of all tasks together; give a run of capa-probe confirm" in sentence

    def test_one_figure_for_each_model_where_that_is_better(self) -> None:
        entry = Entry(1, "own", "depth", (), "", lambda _: {}, lambda _: None, together=False)
        tables = {"a": {"own": {}}, "b": {"own": {}}}
        assert [d.file for d in drawings(tables, [entry])] == ["a/own", "b/own"]
        assert [d.file for d in drawings({"a": tables["a"]}, [entry])] == ["own"]
        assert [d.file for d in drawings({"a": tables["a"]}, [entry], folders=True)] == ["a/own"]

    def test_a_figure_that_cannot_be_drawn_does_not_keep_others_from_it(self, tmp_path: Path) -> None:
        def refuse(models: object) -> None:
            raise CapaProbeError("These runs do not go together.")

        bad = Entry(1, "bad", "depth", (), "", lambda _: {}, refuse, together=True)
        models = {"a": {"bad": {}, "score_ranks": score_ranks_tables(Source(benchmark_tables.tables()))}}
        said: list[str] = []
        files = list(write_set(models, tmp_path, [bad, *SOME], left_out=said))
        assert [file.name for file in files] == ["score_ranks.png", "score_ranks.svg"]
        assert said == ["bad is left out: These runs do not go together."]
        with pytest.raises(CapaProbeError, match="do not go together"):
            list(write_set(models, tmp_path, [bad]))

    def test_pictures_are_kept_as_a_smaller_png_alone(self, tmp_path: Path) -> None:
        tables = score_ranks_tables(Source(benchmark_tables.tables()))
        pictures = [replace(entry, pixels=True) for entry in SOME if entry.name == "score_ranks"]
        keep_tables({"a": {"score_ranks": tables}}, tmp_path)
        (small,) = write_set(kept_tables(tmp_path), tmp_path, pictures, folders=True, small=True)
        assert list(stale(tmp_path, entries=pictures)) == []
        files = list(write_set(kept_tables(tmp_path), tmp_path / "whole", pictures))
        assert [file.suffix for file in files] == [".png", ".svg"]
        with Image.open(small) as one, Image.open(files[0]) as other:
            assert one.width / other.width == pytest.approx(PIXELS_DPI / DPI, abs=0.01)


class TestCommand:
    def test_draws_what_the_runs_allow(self, run: Path, model: Path, tmp_path: Path) -> None:
        done = invoke(run, model, "--out", tmp_path / "out", "--only", "score_ranks,training", "--pdf")
        assert done.exit_code == 0, done.output
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == [f"{n}.{s}" for n in ("score_ranks", "training") for s in ("pdf", "png", "svg")]
        assert all(str(tmp_path / "out" / name) in done.stdout for name in names)
        pdf = (tmp_path / "out" / "training.pdf").read_bytes()
        assert f"sha256:{saved_data(tmp_path / 'out' / 'training.png')}".encode() in pdf

    def test_mistakes_are_one_line(self, run: Path, tmp_path: Path) -> None:
        assert "holds no run" in refused(invoke(tmp_path, "--out", tmp_path / "x"))
        assert "--only nothing was given; give some of" in refused(invoke(run, "--only", "nothing"))
        (tmp_path / "file").write_text("")
        assert "which is a file" in refused(invoke(run, "--out", tmp_path / "file"))
        assert "two runs of confirm" in refused(invoke(run, run, "--out", tmp_path / "x"))
        bare = tmp_path / "model"
        bare.mkdir()
        (bare / "config.json").write_text("{}")
        assert "holds a model without training.parquet" in refused(invoke(bare, "--out", tmp_path / "x"))
        (bare / "training.parquet").write_bytes(b"nothing")
        (bare / "evaluation.json").write_text("{}")
        assert "damaged training.parquet" in refused(invoke(bare, "--out", tmp_path / "x"))
        said = refused(invoke(run, "--only", "training", "--out", tmp_path / "x"))
        assert (
            "No figure can be drawn from what was given; figures are drawn so: training from the folder"
            in said
        )
        said = refused(invoke(run, "--only", "depth,depth_compared", "--out", tmp_path / "x"))
        assert "depth from a run of depth; depth_compared from a run of depth of each of 2 models." in said
        assert not (tmp_path / "x").exists()


def test_the_log_of_a_training_is_added_to_a_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, log = tmp_path / "model", tmp_path / "log.jsonl"
    shutil.copytree(model, folder)
    (folder / "training.parquet").unlink()
    log.write_text("".join(json.dumps(line) + "\n" for line in benchmark_tables.log()))
    add_training_log.main([str(log), str(folder)])
    assert (folder / "training.parquet").read_bytes() == (model / "training.parquet").read_bytes()
    other, empty = tmp_path / "other.jsonl", tmp_path / "empty.jsonl"
    other.write_text(json.dumps(benchmark_tables.log()[0]) + '\n{"step": 1}\n')
    empty.write_text("")
    for args in (
        [str(tmp_path / "no.jsonl"), str(folder)],
        [str(log), str(tmp_path)],
        [str(other), str(folder)],
        [str(empty), str(folder)],
    ):
        with pytest.raises(SystemExit, match="2"):
            add_training_log.main(args)
        assert "give the" in capsys.readouterr().err
    assert (folder / "training.parquet").read_bytes() == (model / "training.parquet").read_bytes()


class TestShipped:
    def test_every_figure_is_up_to_date_with_its_tables(self) -> None:
        assert list(stale(ROOT / "figures", ORDER)) == []

    def test_every_figure_is_what_the_code_draws(self, tmp_path: Path) -> None:
        """But for the last digits, which may differ between machines."""
        for file in write_set(kept_tables(ROOT / "figures", ORDER), tmp_path, folders=True, small=True):
            if file.suffix == ".svg":
                shipped = ROOT / "figures" / file.relative_to(tmp_path)
                (text, numbers), (old_text, old_numbers) = shape(file), shape(shipped)
                assert text == old_text, f"{shipped} is out of date; run scripts/figures.py"
                np.testing.assert_allclose(numbers, old_numbers, atol=0.02, err_msg=str(shipped))
            elif file.stem in {entry.name for entry in ENTRIES if entry.pixels}:
                shipped = ROOT / "figures" / file.relative_to(tmp_path)
                with Image.open(file) as one, Image.open(shipped) as other:
                    assert one.size == other.size, f"{shipped} is out of date; run scripts/figures.py"
                    difference = np.asarray(one.convert("L"), float) - np.asarray(other.convert("L"), float)
                assert abs(difference).mean() < 1, f"{shipped} is out of date; run scripts/figures.py"

    def test_every_figure_is_there_for_the_first_demo_model(self) -> None:
        own = kept_tables(ROOT / "figures", ORDER)[ORDER[0]]
        assert set(own) == {entry.data for entry in ENTRIES}

    def test_the_set_is_small(self) -> None:
        files = [path for path in (ROOT / "figures").rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files if path.suffix != ".svg") < 4_000_000

    def test_the_table_in_the_docs_is_the_registry(self) -> None:
        page = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
        assert figures.TABLE.written(page, f"{markdown()}\n") == page
        for entry in ENTRIES:
            assert f"| `{entry.name}` | {entry.claim} |" in markdown()
            assert f"/{entry.name}.png)" in page or entry.fewest > 1

    def test_the_script_says_so(self, kept: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        with pytest.raises(SystemExit) as ended:
            figures.main(["--check"])
        assert ended.value.code == 0
        assert capsys.readouterr().out == "up to date\n"
        shutil.copytree(kept, tmp_path / "set")
        (tmp_path / "set" / "score_ranks.png").unlink()
        with pytest.raises(SystemExit) as ended:
            figures.main(["--check", "--out", str(tmp_path / "set")])
        assert ended.value.code == 1
        assert "score_ranks.png is missing" in capsys.readouterr().out


def test_the_script_draws_only_some(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    figures.main([str(run), "--out", str(out), "--only", "score_ranks, accuracy_budget"])
    assert sorted(path.stem for path in out.glob("*.png")) == sorted(NAMES)
    assert set(kept_tables(out)["small"]) == set(NAMES)
    before = (out / "accuracy_budget.png").stat().st_mtime_ns
    (out / "mine.png").write_bytes(b"somebody's own")
    capsys.readouterr()
    figures.main([str(run), "--out", str(out), "--only", "score_ranks"])
    assert (out / "accuracy_budget.png").stat().st_mtime_ns == before
    assert (out / "mine.png").read_bytes() == b"somebody's own"
    assert f"{out / 'mine.png'} belongs to no figure of the set" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        figures.main([str(run), "--out", str(out), "--only", "nothing"])
    assert "--only nothing was given; give some of" in capsys.readouterr().err


def test_the_script_takes_runs_of_families(run: Path, tmp_path: Path) -> None:
    families = tmp_path / "runs"
    for family in ("llava", "internvl"):
        (families / f"{family}-confirm").mkdir(parents=True)
    with pytest.raises(CapaProbeError, match="holds no run of a demo model; make them with"):
        list(figures.runs_of_families(tmp_path / "nowhere"))
    found = list(figures.runs_of_families(families))
    assert [path.name for path in found if path.parent == families] == ["llava-confirm", "internvl-confirm"]
    assert ROOT / "data" / "demo-lvlm" in found


@styled
def save_plainly(figure: Figure, file: Path, salt: str) -> None:
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(file, dpi=DPI)


def marks(file: Path) -> list[tuple[str, str, list[float]]]:
    """What an SVG draws, in order: kind, style, own or of the group that it is in, and coordinates."""
    found = []

    def walk(element: ET.Element, inherited: str) -> None:
        own = element.get("style") or inherited
        tag = element.tag.rpartition("}")[2]
        if tag in ("path", "use"):
            said = " ".join(element.get(name, "") for name in ("d", "x", "y"))
            numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", said)]
            found.append((tag, own.replace("; ", ";"), numbers))
        for child in element:
            walk(child, own)

    walk(ET.parse(file).getroot(), "")
    return found


def shape(file: Path) -> tuple[str, np.ndarray]:
    """An SVG without embedded pixels and ids that are hashes: its text with 0 for every number, and those."""
    text = re.sub(r"base64,[^\"]*", "", file.read_text(encoding="utf-8"))
    text = re.sub(r"\b[A-Za-z][0-9a-f]{10}\b", "id", text)
    number = re.compile(r"-?\d+(?:\.\d+)?")
    return number.sub("0", text), np.array([float(value) for value in number.findall(text)])

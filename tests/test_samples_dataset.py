"""Hugging Face datasets, built here: every form on disk, every form of column, and what a wrong name is told."""

from __future__ import annotations

import gc
import io
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

from capa_probe.errors import BadImageError, CapaProbeError
from capa_probe.samples import DatasetSamples, Sample, data_fingerprint, load_samples
from capa_probe.samples.rows import Columns, RowReader

IMAGE = datasets.Image()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of a test is kept, and nothing of the user's cache is read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if not shown:
        datasets.enable_progress_bars()


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def vqa(n: int = 4, first: int = 0) -> Dataset:
    """Rows as in VQAv2: ten answers a question, as dicts, and integers for ids."""
    rows = range(first, first + n)
    features = {
        "question_id": Value("int64"),
        "question": Value("string"),
        "image": IMAGE,
        "answers": List({"answer": Value("string"), "answer_id": Value("int64")}),
        "question_type": Value("string"),
    }
    columns = {
        "question_id": [1000 + i for i in rows],
        "question": [f"question {i}" for i in rows],
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in rows],
        "answers": [[{"answer": f"answer {i}.{k}", "answer_id": k} for k in range(10)] for i in rows],
        "question_type": ["what" if i % 2 else "how many" for i in rows],
    }
    return Dataset.from_dict(columns, features=Features(features))


VQA = {"answers": "answers", "id": "question_id", "task": "question_type"}


def check_vqa(samples: Sequence[Sample], n: int = 4, first: int = 0) -> None:
    assert len(samples) == n
    for i, sample in enumerate(samples, start=first):
        assert (sample.id, sample.question) == (str(1000 + i), f"question {i}")
        assert sample.answers == tuple(f"answer {i}.{k}" for k in range(10))
        assert sample.task == ("what" if i % 2 else "how many")
        (image,) = sample.open_images()
        assert (image.size, image.getpixel((0, 0))) == ((4, 3), (i, 0, 0))


def saved(folder: Path, columns: dict[str, list[Any]], features: dict[str, Any] | None = None) -> Path:
    Dataset.from_dict(columns, features=features and Features(features)).save_to_disk(folder)
    return folder


class TestForms:
    """The same rows, in every form in which they can lie on disk."""

    def test_save_to_disk(self, tmp_path: Path) -> None:
        vqa().save_to_disk(tmp_path / "one")
        check_vqa(load_samples(tmp_path / "one", **VQA))
        check_vqa(load_samples(str(tmp_path / "one"), limit=2, **VQA), n=2)

    def test_save_to_disk_with_splits(self, tmp_path: Path) -> None:
        DatasetDict({"train": vqa(3), "test": vqa(2, first=10)}).save_to_disk(tmp_path / "two")
        check_vqa(load_samples(tmp_path / "two", split="test", **VQA), n=2, first=10)
        with pytest.raises(
            CapaProbeError, match="no split was given for .*; give one of its splits: train, test"
        ):
            load_samples(tmp_path / "two", **VQA)
        with pytest.raises(CapaProbeError, match="split='val' was given for .*: train, test"):
            load_samples(tmp_path / "two", split="val", **VQA)

    def test_a_file_of_parquet(self, tmp_path: Path) -> None:
        file = tmp_path / "rows [1].parquet"  # no pattern
        vqa().to_parquet(file)
        check_vqa(load_samples(file, **VQA))

    def test_a_folder_of_parquet_with_splits(self, tmp_path: Path) -> None:
        vqa(3).to_parquet(tmp_path / "train-00000-of-00001.parquet")
        vqa(2, first=10).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
        check_vqa(load_samples(tmp_path, split="validation", **VQA), n=2, first=10)
        with pytest.raises(CapaProbeError, match="no split was given for .*: train, validation"):
            load_samples(tmp_path, **VQA)
        with pytest.raises(CapaProbeError, match="split='test' was given for .*: train, validation"):
            load_samples(tmp_path, split="test", **VQA)

    def test_stored_paths_relative_to_the_table(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "0.png").write_bytes(png(0))
        monkeypatch.chdir(tmp_path)  # only to write the table
        paths = datasets.Dataset.from_dict({"image": ["images/0.png"], "question": ["a"]})
        paths.cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
        monkeypatch.chdir("/")
        (sample,) = load_samples(tmp_path / "rows.parquet")
        assert sample.open_images()[0].getpixel((0, 0)) == (0, 0, 0)

    def test_a_folder_named_as_a_builder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "csv").mkdir()
        vqa().to_parquet(tmp_path / "csv" / "rows.parquet")
        check_vqa(load_samples("csv", **VQA))

    @pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
    def test_tables_with_paths_beside_the_images(self, tmp_path: Path, suffix: str) -> None:
        (tmp_path / "pictures").mkdir()
        rows = [{"picture": f"pictures/{i}.png", "q": f"why {i}", "a": i} for i in range(3)]
        for i in range(3):
            (tmp_path / "pictures" / f"{i}.png").write_bytes(png(i))
        lines = ["picture,q,a", *(",".join(map(str, row.values())) for row in rows)]
        text = "\n".join(lines if suffix == ".csv" else map(json.dumps, rows))
        (tmp_path / f"table{suffix}").write_text(text + "\n")
        for source in (tmp_path / f"table{suffix}", tmp_path):
            samples = load_samples(source, image="picture", question="q", answers="a")
            assert [(s.id, s.question, s.answers) for s in samples] == [
                (str(i), f"why {i}", (str(i),)) for i in range(3)
            ]
            assert [s.open_images()[0].getpixel((0, 0)) for s in samples] == [(i, 0, 0) for i in range(3)]

    # The library leaves the table open.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_a_folder_of_images_with_metadata(self, tmp_path: Path) -> None:
        for i in range(3):
            (tmp_path / f"{i}.png").write_bytes(png(i))
        (tmp_path / "metadata.csv").write_text("file_name,question\n0.png,a\n1.png,b\n2.png,c\n")
        samples = load_samples(tmp_path)
        assert [sample.question for sample in samples] == ["a", "b", "c"]
        assert [s.open_images()[0].getpixel((0, 0)) for s in samples] == [(i, 0, 0) for i in range(3)]
        gc.collect()  # while the warning is expected

    def test_configurations(self, tmp_path: Path) -> None:
        (tmp_path / "easy").mkdir()
        (tmp_path / "hard").mkdir()
        vqa(2).to_parquet(tmp_path / "easy" / "test.parquet")
        vqa(3, first=10).to_parquet(tmp_path / "hard" / "test.parquet")
        configs = "".join(
            f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test.parquet\n"
            for name in ("easy", "hard")
        )
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
        check_vqa(load_samples(tmp_path, config="hard", **VQA), n=3, first=10)
        for config in (None, "harder"):
            with pytest.raises(CapaProbeError, match=f"config={config!r} was given for .*: easy, hard"):
                load_samples(tmp_path, config=config, **VQA)

    def test_streamed(self, tmp_path: Path) -> None:
        vqa(6).to_parquet(tmp_path / "rows.parquet")
        samples = load_samples(tmp_path, limit=3, streaming=True, **VQA)
        check_vqa(samples, n=3)
        with pytest.raises(CapaProbeError, match="streaming was given without a limit"):
            load_samples(tmp_path, streaming=True, **VQA)
        with pytest.raises(
            CapaProbeError, match=r"has no column 'picture'; .*\(it has: question_id, question,"
        ):
            load_samples(tmp_path, limit=3, streaming=True, image="picture")

    def test_streamed_csv(self, tmp_path: Path) -> None:
        (tmp_path / "0.png").write_bytes(png(7))
        (tmp_path / "rows.csv").write_text("image,question\n0.png,a\n0.png,b\n")
        samples = load_samples(tmp_path / "rows.csv", limit=5, streaming=True)
        assert [sample.question for sample in samples] == ["a", "b"]
        assert samples[1].open_images()[0].getpixel((0, 0)) == (7, 0, 0)

    def test_same_images_same_fingerprint_as_files(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "set", {"image": [png(1), png(2)], "question": ["a", "b"]})
        files = [tmp_path / "1.png", tmp_path / "2.png"]
        for file, shade in zip(files, (1, 2), strict=True):
            file.write_bytes(png(shade))
        by_hand = [Sample(str(i), file, "ab"[i]) for i, file in enumerate(files)]
        assert data_fingerprint(load_samples(folder)) == data_fingerprint(by_hand)


class TestLaziness:
    def test_a_sequence_that_decodes_nothing(self, tmp_path: Path) -> None:
        rows = {"image": [{"bytes": b"no image", "path": None}, {"bytes": png(3), "path": None}]}
        folder = saved(
            tmp_path / "set", {**rows, "question": ["a", "b"]}, {"image": IMAGE, "question": Value("string")}
        )
        samples = load_samples(folder)
        assert isinstance(samples, DatasetSamples)
        assert samples[1].open_images()[0].getpixel((0, 0)) == (3, 0, 0)
        assert samples[0].images == (b"no image",)
        with pytest.raises(BadImageError, match="number 1, given in memory, of sample '0' cannot be read"):
            samples[0].open_images()

    def test_samples_are_made_when_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        vqa(20).save_to_disk(tmp_path / "set")
        samples = load_samples(tmp_path / "set", **VQA)
        made: list[str] = []
        init = Sample.__init__

        def counting(self: Sample, id: str, *args: Any, **kwargs: Any) -> None:  # noqa: A002
            made.append(id)
            init(self, id, *args, **kwargs)

        monkeypatch.setattr(Sample, "__init__", counting)
        part = samples[5:15][::2]
        assert made == []
        assert [sample.id for sample in part] == made == ["1005", "1007", "1009", "1011", "1013"]

    def test_indexing_as_in_a_list(self, tmp_path: Path) -> None:
        vqa(5).save_to_disk(tmp_path / "set")
        samples = load_samples(tmp_path / "set", **VQA)
        listed = list(samples)
        assert isinstance(samples, DatasetSamples)
        assert (samples[-1], samples[2]) == (listed[4], listed[2])
        assert list(samples[1:3]) == listed[1:3]
        assert list(samples[::-1]) == listed[::-1]
        assert listed[3] in samples
        with pytest.raises(IndexError):
            samples[5]
        assert repr(samples) == f"<5 samples of dataset {tmp_path / 'set'}>"

    def test_datasets_is_imported_only_for_datasets(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(png(1))
        code = (
            "import sys, capa_probe as cp; "
            f"cp.load_samples({str(tmp_path)!r}, prompt='q')[0].open_images(); print('datasets' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"


class TestColumns:
    def one(
        self, folder: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, **names: Any
    ) -> Sample:
        given = {"image": png(1), "question": "q", **columns}
        rows = {name: [value] for name, value in given.items()}
        if features is not None:
            features = {"image": Value("binary"), "question": Value("string"), **features}
        (sample,) = load_samples(saved(folder / "set", rows, features), **names)
        return sample

    @pytest.mark.parametrize(
        ("value", "feature", "n"),
        [
            ({"bytes": png(1), "path": None}, IMAGE, 1),
            ([{"bytes": png(i), "path": None} for i in (1, 2)], List(IMAGE), 2),
            (png(1), Value("binary"), 1),
            ([png(1), png(2)], List(Value("binary")), 2),
            # As a table of parquet holds images whose features are not written beside it.
            ({"bytes": png(1), "path": "a.png"}, {"bytes": Value("binary"), "path": Value("string")}, 1),
            ([], List(IMAGE), 0),
            (None, IMAGE, 0),
        ],
    )
    def test_images(self, tmp_path: Path, value: Any, feature: Any, n: int) -> None:
        sample = self.one(tmp_path, {"image": value}, {"image": feature})
        assert [image.getpixel((0, 0)) for image in sample.open_images()] == [
            (i, 0, 0) for i in range(1, n + 1)
        ]
        assert all(isinstance(source, bytes) for source in sample.images)

    def test_image_paths(self, tmp_path: Path) -> None:
        sample = self.one(tmp_path, {"image": ["in/a.png", "b.png"]}, {"image": List(Value("string"))})
        assert sample.images == (tmp_path / "set" / "in/a.png", tmp_path / "set" / "b.png")

    def test_images_stored_as_paths(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(png(9))
        sample = self.one(tmp_path, {"image": str(tmp_path / "a.png")}, {"image": IMAGE})
        assert sample.open_images()[0].getpixel((0, 0)) == (9, 0, 0)

    def test_images_in_an_archive_that_is_streamed(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
            archive.writestr("a.png", png(9))
        url = f"zip://a.png::{tmp_path / 'pictures.zip'}"
        reader = RowReader(Columns(("image",), None), "why?", "dataset x", None, {})
        sample = reader.sample(0, {"image": {"bytes": None, "path": url}})
        assert sample.open_images()[0].getpixel((0, 0)) == (9, 0, 0)
        gone = reader.sample(0, {"image": {"bytes": None, "path": url.replace("a.png", "b.png")}})
        with pytest.raises(BadImageError, match=r"b\.png.* of sample '0' does not exist"):
            gone.open_images()
        with pytest.raises(CapaProbeError, match=r"row 0: column 'image' holds a path \('a.png'\), but"):
            reader.sample(0, {"image": "a.png"})

    def test_images_in_several_columns(self, tmp_path: Path) -> None:
        sample = self.one(
            tmp_path,
            {"image_1": png(1), "image_2": None, "image_3": png(3)},
            {name: Value("binary") for name in ("image_1", "image_2", "image_3")},
            image=["image_1", "image_2", "image_3"],
        )
        assert [image.getpixel((0, 0)) for image in sample.open_images()] == [(1, 0, 0), (3, 0, 0)]

    @pytest.mark.parametrize(
        ("value", "feature", "expected"),
        [
            ("red", Value("string"), ("red",)),
            (3, Value("int64"), ("3",)),
            (None, Value("string"), ()),
            (["red", "crimson"], List(Value("string")), ("red", "crimson")),
            ([1, 2], List(Value("int64")), ("1", "2")),
            ([], List(Value("string")), ()),
            (["red", None], List(Value("string")), ("red",)),
            (
                [{"answer": "red", "answer_id": 1}],
                List({"answer": Value("string"), "answer_id": Value("int64")}),
                ("red",),
            ),
            ({"answer": ["red", "crimson"]}, {"answer": List(Value("string"))}, ("red", "crimson")),
            ({"answer": "red"}, {"answer": Value("string")}, ("red",)),
            (1, ClassLabel(names=["no", "yes"]), ("yes",)),
            ([1, 0], List(ClassLabel(names=["no", "yes"])), ("yes", "no")),
            (-1, ClassLabel(names=["no", "yes"]), ("-1",)),
        ],
    )
    def test_answers(self, tmp_path: Path, value: Any, feature: Any, expected: tuple[str, ...]) -> None:
        sample = self.one(tmp_path, {"a": value}, {"a": feature}, answers="a")
        assert sample.answers == expected

    @pytest.mark.parametrize(
        ("value", "what"),
        [
            (1.5, "a value of type float"),
            (True, "a value of type bool"),
            ({"text": "red"}, "a dict with 'text'"),
        ],
    )
    def test_answers_of_another_kind_are_refused(self, tmp_path: Path, value: Any, what: str) -> None:
        with pytest.raises(
            CapaProbeError, match=f"row 0: column 'a' holds {what}; give a column of strings or int"
        ):
            self.one(tmp_path, {"a": value}, answers="a")

    def test_ids_and_tasks(self, tmp_path: Path) -> None:
        sample = self.one(
            tmp_path,
            {"key": "x-1", "t": 1},
            {"key": Value("string"), "t": ClassLabel(names=["a", "b"])},
            id="key",
            task="t",
        )
        assert (sample.id, sample.task) == ("x-1", "b")

    def test_rows_are_counted_without_ids(self, tmp_path: Path) -> None:
        vqa(3, first=5).save_to_disk(tmp_path / "set")
        assert [sample.id for sample in load_samples(tmp_path / "set")] == ["0", "1", "2"]

    def test_a_prompt_for_questions(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "set", {"image": [png(1), png(2)]})
        assert [sample.question for sample in load_samples(folder, prompt="why?")] == ["why?"] * 2
        with pytest.raises(
            CapaProbeError, match=r"prompt='why\?' and question='q' were given .* one of the two"
        ):
            load_samples(folder, prompt="why?", question="q")


class TestWhatIsWrong:
    """One sentence each, and before any sample is handed out."""

    def refused(self, match: str, source: Path | str, **options: Any) -> None:
        with pytest.raises(CapaProbeError, match=match) as caught:
            load_samples(source, **options)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(".")

    def test_a_missing_column(self, tmp_path: Path) -> None:
        vqa().save_to_disk(tmp_path)
        there = r"\(it has: question_id, question, image, answers, question_type\)"
        for option in ("image", "question", "answers", "id", "task"):
            self.refused(f"has no column 'nope'; .* {there}", tmp_path, **{option: "nope"})
        self.refused("'' was given as the name of a column", tmp_path, id="")

    @pytest.mark.parametrize(("value", "kind"), [(3, "int"), (2.5, "float")])
    def test_no_images_in_the_column(self, tmp_path: Path, value: Any, kind: str) -> None:
        saved(tmp_path, {"image": [value], "question": ["q"]})
        self.refused(f"row 0: column 'image' holds a value of type {kind}; give a column of images", tmp_path)

    @pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", ""])
    def test_image_paths_that_lead_out(self, tmp_path: Path, name: str) -> None:
        saved(tmp_path, {"image": [name], "question": ["q"]})
        self.refused(f"row 0: image '{name}' is not a file in", tmp_path)

    @pytest.mark.parametrize("value", [None, "", "  "])
    def test_an_empty_question(self, tmp_path: Path, value: str | None) -> None:
        saved(tmp_path, {"image": [png(1)] * 3, "question": ["a", "b", value]})
        self.refused(f"row 2: column 'question' holds {value!r}; a question must be a string", tmp_path)
        assert len(load_samples(tmp_path, limit=2)) == 2

    def test_no_question_at_all(self, tmp_path: Path) -> None:
        saved(tmp_path, {"image": [png(1)], "question": [17]})
        self.refused("row 0: column 'question' holds 17; a question must be a string", tmp_path)

    def test_ids_that_come_twice(self, tmp_path: Path) -> None:
        saved(tmp_path, {"image": [png(1)] * 3, "question": ["q"] * 3, "key": [4, 5, 4]})
        self.refused("row 2: id '4' in column 'key' was already used in row 0", tmp_path, id="key")
        assert len(load_samples(tmp_path, limit=2, id="key")) == 2

    @pytest.mark.parametrize("value", [1.5, True, None, ""])
    def test_ids_that_are_none(self, tmp_path: Path, value: Any) -> None:
        saved(
            tmp_path,
            {
                "image": [png(1)] * 2,
                "question": ["q"] * 2,
                "key": [type(value)(), value] if value else [value] * 2,
            },
        )
        self.refused(
            r"row \d: column 'key' holds .*; an id must be a string that is not empty, or an int",
            tmp_path,
            id="key",
        )

    def test_no_rows(self, tmp_path: Path) -> None:
        vqa(0).to_parquet(tmp_path / "rows.parquet")
        self.refused('cannot be read .*"train" corresponds to no data', tmp_path)
        self.refused("holds no rows; give one that does", tmp_path, streaming=True, limit=2)

    def test_broken_files(self, tmp_path: Path) -> None:
        (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
        self.refused(r"dataset .* cannot be read \(Parquet magic bytes not found", tmp_path)
        vqa().save_to_disk(tmp_path / "set")
        (tmp_path / "set" / "data-00000-of-00001.arrow").unlink()
        self.refused(r"dataset .* cannot be read \(.*No such file", tmp_path / "set")

    def test_options_of_other_forms(self, tmp_path: Path) -> None:
        vqa().save_to_disk(tmp_path / "set")
        self.refused(
            "config='x' was given for .*, a saved dataset; leave it out", tmp_path / "set", config="x"
        )
        self.refused(
            r"split='test' was given for .*, which is a single split", tmp_path / "set", split="test"
        )

    def test_code_is_never_run(self, tmp_path: Path) -> None:
        folder = tmp_path / "scripted"
        folder.mkdir()
        (folder / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        self.refused("cannot be read", folder, question="q")
        assert not (tmp_path / "ran").exists()

    def test_an_unknown_name_is_refused_at_once_when_offline(self) -> None:
        start = time.perf_counter()
        self.refused(
            "dataset lmms-lab/NoSuchSet is no file or folder here, .* hub cannot be reached",
            "lmms-lab/NoSuchSet",
        )
        assert time.perf_counter() - start < 5

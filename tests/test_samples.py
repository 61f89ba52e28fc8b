"""Samples: what they accept, what a data folder must hold, and what a bad one is told."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from capa_probe.errors import BadImageError, CapaProbeError
from capa_probe.samples import Fingerprint, Sample, data_fingerprint, load_samples, sample_digest


def write_folder(folder: Path, records: list[Any], images: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for shade, name in enumerate(images):
        Image.new("RGB", (4, 3), (40 * shade, 0, 0)).save(folder / name)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def record(**changes: Any) -> dict[str, Any]:
    fields = {"id": "s1", "image": "a.png", "question": "what color is the circle", "answers": ["red"]}
    fields.update(changes)
    return {name: value for name, value in fields.items() if value is not ...}


class TestSample:
    def test_one_image_or_a_list_become_a_tuple(self) -> None:
        image = Image.new("RGB", (2, 2))
        assert Sample("a", image, "q").images == (image,)
        assert Sample("a", "x.png", "q").images == ("x.png",)
        assert Sample("a", [Path("x.png"), image], "q").images == (Path("x.png"), image)
        assert Sample("a", [], "q").images == ()

    def test_bytes_are_one_image_and_not_printed_in_full(self) -> None:
        data = bytes(100_000)
        assert Sample("a", data, "q").images == (data,)
        assert Sample("a", [data, "x.png"], "q").images == (data, "x.png")
        assert len(repr(Sample("a", data, "q"))) < 300
        with pytest.raises(CapaProbeError) as caught:
            Sample("a", [data, 5], "q")  # type: ignore[list-item]
        assert len(str(caught.value)) < 400

    def test_answers(self) -> None:
        assert Sample("a", [], "q").answers == ()
        assert Sample("a", [], "q", "red").answers == ("red",)
        assert Sample("a", [], "q", ["red", "crimson"]).answers == ("red", "crimson")

    def test_regions_become_tuples(self) -> None:
        sample = Sample("a", ["x.png", "y.png"], "q", regions=[[[0, 1, 2.5, 3]], []])
        assert sample.regions == (((0, 1, 2.5, 3),), ())
        assert hash(sample) == hash(Sample("a", ["x.png", "y.png"], "q", regions=[[(0, 1, 2.5, 3)], ()]))
        assert "regions=(((0, 1, 2.5, 3),), ())" in repr(sample)
        assert Sample("a", "x.png", "q").regions is None
        assert "regions" not in repr(Sample("a", "x.png", "q"))

    @pytest.mark.parametrize(
        ("regions", "message"),
        [
            ([], r"regions=\[\] was given for sample 'a'; give one list of boxes .* \(it has 1\)"),
            ([[], []], "it has 1"),
            (5, "regions=5 was given"),
            (["abcd"], "the region 'a' was given"),
            (
                [[[0, 0, 5]]],
                r"the region \[0, 0, 5\] was given for sample 'a'; give \[left, top, right, bottom\]",
            ),
            ([[[5, 0, 5, 5]]], "left < right"),
            ([[[0, 6, 5, 5]]], "top < bottom"),
            ([[[-1, 0, 5, 5]]], "none negative"),
            ([[[0, 0, float("inf"), 5]]], "inf"),
            ([[[0, 0, float("nan"), 5]]], "nan"),
            ([[[0, 0, True, 5]]], "True"),
            ([[["0", 0, 5, 5]]], "'0'"),
        ],
    )
    def test_regions_that_are_none(self, regions: Any, message: str) -> None:
        with pytest.raises(CapaProbeError, match=message):
            Sample("a", "x.png", "q", regions=regions)

    def test_frozen_equal_and_replaceable(self) -> None:
        sample = Sample("a", "x.png", "q", ("yes",), "existence")
        assert sample == Sample("a", ["x.png"], "q", ["yes"], "existence")
        assert hash(sample) == hash(Sample("a", ["x.png"], "q", ["yes"], "existence"))
        assert dataclasses.replace(sample, id="b").id == "b"
        with pytest.raises(dataclasses.FrozenInstanceError):
            sample.id = "b"  # type: ignore[misc]

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"id": ""}, "id=''"),
            ({"id": 3}, "id=3"),
            ({"question": "  "}, "question='  ' was given for sample 'a'"),
            ({"question": None}, "question=None"),
            ({"images": 5}, "images=5"),
            ({"images": ["a.png", 5]}, "give a PIL image, a path, the bytes of an image file, or a list"),
            ({"answers": [1]}, r"answers=\[1\]"),
            ({"answers": None}, "answers=None"),
            ({"answers": b"red"}, "answers=b'red'"),
            ({"task": 1}, "task=1"),
        ],
    )
    def test_bad_fields_are_named(self, fields: dict[str, Any], message: str) -> None:
        good: dict[str, Any] = {"id": "a", "images": "x.png", "question": "q"}
        with pytest.raises(CapaProbeError, match=message):
            Sample(**{**good, **fields})


class TestOpenImages:
    def test_files_and_images_in_order(self, tmp_path: Path) -> None:
        Image.new("RGB", (4, 3), "red").save(tmp_path / "red.png")
        sample = Sample("a", [tmp_path / "red.png", Image.new("RGB", (2, 2), "blue")], "q")
        red, blue = sample.open_images()
        assert (red.size, red.getpixel((0, 0))) == ((4, 3), (255, 0, 0))
        assert (blue.size, blue.getpixel((0, 0))) == ((2, 2), (0, 0, 255))

    def test_the_callers_image_is_not_handed_out(self) -> None:
        mine = Image.new("RGB", (2, 2), "blue")
        Sample("a", mine, "q").open_images()[0].putpixel((0, 0), (9, 9, 9))
        assert mine.getpixel((0, 0)) == (0, 0, 255)

    def test_bytes_of_a_file(self, tmp_path: Path) -> None:
        Image.new("RGB", (4, 3), "red").save(tmp_path / "red.png")
        (opened,) = Sample("a", (tmp_path / "red.png").read_bytes(), "q").open_images()
        assert (opened.size, opened.getpixel((0, 0))) == ((4, 3), (255, 0, 0))

    def test_missing_and_broken_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(CapaProbeError, match=r"gone\.png of sample 'a' does not exist"):
            Sample("a", tmp_path / "gone.png", "q").open_images()
        (tmp_path / "text.png").write_text("no image")
        with pytest.raises(CapaProbeError, match=r"text\.png of sample 'a' cannot be read as an image"):
            Sample("a", tmp_path / "text.png", "q").open_images()
        Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
        (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
        with pytest.raises(CapaProbeError, match=r"cut\.png of sample 'a' cannot be read as an image"):
            Sample("a", tmp_path / "cut.png", "q").open_images()


class TestLoadSamples:
    def test_a_folder(self, tmp_path: Path) -> None:
        folder = write_folder(
            tmp_path / "data",
            [
                record(),
                record(
                    id=2,
                    image=...,
                    images=["b.png", "a.png"],
                    answers=...,
                    task="compare",
                    note="ignored",
                    regions=[[[0, 0, 2, 1]], []],
                ),
                "",
                record(id="none", image=..., images=[], question="où?"),
            ],
        )
        first, second, third = load_samples(folder)
        assert first == Sample("s1", folder / "a.png", "what color is the circle", ("red",))
        assert (second.id, second.task, second.answers) == ("2", "compare", ())
        assert second.regions == (((0, 0, 2, 1),), ())
        assert [image.getpixel((0, 0)) for image in second.open_images()] == [(40, 0, 0), (0, 0, 0)]
        assert (third.images, third.question) == ((), "où?")
        assert load_samples(str(folder / "samples.jsonl")) == [first, second, third]

    def test_regions_that_fit_no_image_are_named_with_their_line(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path, [record(), record(id="s2", regions=[[], []])])
        with pytest.raises(CapaProbeError, match=r"line 2: regions=\[\[\], \[\]\] was given for sample 's2'"):
            load_samples(folder)

    def test_images_are_looked_at_later(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path, [record(), record(id="gone", image="gone.png")])
        good, gone = load_samples(folder)
        assert len(good.open_images()) == 1
        with pytest.raises(BadImageError, match=r"gone\.png of sample 'gone' does not exist") as caught:
            gone.open_images()
        assert (caught.value.image, caught.value.sample) == (str(folder / "gone.png"), "gone")

    def test_limit(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path, [record(id=str(i)) for i in range(5)] + ["broken"])
        assert [sample.id for sample in load_samples(folder, limit=3)] == ["0", "1", "2"]
        assert len(load_samples(folder, limit=5)) == 5
        with pytest.raises(CapaProbeError, match="limit=0"):
            load_samples(folder, limit=0)

    def test_byte_order_mark(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path, [record()])
        text = (folder / "samples.jsonl").read_text(encoding="utf-8")
        (folder / "samples.jsonl").write_text(text, encoding="utf-8-sig")
        assert len(load_samples(folder)) == 1

    def test_no_folder_no_file_no_sample(self, tmp_path: Path) -> None:
        with pytest.raises(CapaProbeError, match=r"nowhere does not exist; give a folder with samples"):
            load_samples(tmp_path / "nowhere")
        with pytest.raises(CapaProbeError, match=r"holds no samples\.jsonl, no images and no dataset; give"):
            load_samples(tmp_path)
        with pytest.raises(CapaProbeError, match=r"questions\.jsonl does not exist"):
            load_samples(tmp_path / "questions.jsonl")
        (tmp_path / "samples.jsonl").write_text("\n\n")
        with pytest.raises(CapaProbeError, match="holds no samples"):
            load_samples(tmp_path)

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ('{"id": "x", ', r"samples\.jsonl, line 2: this is not JSON \(.* at column \d+\)"),
            ([1, 2], "line 2: this is a JSON list, not an object"),
            (record(id=...), r'line 2: the field "id" is missing \(fields given: image, question, answers\)'),
            (record(id="x", question=...), 'line 2: the field "question" is missing'),
            (record(id="x", question=""), "line 2: question=''"),
            (record(id=True), "line 2: id=True"),
            (record(id="x", image=...), r'line 2: give "image" .* neither was given'),
            (record(id="x", images=["a.png"]), r'line 2: give "image" .* both was given'),
            (record(id="x", image=["a.png"]), r'line 2: "image" must be a path'),
            (record(id="x", image=..., images="a.png"), '"images" a list of paths'),
            (record(id="x", image="../c.png"), r"line 2: image '\.\./c\.png' is not a file in "),
            (
                record(id="x", image="in/../../c.png"),
                r"line 2: image 'in/\.\./\.\./c\.png' is not a file in ",
            ),
            (record(id="x", image="/c.png"), r"line 2: image '/c\.png' is not a file in "),
            (record(id="x", image=""), r"line 2: image '' is not a file in "),
            (record(id="x", answers=[1]), r"line 2: answers=\[1\]"),
            (record(), "line 2: id 's1' was already used on line 1"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, bad: Any, message: str) -> None:
        folder = write_folder(tmp_path, [record(), bad, record(id="later")])
        with pytest.raises(CapaProbeError, match=message) as caught:
            load_samples(folder)
        assert "\n" not in str(caught.value)

    def test_other_encodings_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "samples.jsonl").write_bytes('{"id": "é"}'.encode("latin-1"))
        with pytest.raises(CapaProbeError, match="not UTF-8"):
            load_samples(tmp_path)


class TestFingerprint:
    def test_same_data_elsewhere_same_fingerprint(self, tmp_path: Path) -> None:
        here = write_folder(tmp_path / "here", [record(), record(id="s2", image="b.png")])
        there = shutil.copytree(here, tmp_path / "there")
        assert data_fingerprint(load_samples(here)) == data_fingerprint(iter(load_samples(there)))

    @pytest.mark.parametrize(
        "change",
        [
            {"id": "s2"},
            {"question": "what color is the circle?"},
            {"answers": ["red", ""]},
            {"image": "b.png"},
            {"image": ..., "images": ["a.png", "a.png"]},
        ],
    )
    def test_any_change_changes_it(self, tmp_path: Path, change: dict[str, Any]) -> None:
        before = data_fingerprint(load_samples(write_folder(tmp_path / "x", [record()])))
        after = data_fingerprint(load_samples(write_folder(tmp_path / "y", [record(**change)])))
        assert before != after

    def test_task_and_regions_do_not_count(self, tmp_path: Path) -> None:
        sample = Sample("a", [], "q")
        assert data_fingerprint([sample]) == data_fingerprint([dataclasses.replace(sample, task="reading")])
        assert data_fingerprint([sample]) == data_fingerprint([dataclasses.replace(sample, regions=())])

    def test_pixels_of_images_in_memory_count(self) -> None:
        prints = {
            data_fingerprint([Sample("a", image, "q")])
            for image in (
                Image.new("L", (2, 3)),
                Image.new("L", (3, 2)),
                Image.new("L", (2, 3), 1),
                Image.new("P", (2, 3)),
            )
        }
        assert len(prints) == 4

    def test_order_counts(self) -> None:
        a, b = Sample("a", [], "q"), Sample("b", [], "q")
        assert data_fingerprint([a, b]) != data_fingerprint([b, a])

    def test_a_missing_image_counts_as_missing(self, tmp_path: Path) -> None:
        there, gone = tmp_path / "there.png", tmp_path / "gone.png"
        there.touch()
        prints = [data_fingerprint([Sample("a", path, "q")]) for path in (there, gone, tmp_path, gone)]
        assert prints[1] == prints[2] == prints[3] != prints[0]

    def test_what_an_image_looks_like_counts(self) -> None:
        """Equal stored pixels that are seen differently are different data."""
        plain = Image.new("P", (2, 3))
        other_palette, transparent, turned = plain.copy(), plain.copy(), plain.copy()
        other_palette.putpalette([9, 9, 9] * 256)
        transparent.info["transparency"] = 0
        turned.getexif()[0x0112] = 6
        images = (plain, other_palette, transparent, turned)
        assert len({data_fingerprint([Sample("a", image, "q")]) for image in images}) == 4
        assert data_fingerprint([Sample("a", plain, "q")]) == data_fingerprint(
            [Sample("a", plain.copy(), "q")]
        )

    def test_bytes_count_as_the_file_they_are_of(self, tmp_path: Path) -> None:
        file = write_folder(tmp_path, []) / "b.png"
        prints = {
            data_fingerprint([Sample("a", image, "q")]) for image in (file, str(file), file.read_bytes())
        }
        assert len(prints) == 1

    def test_the_first_samples_have_a_fingerprint_of_their_own(self) -> None:
        samples = [Sample(str(i), Image.new("L", (2, 2), i), f"q{i}", (str(i),)) for i in range(4)]
        running, seen = Fingerprint(), []
        assert running.hexdigest() == data_fingerprint([])
        for n, sample in enumerate(samples, start=1):
            running.add(sample)
            seen.append(running.hexdigest())
            assert running.hexdigest() == data_fingerprint(samples[:n])
        assert len({*seen}) == 4
        resumed = Fingerprint(seen[1])
        for sample in samples[2:]:
            resumed.add(sample)
        assert resumed.hexdigest() == seen[3]

    def test_an_image_of_several_questions_is_read_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = write_folder(tmp_path, []) / "a.png"
        samples = [Sample(str(i), file, f"q{i}") for i in range(5)]
        expected = [sample_digest(sample) for sample in samples]
        reads: list[Path] = []
        open_file = Path.open

        def counting(self: Path, *args: Any, **kwargs: Any) -> Any:
            reads.append(self)
            return open_file(self, *args, **kwargs)

        monkeypatch.setattr(Path, "open", counting)
        data_fingerprint(samples)
        assert reads == [file]
        assert len({*expected}) == 5
        assert [len(digest) for digest in expected] == [32] * 5

    def test_half_a_surrogate_pair(self) -> None:
        question = json.loads('"\\ud83d"')
        assert len(data_fingerprint([Sample("a", [], question)])) == 64

    # Text of all kinds, cut at two places: no two different splits may collide.
    @given(st.text(min_size=1), st.text(min_size=1), st.lists(st.text(), max_size=3))
    def test_fields_do_not_run_together(self, first: str, second: str, answers: list[str]) -> None:
        def fingerprint(*fields: str) -> str:
            return data_fingerprint([Sample("a", [], "q", fields)])

        assert fingerprint(first, second, *answers) != fingerprint(first + second, *answers)
        assert fingerprint(*answers, first) != fingerprint(*answers, first + second)

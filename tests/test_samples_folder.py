"""A bare folder of images with a prompt, and how ``load_samples`` tells the forms of data apart."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from capa_probe.errors import BadImageError, CapaProbeError
from capa_probe.samples import Sample, load_samples
from capa_probe.samples.folder import image_suffixes

PROMPT = "What is in this picture?"


def draw(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2), (number, 0, 0)).save(folder / name)
    return folder


def ids(folder: Path) -> list[str]:
    return [sample.id for sample in load_samples(folder, prompt=PROMPT)]


class TestImages:
    def test_one_sample_for_each(self, tmp_path: Path) -> None:
        folder = draw(tmp_path, "b.png", "a.jpg", "in/deep/c.webp")
        samples = load_samples(folder, prompt=PROMPT)
        assert samples == [
            Sample("a", folder / "a.jpg", PROMPT),
            Sample("b", folder / "b.png", PROMPT),
            Sample("in/deep/c", folder / "in/deep/c.webp", PROMPT),
        ]
        assert samples[1].open_images()[0].getpixel((0, 0)) == (0, 0, 0)
        assert load_samples(str(folder), 2, prompt=PROMPT) == samples[:2]

    def test_numbers_count_and_capitals_do_not(self, tmp_path: Path) -> None:
        draw(tmp_path, "img10.png", "img2.png", "IMG1.png", "img02.png", "b/1.png", "a10/x.png", "a9/x.png")
        assert ids(tmp_path) == ["a9/x", "a10/x", "b/1", "IMG1", "img02", "img2", "img10"]

    def test_the_order_is_not_that_of_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        draw(tmp_path, "c.png", "a.png", "b/b.png", "b/a.png")
        expected = ids(tmp_path)
        walk = os.walk

        def backwards(folder: Path, **options: Any):  # type: ignore[no-untyped-def]
            for root, folders, files in walk(folder, **options):
                folders.sort(reverse=True)
                yield root, folders, sorted(files, reverse=True)

        monkeypatch.setattr(os, "walk", backwards)
        assert ids(tmp_path) == expected == ["a", "b/a", "b/b", "c"]

    def test_ids_keep_the_suffix_where_they_would_clash(self, tmp_path: Path) -> None:
        draw(tmp_path, "a.png", "a.jpg", "b.png", "in/a.png")
        assert ids(tmp_path) == ["a.jpg", "a.png", "b", "in/a"]

    def test_an_id_never_clashes_with_a_kept_suffix(self, tmp_path: Path) -> None:
        draw(tmp_path, "a.png", "a.jpg")
        (tmp_path / "a.png.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
        assert ids(tmp_path) == ["a.jpg", "a.png", "a.png.jpg"]

    def test_hidden_and_other_files_do_not_count(self, tmp_path: Path) -> None:
        draw(tmp_path, "a.PNG", ".hidden.png", ".cache/b.png", "__MACOSX/._c.png")
        for name in ("notes.txt", "page.pdf", "clip.mpg", "plot.eps", "README"):
            (tmp_path / name).write_text("no image")
        assert ids(tmp_path) == ["a"]

    def test_suffixes_are_those_of_images(self) -> None:
        suffixes = image_suffixes()
        assert {
            ".png",
            ".jpg",
            ".jpeg",
            ".webp",
            ".gif",
            ".bmp",
            ".tif",
            ".tiff",
            ".avif",
            ".mpo",
        } <= suffixes
        assert not {".pdf", ".eps", ".mpg", ".mpeg", ".h5", ".json", ".csv"} & suffixes

    def test_links_are_followed_once(self, tmp_path: Path) -> None:
        elsewhere = draw(tmp_path / "elsewhere", "x.png")
        folder = draw(tmp_path / "data", "a.png")
        (folder / "linked").symlink_to(elsewhere)
        (folder / "back").symlink_to(folder)
        assert ids(folder) == ["a", "linked/x"]

    def test_a_bad_image_shows_when_it_is_opened(self, tmp_path: Path) -> None:
        draw(tmp_path, "a.png")
        (tmp_path / "b.png").touch()
        good, bad = load_samples(tmp_path, prompt=PROMPT)
        assert len(good.open_images()) == 1
        with pytest.raises(BadImageError, match=r"b\.png of sample 'b' cannot be read"):
            bad.open_images()

    def test_a_single_image(self, tmp_path: Path) -> None:
        draw(tmp_path, "cat.PNG")
        assert load_samples(tmp_path / "cat.PNG", prompt=PROMPT) == [
            Sample("cat", tmp_path / "cat.PNG", PROMPT)
        ]

    def test_a_home_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(draw(tmp_path, "pictures/a.png")))
        (sample,) = load_samples("~/pictures", prompt=PROMPT)
        assert sample.images == (tmp_path / "pictures" / "a.png",)

    def test_a_table_beside_the_images_is_no_matter_with_a_prompt(self, tmp_path: Path) -> None:
        draw(tmp_path, "a.png")
        (tmp_path / "notes.csv").write_text("x,y\n1,2\n")
        assert ids(tmp_path) == ["a"]


class TestWhatIsWrong:
    """Every message is one sentence that says what to give."""

    def refused(self, match: str, source: object, limit: int | None = None, **options: object) -> None:
        with pytest.raises(CapaProbeError, match=match) as caught:
            load_samples(source, limit, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(".")

    def test_no_image(self, tmp_path: Path) -> None:
        self.refused("holds no image files; give a folder with images", tmp_path, prompt=PROMPT)

    def test_no_prompt(self, tmp_path: Path) -> None:
        draw(tmp_path, "a.png")
        self.refused(r"holds images and no samples\.jsonl; give a prompt \(--prompt\)", tmp_path)
        self.refused(r"a\.png is an image; give a prompt \(--prompt\)", tmp_path / "a.png")

    @pytest.mark.parametrize("prompt", ["", "  ", 5])
    def test_an_empty_prompt(self, tmp_path: Path, prompt: object) -> None:
        self.refused(
            r"prompt=.* was given; give a question that is not empty", draw(tmp_path, "a.png"), prompt=prompt
        )

    def test_samples_and_a_prompt(self, tmp_path: Path) -> None:
        draw(tmp_path, "a.png")
        (tmp_path / "samples.jsonl").write_text(json.dumps({"id": "1", "image": "a.png", "question": "q"}))
        assert len(load_samples(tmp_path)) == 1
        self.refused(
            r"prompt='What.*samples\.jsonl, .*; leave the prompt out, or give a folder",
            tmp_path,
            prompt=PROMPT,
        )

    @pytest.mark.parametrize(
        "options",
        [{"question": "q"}, {"split": "test"}, {"config": "x"}, {"streaming": True}, {"image": ["a", "b"]}],
    )
    def test_samples_and_options_of_datasets(self, tmp_path: Path, options: dict[str, object]) -> None:
        draw(tmp_path, "a.png")
        (tmp_path / "samples.jsonl").write_text(json.dumps({"id": "1", "image": "a.png", "question": "q"}))
        (name,) = options
        self.refused(f"{name} was given for .*, which is no dataset with columns", tmp_path, **options)
        self.refused(
            f"{name} was given for .*, which is no dataset", tmp_path / "a.png", prompt=PROMPT, **options
        )

    def test_several_options_of_datasets(self, tmp_path: Path) -> None:
        match = "question, split were given for .*; leave them out"
        self.refused(match, draw(tmp_path, "a.png") / "a.png", question="q", split="test")

    def test_a_folder_that_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        draw(tmp_path, "a.png", "locked/b.png")
        scan = os.scandir

        def locked(path: Any) -> Any:
            if str(path).endswith("locked"):
                raise PermissionError(13, "Permission denied", str(path))
            return scan(path)

        monkeypatch.setattr(os, "scandir", locked)
        self.refused(
            r"folder .*locked cannot be read \(Permission denied\); make it", tmp_path, prompt=PROMPT
        )

    def test_nothing_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        expected = "give a folder with samples.jsonl, a folder of images"
        self.refused(f"holds no samples.jsonl, no images and no dataset; {expected}", tmp_path)
        self.refused(f"nowhere does not exist; {expected}", tmp_path / "nowhere")
        self.refused(f"nowhere does not exist; {expected}", "nowhere")
        self.refused(r"\./a/b does not exist", "./a/b")
        self.refused("images/cat.png does not exist", "images/cat.png", prompt=PROMPT)
        self.refused("tables/cat.parquet does not exist", "tables/cat.parquet")
        self.refused("samples.jsonl does not exist; a data folder needs it", "data/samples.jsonl")
        (tmp_path / "notes.txt").write_text("hello")
        self.refused(f"notes.txt is a file of another kind; {expected}", "notes.txt")

    @pytest.mark.parametrize("source", ["", 5, None, b"folder", [Sample("a", [], "q")]])
    def test_no_source(self, source: object) -> None:
        self.refused(r"source=.* was given; give a folder with samples\.jsonl", source)

    @pytest.mark.parametrize("limit", [0, -1])
    def test_limit(self, tmp_path: Path, limit: int) -> None:
        self.refused(f"limit={limit} was given", draw(tmp_path, "a.png"), limit, prompt=PROMPT)

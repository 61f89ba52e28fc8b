"""Examples of a run: which samples, what the model saw and said, and what lies in the folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capa_probe import examples
from capa_probe.errors import CapaProbeError
from capa_probe.examples import read_examples, remove_examples, write_examples
from capa_probe.lvlm import HookedLVLM
from capa_probe.samples import Sample
from tests import processors, tiny


def lvlm(family: str = "llava") -> HookedLVLM:
    return HookedLVLM(tiny.shared(family), processors.shared(family))


def picture(height: int = 16, width: int = 16, seed: int = 0) -> Image.Image:
    return processors.image(height, width, seed)


def many(n: int, tasks: int = 1) -> list[Sample]:
    return [Sample(str(i), picture(seed=i), "what?", "yes", f"task {i % tasks}") for i in range(n)]


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class TestChoice:
    @pytest.mark.parametrize(
        ("n_samples", "tasks"), [(40, 1), (40, 2), (40, 3), (40, 4), (40, 7), (4, 2), (3, 3)]
    )
    def test_spread_over_tasks_and_over_the_data(self, n_samples: int, tasks: int, tmp_path: Path) -> None:
        found = write_examples(lvlm(), many(n_samples, tasks), tmp_path, n=4)
        assert len(found) == min(4, n_samples)
        assert len({example.id for example in found}) == len(found)
        assert len({example.task for example in found}) == min(4, tasks, n_samples)
        if n_samples == 40:
            assert max(int(example.id) for example in found) >= 20

    def test_same_every_time(self, tmp_path: Path) -> None:
        first, second = (write_examples(lvlm(), many(9, 2), tmp_path / name, n=3) for name in "ab")
        assert first == second
        for name in files(tmp_path / "a"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_no_image_twice_where_there_are_others(self, tmp_path: Path) -> None:
        one, two = picture(), picture(seed=1)
        samples = [Sample(str(i), two if i == 1 else one, "what?") for i in range(6)]
        found = write_examples(lvlm(), samples, tmp_path, n=2)
        assert {example.id == "1" for example in found} == {True, False}

    def test_samples_that_cannot_be_shown_are_passed_over(self, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged.png"
        damaged.write_bytes(b"no image")
        samples = [
            Sample("damaged", damaged, "what?"),
            Sample("words", [], "what?"),
            Sample("missing", tmp_path / "missing.png", "what?"),
            Sample("good", picture(), "what?"),
        ]
        run = tmp_path / "run"
        assert [example.id for example in write_examples(lvlm(), samples, run)] == ["good"]

    def test_nothing_to_show_writes_nothing(self, tmp_path: Path) -> None:
        prepared = [tiny.inputs("llava")]
        assert write_examples(lvlm(), prepared, tmp_path) == []  # type: ignore[arg-type]
        assert write_examples(lvlm(), [Sample("words", [], "what?")], tmp_path) == []
        assert list(tmp_path.iterdir()) == []
        assert read_examples(tmp_path) == []


class TestContent:
    @pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
    def test_prompt_and_answer_are_the_models(self, family: str, tmp_path: Path) -> None:
        model, image = lvlm(family), picture(32, 48)
        (example,) = write_examples(
            model, [Sample("a", image, "is it red?", ("no", "never"), "colour")], tmp_path, max_new_tokens=3
        )
        assert (example.question, example.answers, example.task) == ("is it red?", ("no", "never"), "colour")
        # The prompt already holds placeholders, so that prepare takes it as it is.
        again = model.prepare([image], example.prompt)
        inputs = model.prepare([image], "is it red?")
        assert again["input_ids"].tolist() == inputs["input_ids"].tolist()
        ids = model.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert example.generated == model.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        (span,) = model.spans(inputs).images
        assert (example.images[0].grid, example.images[0].tile_grid) == (span.grid, span.tile_grid)

    def test_several_images(self, tmp_path: Path) -> None:
        sample = Sample("a", [picture(16, 16), picture(16, 32, 1)], "which?")
        (example,) = write_examples(lvlm("qwen2_5_vl"), [sample], tmp_path)
        assert [image.grid for image in example.images] == [(2, 2), (2, 4)]
        sizes = [size_of(tmp_path / "examples" / image.file) for image in example.images]
        assert sizes == [(16, 16), (32, 16)]

    def test_large_images_are_scaled_down(self, tmp_path: Path) -> None:
        photo = picture(30, 60).resize((1200, 600))
        (example,) = write_examples(lvlm("internvl"), [Sample("a", photo, "what?")], tmp_path)
        file = tmp_path / "examples" / example.images[0].file
        assert size_of(file) == (512, 256)
        assert file.stat().st_size < 100_000
        with Image.open(file) as kept:
            difference = np.asarray(photo.resize((512, 256)), float) - np.asarray(kept.convert("RGB"), float)
        assert np.abs(difference).mean() < 4

    def test_odd_words_survive(self, tmp_path: Path) -> None:
        question = 'one\u2028two \ud800 <b> \\ "é"'
        sample = Sample("../../a\n", picture(), question.replace("\ud800", ""), ["\ud800"])
        (example,) = write_examples(lvlm(), [sample], tmp_path)
        assert read_examples(tmp_path) == [example]
        assert (example.id, example.answers) == ("../../a\n", ("\ud800",))
        assert files(tmp_path) == {"examples/examples.jsonl", "examples/run.json", "examples/0-0.png"}


class TestSeen:
    """The image that is kept is the one that the grid of visual tokens lies on."""

    def test_llava_crops_the_centre(self) -> None:
        image = Image.new("RGB", (48, 16), "black")
        image.paste("red", (16, 0, 32, 16))
        processor = processors.build("llava")
        processor.image_processor.do_center_crop = True
        processor.image_processor.size = {"shortest_edge": 16}
        processor.image_processor.crop_size = {"height": 16, "width": 16}
        seen = np.asarray(HookedLVLM(tiny.shared("llava"), processor).family.seen(processor, image))
        assert seen.shape == (16, 16, 3)
        assert (seen == (255, 0, 0)).all()

    def test_llava_shows_the_pixels_that_the_model_gets(self) -> None:
        processor, image = processors.shared("llava"), picture(40, 23)
        options = processor.image_processor
        seen = np.asarray(lvlm().family.seen(processor, image), float) / 255
        pixels = lvlm().prepare([image], "what?")["pixel_values"][0].permute(1, 2, 0).numpy()
        back = pixels * options.image_std + options.image_mean
        np.testing.assert_allclose(seen, back, atol=1e-5)

    def test_llava_leaves_out_what_fills_no_patch(self) -> None:
        processor = processors.build("llava")
        processor.image_processor.do_center_crop = False
        processor.image_processor.size = {"height": 18, "width": 19}
        assert lvlm().family.seen(processor, picture(18, 19)).size == (16, 16)

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
    def test_others_see_all_of_it(self, family: str) -> None:
        image = picture(17, 40)
        assert lvlm(family).family.seen(processors.shared(family), image) is image


class TestFolder:
    def test_finished_examples_are_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = write_examples(lvlm(), many(5), tmp_path)
        monkeypatch.setattr(examples, "_example", None)  # nothing is made again
        assert write_examples(lvlm(), many(9, 3), tmp_path) == first

    def test_stopped_half_way_it_starts_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = examples._answer
        calls = iter(range(9))

        def stop_at_the_third(*args: object) -> str:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return answer(*args)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(examples, "_answer", stop_at_the_third)
            with pytest.raises(KeyboardInterrupt):
                write_examples(lvlm(), many(5), tmp_path)
        assert read_examples(tmp_path) == []
        # What a killed process leaves.
        (tmp_path / "examples.tmp").mkdir(exist_ok=True)
        (tmp_path / "examples.tmp" / "3-0.png").write_bytes(b"half")
        assert len(write_examples(lvlm(), many(5), tmp_path)) == 4
        assert "examples.tmp" not in {path.name for path in tmp_path.iterdir()}

    def test_remove_takes_our_files_only(self, tmp_path: Path) -> None:
        write_examples(lvlm(), many(2), tmp_path)
        remove_examples(tmp_path)
        assert list(tmp_path.iterdir()) == []
        write_examples(lvlm(), many(2), tmp_path)
        (tmp_path / "examples" / "notes.txt").write_text("mine")
        remove_examples(tmp_path)
        assert files(tmp_path) == {"examples/notes.txt"}

    @pytest.mark.parametrize("damage", ["{", "[]", '{"id": "a"}', "\xff"])
    def test_damaged(self, damage: str, tmp_path: Path) -> None:
        write_examples(lvlm(), many(1), tmp_path)
        (tmp_path / "examples" / "examples.jsonl").write_bytes(damage.encode("latin-1"))
        with pytest.raises(CapaProbeError, match=r"examples\.jsonl cannot be read; remove"):
            read_examples(tmp_path)

    def test_a_file_name_stays_in_the_folder(self, tmp_path: Path) -> None:
        write_examples(lvlm(), many(1), tmp_path)
        file = tmp_path / "examples" / "examples.jsonl"
        record = json.loads(file.read_text())
        record["images"][0]["file"] = "/etc/0-0.png"
        file.write_text(json.dumps(record))
        assert read_examples(tmp_path)[0].images[0].file == "0-0.png"

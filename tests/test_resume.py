"""A run that was stopped, in whatever way, is gone on with by the same call, and ends as an undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import capa_probe as cp
from capa_probe import run_folder, writing
from capa_probe.errors import BadImageError, CapaProbeError, OtherRunError
from capa_probe.run_folder import locked
from capa_probe.tables import is_finished, is_unfinished
from tests import processors, tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "ROWS_PER_PART", 300)


@pytest.fixture
def lvlm() -> cp.HookedLVLM:
    return cp.HookedLVLM(tiny.shared("llava"), processors.shared("llava"))


def samples(n: int = 8) -> list[cp.Sample]:
    return [
        cp.Sample(f"q{k}", Image.new("RGB", (16, 16), (20 * k, 0, 9)), "what" + " now" * k) for k in range(n)
    ]


def run(lvlm: cp.HookedLVLM, data: Any, out: Path | None = None, **options: Any) -> cp.LayerProfile:
    return cp.profile(lvlm, data, out, progress=False, **options)


def same(one: cp.LayerProfile, other: cp.LayerProfile) -> None:
    pd.testing.assert_frame_equal(one.tokens, other.tokens, check_exact=True)
    pd.testing.assert_frame_equal(one.layers, other.layers, check_exact=True)
    passing = ("created", "seconds", "n_parts")
    assert {k: v for k, v in one.manifest.items() if k not in passing} == {
        k: v for k, v in other.manifest.items() if k not in passing
    }


def stop_before(number: int, data: list[cp.Sample]) -> Iterator[cp.Sample]:
    yield from data[:number]
    raise KeyboardInterrupt


def stopped(lvlm: cp.HookedLVLM, out: Path, number: int = 5, **options: Any) -> list[Path]:
    """Begin a run that ends after some samples; its finished parts."""
    with pytest.raises(KeyboardInterrupt):
        run(lvlm, stop_before(number, samples()), out, **options)
    found = sorted((out / "tokens").iterdir())
    assert found
    return found


class TestKilled:
    @pytest.mark.slow
    def test_at_any_moment(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "tests.kill_trials", str(tmp_path), "3"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        trials = found["trials"]
        assert found["n_parts"] >= 5
        assert [
            trial for trial in trials if not (trial["again"] == "done" and trial["kept"] and trial["equal"])
        ] == []
        ends = {trial["first"] for trial in trials}
        assert ends == {"killed", "interrupted", "failed", "done"}  # the last call comes after the run's end
        assert len({trial["parts_before"] for trial in trials if trial["first"] == "killed"}) >= 5

    def test_finished_parts_are_not_run_again(self, lvlm: cp.HookedLVLM, tmp_path: Path) -> None:
        out = tmp_path / "run"
        stamps = {part: part.stat().st_mtime_ns for part in stopped(lvlm, out)}
        seen: list[int] = []
        with lvlm.hooks([("hook_embed", lambda x, hook: seen.append(len(x)))]):
            resumed = run(lvlm, samples(), out)
        assert 0 < len(seen) < 8
        assert {part: part.stat().st_mtime_ns for part in stamps} == stamps
        same(resumed, run(lvlm, samples()))
        same(cp.LayerProfile.load(out), resumed)

    def test_how_much_is_kept_can_be_told(self, lvlm: cp.HookedLVLM, tmp_path: Path) -> None:
        out = tmp_path / "run"
        parts = stopped(lvlm, out)
        n = len({sample for part in parts for sample in pd.read_parquet(part)["sample"]})
        assert 0 < writing.kept_samples(out) == n < 5
        assert writing.kept_samples(tmp_path) == 0

    def test_prepared_tensors(self, lvlm: cp.HookedLVLM, tmp_path: Path) -> None:
        batches = [tiny.inputs("llava", seed=seed) for seed in range(4)]

        def interrupted() -> Iterator[Any]:
            yield from batches[:2]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(lvlm, interrupted(), tmp_path / "run", limit=7)
        assert list((tmp_path / "run" / "tokens").iterdir())
        same(run(lvlm, batches, tmp_path / "run", limit=7), run(lvlm, batches, limit=7))

    def test_rows_none_and_decode_steps(self, lvlm: cp.HookedLVLM, tmp_path: Path) -> None:
        options = {"steps": 2, "rows": "none"}
        with pytest.raises(KeyboardInterrupt):
            run(lvlm, stop_before(5, samples()), tmp_path / "run", **options)
        assert list((tmp_path / "run" / "layers").iterdir())
        same(run(lvlm, samples(), tmp_path / "run", **options), run(lvlm, samples(), **options))

    def test_a_sample_that_cannot_be_prepared_loses_nothing(
        self, lvlm: cp.HookedLVLM, tmp_path: Path
    ) -> None:
        out, data = tmp_path / "run", samples()
        bad = [*data[:6], cp.Sample("q6", data[6].images, "<image> <image> what?"), data[7]]
        with pytest.raises(CapaProbeError, match="Sample q6: Prompt 0 holds 2 image placeholders"):
            run(lvlm, bad, out, batch_size=4)
        same(run(lvlm, data, out, batch_size=4), run(lvlm, data, batch_size=4))


class TestFinished:
    def test_is_opened_and_not_run_again(self, lvlm: cp.HookedLVLM, tmp_path: Path) -> None:
        first = run(lvlm, samples(3), tmp_path / "run")
        with (
            pytest.warns(UserWarning, match="never fired"),
            lvlm.hooks([("hook_embed", lambda x, hook: None)]),
        ):
            again = run(lvlm, samples(3), tmp_path / "run")
        assert again.manifest == first.manifest
        same(again, first)

    def test_of_a_data_set_that_changed_since(self, lvlm: cp.HookedLVLM, tmp_path: Path) -> None:
        run(lvlm, samples(3), tmp_path / "run")
        for data in (samples(4), samples(2), samples(3)[::-1]):
            with pytest.raises(OtherRunError, match="data_fingerprint is not that of the samples given"):
                run(lvlm, data, tmp_path / "run")

    def test_killed_while_tidying_up(self, lvlm: cp.HookedLVLM, tmp_path: Path) -> None:
        out = tmp_path / "run"
        first = run(lvlm, samples(3), out)
        (out / "unfinished.json").write_text("{}")
        (out / "layers").mkdir()
        (out / "layers" / "part-00000.parquet").write_bytes(b"")
        same(run(lvlm, samples(3), out), first)
        assert {path.name for path in out.iterdir()} == {
            "manifest.json",
            "layers.parquet",
            "samples.parquet",
            "tokens",
        }


class TestOtherSettings:
    @pytest.mark.parametrize("finished", [True, False])
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"batch_size": 2}, "settings.batch_size = 1, but now it is 2"),
            ({"steps": 1, "rows": "all"}, "settings.steps = 0, but now it is 1"),
            ({"rows": "visual"}, 'settings.rows = "all", but now it is "visual"'),
            ({"limit": 7}, "settings.limit = null, but now it is 7"),
            ({"probes": ["attention"]}, "settings.probes = "),
            ({"sink_dims": [3]}, r"sink_dims = null, but now it is \[3\]"),
        ],
    )
    def test_are_refused_by_name(
        self, lvlm: cp.HookedLVLM, options: dict[str, Any], said: str, finished: bool, tmp_path: Path
    ) -> None:
        out = tmp_path / "run"
        if finished:
            run(lvlm, samples(), out)
        else:
            stopped(lvlm, out)
        before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
        with pytest.raises(OtherRunError, match=f"was made with {said}") as error:
            run(lvlm, samples(), out, **options)
        assert "overwrite=True" in str(error.value)
        assert "\n" not in str(error.value)
        assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
        run(lvlm, samples(), out, overwrite=True, **options)
        assert is_finished(out)
        assert not is_unfinished(out)

    def test_another_model(self, lvlm: cp.HookedLVLM, tmp_path: Path) -> None:
        out = tmp_path / "run"
        stopped(lvlm, out)
        other = tiny.build("llava")
        with torch.no_grad():  # a fine-tune: one layer, a little
            other.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.001)
        with pytest.raises(OtherRunError, match="weights_hash"):
            run(cp.HookedLVLM(other, processors.shared("llava")), samples(), out)
        with pytest.raises(OtherRunError, match='dtype = "float32", but now it is "bfloat16"'):
            run(
                cp.HookedLVLM(tiny.build("llava").to(torch.bfloat16), processors.shared("llava")),
                samples(),
                out,
            )

    def test_other_data(self, lvlm: cp.HookedLVLM, tmp_path: Path) -> None:
        out, data = tmp_path / "run", samples()
        stopped(lvlm, out)
        changed = [cp.Sample("q0", data[0].images, "why?"), *data[1:]]
        with pytest.raises(OtherRunError, match="data_fingerprint differs for the first"):
            run(lvlm, changed, out)
        with pytest.raises(OtherRunError, match="data_fingerprint differs"):
            run(lvlm, data[:1], out)
        run(lvlm, data, out)  # nothing was lost by asking

    def test_a_newer_version_began_it(self, lvlm: cp.HookedLVLM, tmp_path: Path) -> None:
        stopped(lvlm, tmp_path / "run")
        file = tmp_path / "run" / "unfinished.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
        with pytest.raises(CapaProbeError, match="newer capa_probe"):
            run(lvlm, samples(), tmp_path / "run")

    def test_a_model_that_was_moved(self, tmp_path: Path) -> None:
        folder, out = processors.save("llava", tmp_path / "model"), tmp_path / "run"
        first = run(cp.HookedLVLM.from_pretrained(folder), samples(1), out)
        moved = folder.rename(tmp_path / "elsewhere")
        same(run(cp.HookedLVLM.from_pretrained(moved), samples(1), out), first)

    def test_one_model_however_its_folder_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = processors.save("llava", tmp_path / "model")
        (tmp_path / "link").symlink_to(folder)
        monkeypatch.chdir(tmp_path)
        names = {
            cp.profile(cp.HookedLVLM.from_pretrained(name), samples(1), progress=False).manifest["model"]
            for name in ("model", f"{folder}/", tmp_path / "link")
        }
        assert names == {str(folder)}


class TestDamage:
    @pytest.mark.parametrize("folder", ["layers", "tokens"])
    @pytest.mark.parametrize("size", [0, 500])
    def test_a_damaged_part_is_run_again(
        self, lvlm: cp.HookedLVLM, folder: str, size: int, tmp_path: Path
    ) -> None:
        out = tmp_path / "run"
        stopped(lvlm, out, 7)
        part = out / folder / "part-00001.parquet"
        part.write_bytes(part.read_bytes()[:size])
        same(run(lvlm, samples(), out), run(lvlm, samples()))


class TestLock:
    def test_a_second_process_is_refused(self, lvlm: cp.HookedLVLM, tmp_path: Path) -> None:
        out = tmp_path / "run"
        code = (
            "import sys\nfrom capa_probe.run_folder import locked\n"
            "with locked(sys.argv[1]):\n    print('locked', flush=True)\n    sys.stdin.read()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "locked\n"
            for overwrite in (False, True):
                with pytest.raises(CapaProbeError, match="Another process is writing to"):
                    run(lvlm, samples(1), out, overwrite=overwrite)
            other.kill()  # however it ends
        run(lvlm, samples(1), out)
        assert {path.name for path in out.iterdir()} == {
            "manifest.json",
            "layers.parquet",
            "samples.parquet",
            "tokens",
        }

    def test_whoever_holds_it_may_take_it_again(self, tmp_path: Path) -> None:
        with locked(tmp_path / "run"):
            with locked(tmp_path / "run"):
                pass
            assert (tmp_path / "run" / ".lock").exists()
            (tmp_path / "run" / "table").touch()
        assert [file.name for file in (tmp_path / "run").iterdir()] == ["table"]

    def test_an_empty_folder_does_not_stay(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), locked(tmp_path / "run"):
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []


class TestBadImages:
    @pytest.fixture
    def data(self, tmp_path: Path) -> list[cp.Sample]:
        (tmp_path / "empty.png").touch()
        (tmp_path / "text.png").write_text("no image")
        whole = tmp_path / "whole.png"
        Image.effect_noise((64, 64), 50).save(whole)
        (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:1500])
        bad = [
            cp.Sample(name, tmp_path / f"{name}.png", "what?") for name in ("empty", "text", "cut", "gone")
        ]
        good = samples(5)
        return [bad[0], *good[:2], bad[1], bad[2], good[2], bad[3], *good[3:]]

    @pytest.mark.parametrize("batch_size", [1, 2, 3])
    def test_the_others_go_on(self, lvlm: cp.HookedLVLM, data: list[cp.Sample], batch_size: int) -> None:
        with pytest.warns(
            UserWarning, match="4 of 9 samples are left out.*image .*empty.png of sample 'empty'"
        ):
            found = run(lvlm, data, batch_size=batch_size)
        assert found.manifest["n_samples"] == 5
        assert [entry["sample"] for entry in found.manifest["skipped"]] == ["empty", "text", "cut", "gone"]
        for entry in found.manifest["skipped"]:
            assert f"{entry['sample']}.png" in entry["reason"]
        alone = run(lvlm, samples(5)).tokens
        assert list(found.tokens["sample"]) == list(alone["sample"])
        np.testing.assert_allclose(found.tokens["contribution"], alone["contribution"], rtol=2e-5)

    def test_strict(self, lvlm: cp.HookedLVLM, data: list[cp.Sample], tmp_path: Path) -> None:
        with pytest.raises(BadImageError, match="empty.png of sample 'empty'"):
            run(lvlm, data, tmp_path / "run", strict=True)

    def test_strict_loses_nothing(self, lvlm: cp.HookedLVLM, data: list[cp.Sample], tmp_path: Path) -> None:
        with pytest.raises(BadImageError, match="text.png"):
            run(lvlm, data[1:], tmp_path / "run", strict=True)
        with pytest.warns(UserWarning, match="3 of 8 samples are left out"):
            found = run(lvlm, data[1:], tmp_path / "run")
        assert found.manifest["n_samples"] == 5

    def test_strict_does_not_accept_what_was_left_out(
        self, lvlm: cp.HookedLVLM, data: list[cp.Sample], tmp_path: Path
    ) -> None:
        with pytest.warns(UserWarning, match="left out"):
            run(lvlm, data, tmp_path / "run")
        with pytest.raises(CapaProbeError, match="The run so far left out 4 samples.*empty.png"):
            run(lvlm, data, tmp_path / "run", strict=True)

        def interrupted() -> Iterator[cp.Sample]:
            yield from data
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(lvlm, interrupted(), tmp_path / "other")
        with pytest.raises(CapaProbeError, match="The run so far left out"):
            run(lvlm, data, tmp_path / "other", strict=True)

    def test_none_is_left(self, lvlm: cp.HookedLVLM, data: list[cp.Sample], tmp_path: Path) -> None:
        with pytest.raises(
            CapaProbeError, match="None of the 2 samples could be used; the first: image .*text.png"
        ):
            run(lvlm, data[3:5], tmp_path / "run")


def test_settings_are_compared_to_any_depth() -> None:
    then = {"a": 1, "b": {"c": [1, 2], "d": None}, "more": "ignored"}
    run_folder.refuse_other("run", then, {"a": 1, "b": {"c": (1, 2), "d": None}})
    for now, field in (
        ({"a": 2}, "a = 1, but now it is 2"),
        ({"b": {"c": [2]}}, r"b\.c = \[1, 2\]"),
        ({"b": {"e": 0}}, r"b\.e = null, but now it is 0"),
        ({"z": {"y": 1}}, r"z\.y = null"),
    ):
        with pytest.raises(OtherRunError, match=field):
            run_folder.refuse_other("run", then, now)

"""A calibration that was stopped, in whatever way, is gone on with by the same call, and ends as an undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import capa_probe as cp
from capa_probe.errors import CapaProbeError, OtherRunError
from capa_probe.pruning.calibration_run import locked, state_file
from capa_probe.pruning.ffn import HadamardFFN
from tests import processors, tiny
from tests.test_ffn_calibrate import calibrate, samples

ROOT = Path(__file__).parents[1]


@pytest.fixture
def lvlm() -> cp.HookedLVLM:
    return cp.HookedLVLM(tiny.shared("llava"), processors.shared("llava"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "alpha.safetensors"


def stopped(lvlm: cp.HookedLVLM, out: Path, number: int = 4, **options: Any) -> None:
    """Begin a calibration that ends after some samples."""

    def some() -> Iterator[cp.Sample]:
        yield from samples()[:number]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(lvlm, some(), out=out, **options)
    assert state_file(out).exists()
    assert not out.exists()


def forwards(lvlm: cp.HookedLVLM, run: Any) -> tuple[int, HadamardFFN]:
    """How many forwards a call makes, and what it returns."""
    calls: list[int] = []
    handle = lvlm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        found = run()
    finally:
        handle.remove()
    return len(calls), found


def same(one: HadamardFFN, other: HadamardFFN) -> None:
    assert {layer: alpha.tolist() for layer, alpha in one.alpha.items()} == {
        layer: alpha.tolist() for layer, alpha in other.alpha.items()
    }
    for name in ("r2", "n_samples", "n_tokens", "manifest", "x"):
        assert getattr(one, name) == getattr(other, name)


class TestStopped:
    @pytest.mark.slow
    def test_killed_at_any_moment(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "tests.ffn_trials", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        trials = json.loads(done.stdout)
        bad = [t for t in trials if t["again"] != "done" or not t["equal"] or t["beside"]]
        assert bad == []
        assert {t["first"] for t in trials} >= {"killed", "done"}
        assert len({t["left"] for t in trials if t["first"] == "killed"}) >= 3  # at different places

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_what_is_done_is_not_done_again(self, lvlm: cp.HookedLVLM, out: Path, batch_size: int) -> None:
        stopped(lvlm, out, batch_size=batch_size)
        run = lambda **options: calibrate(lvlm, samples(), batch_size=batch_size, **options)  # noqa: E731
        n, resumed = forwards(lvlm, lambda: run(out=out))
        assert n == 2 // batch_size
        same(resumed, run())
        same(HadamardFFN.load(out, lvlm), resumed)
        assert [file.name for file in out.parent.iterdir()] == [out.name]

    def test_prepared_tensors(self, lvlm: cp.HookedLVLM, out: Path) -> None:
        batches = [tiny.inputs("llava", seed=seed) for seed in range(4)]

        def interrupted() -> Iterator[Any]:
            yield from batches[:2]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(lvlm, interrupted(), out=out, limit=10)
        n, resumed = forwards(lvlm, lambda: calibrate(lvlm, batches, out=out, limit=10))
        assert n == 2
        same(resumed, calibrate(lvlm, batches, limit=10))

    def test_a_sample_that_cannot_be_prepared_loses_nothing(self, lvlm: cp.HookedLVLM, out: Path) -> None:
        data = samples()
        bad = [*data[:5], cp.Sample("q5", data[5].images, "<image> <image> what?")]
        with pytest.raises(CapaProbeError, match="Sample q5: Prompt 0 holds 2 image placeholders"):
            calibrate(lvlm, bad, out=out, batch_size=2)
        n, resumed = forwards(lvlm, lambda: calibrate(lvlm, data, out=out, batch_size=2))
        assert n == 1
        same(resumed, calibrate(lvlm, data, batch_size=2))

    def test_a_sample_left_out_is_listed_once(self, lvlm: cp.HookedLVLM, out: Path) -> None:
        """Also where the run ended within the batch that it was in."""
        data = [*samples()[:3], cp.Sample("gone", "/nowhere.png", "what"), *samples()[3:5]]
        bad = [*data[:5], cp.Sample("q4", data[5].images, "<image> <image> what?")]
        with pytest.raises(CapaProbeError, match="Sample q4"):
            calibrate(lvlm, bad, out=out, batch_size=3)
        with pytest.warns(UserWarning, match="1 of 6 samples"):
            resumed = calibrate(lvlm, data, out=out, batch_size=3)
        assert [entry["sample"] for entry in resumed.manifest["skipped"]] == ["gone"]

    def test_with_other_settings_data_or_weights(self, lvlm: cp.HookedLVLM, out: Path) -> None:
        stopped(lvlm, out)
        for options, said in (
            ({"layers": [1]}, r"settings.layers = \[1, 3\], but now it is \[1\]"),
            ({"x": "normed"}, 'settings.x = "residual"'),
            ({"limit": 3}, "settings.limit = null"),
        ):
            with pytest.raises(OtherRunError, match=said):
                calibrate(lvlm, samples(), out=out, **options)
        with pytest.raises(OtherRunError, match="made on other data"):
            calibrate(lvlm, samples()[::-1], out=out)
        other = cp.HookedLVLM(tiny.build("llava", seed=1), processors.shared("llava"))
        with pytest.raises(OtherRunError, match="weights_hash"):
            calibrate(other, samples(), out=out)
        same(calibrate(lvlm, samples(), out=out), calibrate(lvlm, samples()))

    def test_a_damaged_state(self, lvlm: cp.HookedLVLM, out: Path) -> None:
        stopped(lvlm, out)
        state_file(out).write_bytes(b"")
        with pytest.raises(CapaProbeError, match=r"unfinished is damaged .* start anew with --overwrite"):
            calibrate(lvlm, samples(), out=out)
        same(calibrate(lvlm, samples(), out=out, overwrite=True), calibrate(lvlm, samples()))
        assert not state_file(out).exists()


class TestFinished:
    def test_is_opened_and_not_run_again(self, lvlm: cp.HookedLVLM, out: Path) -> None:
        first = calibrate(lvlm, samples(), out=out)
        state_file(out).write_bytes(b"")  # killed while tidying up
        n, again = forwards(lvlm, lambda: calibrate(lvlm, samples(), out=out))
        assert n == 0
        same(again, first)
        assert [file.name for file in out.parent.iterdir()] == [out.name]

    def test_of_other_data_or_settings(self, lvlm: cp.HookedLVLM, out: Path) -> None:
        calibrate(lvlm, samples(), out=out)
        with pytest.raises(OtherRunError, match="data_fingerprint is not that of the samples given"):
            calibrate(lvlm, samples(5), out=out)
        with pytest.raises(OtherRunError, match=r"settings.layers"):
            calibrate(lvlm, samples(), [0], out=out)
        again = calibrate(lvlm, samples(5), [0], out=out, overwrite=True)
        assert HadamardFFN.load(out, lvlm).layers == again.layers == (0,)

    def test_nothing_else_is_overwritten(self, lvlm: cp.HookedLVLM, tmp_path: Path) -> None:
        other = tmp_path / "model.safetensors"
        other.write_bytes(b"weights")
        for overwrite in (False, True):
            with pytest.raises(CapaProbeError, match="is damaged or was not written by capa_probe"):
                calibrate(lvlm, samples(), out=other, overwrite=overwrite)
            with pytest.raises(CapaProbeError, match="is a folder; give a file"):
                calibrate(lvlm, samples(), out=tmp_path, overwrite=overwrite)
        assert other.read_bytes() == b"weights"

    def test_two_at_once(self, lvlm: cp.HookedLVLM, out: Path) -> None:
        with locked(out), pytest.raises(CapaProbeError, match="Another process is writing to"):
            calibrate(lvlm, samples(), out=out)
        calibrate(lvlm, samples(), out=out)

    def test_states_are_written_while_it_runs(
        self, lvlm: cp.HookedLVLM, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not only when it ends: a killed process writes nothing more."""
        monkeypatch.setattr("capa_probe.pruning.calibration_run.SECONDS_BETWEEN_STATES", 0.0)
        there: list[bool] = []

        def data() -> Iterator[cp.Sample]:
            for sample in samples():
                there.append(state_file(out).exists())
                yield sample

        calibrate(lvlm, data(), out=out)
        assert there[0] is False
        assert there[-1] is True
        assert torch.isfinite(torch.stack(list(HadamardFFN.load(out).alpha.values()))).all()

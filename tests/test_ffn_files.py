"""A HadamardFFN on disk: the same again bit for bit, or refused in one sentence."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from capa_probe.pruning.ffn import HadamardFFN
from tests import tiny
from tests.test_ffn import X, factors, wrap
from tests.test_ffn_calibrate import calibrate

KEY = "capa_probe.hadamard_ffn"


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return calibrate(wrap("llava"), [tiny.inputs("llava")]).save(tmp_path / "alpha.safetensors")


class TestRoundTrip:
    @X
    def test_bit_for_bit(self, x: Any, tmp_path: Path) -> None:
        lvlm, inputs = wrap("llava"), tiny.inputs("llava")
        made = calibrate(lvlm, [inputs], x=x)
        loaded = HadamardFFN.load(made.save(tmp_path / "a.safetensors"), lvlm)
        for layer in made.layers:
            assert torch.equal(made.alpha[layer], loaded.alpha[layer])
            assert loaded.alpha[layer].dtype == torch.float32
        for name in ("layers", "x", "r2", "n_samples", "n_tokens", "manifest"):
            assert getattr(loaded, name) == getattr(made, name)
        assert repr(loaded) == repr(made)
        again = loaded.save(tmp_path / "b.safetensors")
        assert again.read_bytes() == (tmp_path / "a.safetensors").read_bytes()
        with made.attach(lvlm):
            wanted = lvlm.model(**inputs).logits
        with loaded.attach(lvlm):
            assert torch.equal(lvlm.model(**inputs).logits, wanted)

    def test_made_by_hand(self, tmp_path: Path) -> None:
        """Without R² and a manifest it fits every model of its width."""
        loaded = HadamardFFN.load(factors().save(tmp_path / "a.safetensors"), wrap("internvl"))
        assert all(r2 != r2 for r2 in loaded.r2.values())
        assert torch.equal(loaded.alpha[3], factors().alpha[3])

    def test_others_can_read_it(self, saved: Path) -> None:
        """Any safetensors reader; and whoever the umask lets."""
        with safe_open(saved, "pt") as file:
            header = json.loads(file.metadata()[KEY])
            assert sorted(file.keys()) == ["alpha.1", "alpha.3"]
            assert file.get_tensor("alpha.1").shape == (32,)
        assert (header["layers"], header["x"], header["n_tokens"]) == ([1, 3], "residual", 48)
        assert set(header["r2"]) == {"1", "3"}
        mask = os.umask(0)
        os.umask(mask)
        assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~mask
        assert [file.name for file in saved.parent.iterdir()] == [saved.name]


class TestRefusals:
    def test_another_model(self, saved: Path) -> None:
        inputs = tiny.inputs("llava")
        fine_tuned = tiny.build("llava")
        fine_tuned.model.language_model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
        others = {
            "other weights": tiny.build("llava", seed=1),
            "one weight": fine_tuned,
            "dtype": tiny.build("llava").double(),
            "family": tiny.build("internvl"),
        }
        for model in others.values():
            with pytest.raises(CapaProbeError, match=r"alpha.safetensors: .* calibrated on other weights"):
                HadamardFFN.load(saved, cp.HookedLVLM(model))
            loaded = HadamardFFN.load(saved)
            with (
                pytest.raises(CapaProbeError, match="calibrated on other weights"),
                loaded.attach(cp.HookedLVLM(model)),
            ):
                pass
        same = cp.HookedLVLM(tiny.build("llava"))
        loaded = HadamardFFN.load(saved, same)
        with loaded.attach(same):
            same.model(**inputs)
        with (
            pytest.raises(CapaProbeError, match="calibrated on other weights"),
            loaded.attach(cp.HookedLVLM(others["other weights"])),
        ):
            pass

    def test_other_layers_or_another_width(self, saved: Path) -> None:
        with pytest.raises(CapaProbeError, match="is for layer 3, but the model has layers 0 to 1"):
            HadamardFFN.load(saved, cp.HookedLVLM(tiny.build("llava", num_hidden_layers=2)))
        with pytest.raises(CapaProbeError, match="width 32, but this one has 64"):
            HadamardFFN.load(saved, cp.HookedLVLM(tiny.build("llava", hidden_size=64)))

    def test_damaged_and_foreign_files(self, saved: Path, tmp_path: Path) -> None:
        content = saved.read_bytes()
        spoiled = {
            "empty": b"",
            "cut": content[: len(content) // 2],
            "a byte short": content[:-1],
            "text": b"alpha = 1",
        }
        for name, data in spoiled.items():
            (tmp_path / name).write_bytes(data)
        alpha = {"alpha.1": torch.ones(32)}
        save_file(alpha, tmp_path / "foreign")
        save_file(alpha, tmp_path / "list", {KEY: "[]"})
        save_file(alpha, tmp_path / "no json", {KEY: "{"})
        for name in (*spoiled, "foreign", "list", "no json"):
            with pytest.raises(CapaProbeError, match=f"{name} is damaged or was not written by capa_probe"):
                HadamardFFN.load(tmp_path / name)
        header = {"format_version": 1, "x": "residual", "layers": [1, 2], "r2": {}, "n_samples": 1}
        header |= {"n_tokens": 1, "manifest": {}}
        bad = {"layers": ({}, alpha), "version": ({"format_version": 2}, alpha)}
        bad["manifest"] = ({"manifest": None, "layers": [1]}, {"alpha.1": torch.full((32,), float("nan"))})
        for name, (change, tensors) in bad.items():
            save_file(tensors, tmp_path / name, {KEY: json.dumps(header | change)})
        with pytest.raises(CapaProbeError, match=r"layers is damaged .*alpha\.2"):
            HadamardFFN.load(tmp_path / "layers")
        with pytest.raises(CapaProbeError, match="version has format version 2, but"):
            HadamardFFN.load(tmp_path / "version")
        with pytest.raises(CapaProbeError, match="factors of layer 1 hold NaN"):
            HadamardFFN.load(tmp_path / "manifest")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(CapaProbeError, match="none.safetensors does not exist; give"):
            HadamardFFN.load(tmp_path / "none.safetensors")
        with pytest.raises(CapaProbeError, match="is a folder; give"):
            HadamardFFN.load(tmp_path)

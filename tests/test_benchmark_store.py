"""The folder of a benchmark run: what is reused, what is refused, what is removed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from capa_probe import CapaProbeError
from capa_probe.benchmark.store import Store, read_tables
from capa_probe.errors import OtherRunError

FACTS = {"model": "m", "settings": {"seed": 0, "keeps": [1.0, 0.5]}}
ROWS = pd.DataFrame({"sample": ["a", "b"], "kl": [0.25, 0.5]})


def never() -> pd.DataFrame:
    raise AssertionError("it was there already")


@pytest.fixture(params=["memory", "disk"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "run" if request.param == "disk" else None


def test_parts_are_made_once(out: Path | None) -> None:
    with Store.open(out, FACTS) as store:
        made = store.part("budget", "layer=3,keep=0.5", lambda: ROWS)
        again = store.part("budget", "layer=3,keep=0.5", never)
        other = store.part("budget", "layer=3,keep=0.25", lambda: ROWS.assign(kl=0.0))
        weights = store.tensors("vanilla", "x", lambda: {"p": torch.arange(3.0), "q": torch.ones(2, 2)})
        same = store.tensors("vanilla", "x", dict, names=("q",))
    pd.testing.assert_frame_equal(made, ROWS)
    pd.testing.assert_frame_equal(again, ROWS)
    assert other["kl"].tolist() == [0, 0]
    assert weights["p"].tolist() == [0, 1, 2]
    assert same["q"].tolist() == [[1, 1], [1, 1]]
    assert list(same) == ["q"]


def test_a_later_call_finds_them(tmp_path: Path) -> None:
    with Store.open(tmp_path / "run", FACTS) as store:
        store.part("budget", "a", lambda: ROWS)
        store.write("budget", ROWS)
    with Store.open(tmp_path / "run", FACTS) as store:
        pd.testing.assert_frame_equal(store.part("budget", "a", never), ROWS)
        assert (store.made, store.reused) == (0, 1)
        manifest = store.finish(seconds=3)
    assert manifest["tables"] == {"budget": 2}
    on_disk = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert on_disk == manifest
    assert (on_disk["model"], on_disk["seconds"]) == ("m", 3)
    pd.testing.assert_frame_equal(read_tables(tmp_path / "run")["budget"], ROWS)


def test_a_part_that_fails_is_not_kept(tmp_path: Path) -> None:
    def fails() -> pd.DataFrame:
        raise RuntimeError

    with Store.open(tmp_path / "run", FACTS) as store:
        with pytest.raises(RuntimeError):
            store.part("budget", "a", fails)
        assert store.part("budget", "a", lambda: ROWS)["sample"].tolist() == ["a", "b"]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    with Store.open(tmp_path / "run", FACTS) as store:
        store.part("budget", "a", lambda: ROWS)
    other = {"model": "m", "settings": {"seed": 1, "keeps": [1.0, 0.5]}}
    with (
        pytest.raises(OtherRunError, match=r"settings\.seed = 0, but now it is 1"),
        Store.open(tmp_path / "run", other),
    ):
        pass
    with Store.open(tmp_path / "run", other, overwrite=True) as store:
        assert store.part("budget", "a", lambda: ROWS.assign(kl=9.0))["kl"].tolist() == [9, 9]


def test_overwriting_removes_what_is_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Store.open(folder, FACTS) as store:
        store.part("budget", "a", lambda: ROWS)
        store.tensors("vanilla", "x", lambda: {"p": torch.zeros(1)})
        store.write("budget", ROWS)
        store.finish()
    (folder / "notes.txt").write_text("mine")
    with Store.open(folder, FACTS, overwrite=True):
        pass
    left = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert left == {"benchmark.json", "notes.txt"}


@pytest.mark.parametrize("name", ["file", "foreign", "profile"])
def test_what_is_no_benchmark_run_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "file":
        path.write_text("x")
    else:
        path.mkdir()
        (path / ("thesis.tex" if name == "foreign" else "manifest.json")).write_text("{}")
    expected = "is a file" if name == "file" else "holds no benchmark run"
    for overwrite in (False, True):
        with pytest.raises(CapaProbeError, match=expected), Store.open(path, FACTS, overwrite):
            pass
    if name != "file":
        assert len(list(path.iterdir())) == 1
        with pytest.raises(CapaProbeError, match="holds no benchmark run"):
            read_tables(path)


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom capa_probe.run_folder import locked\n"
        "with locked(sys.argv[1]):\n    print('in', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(CapaProbeError, match="Another process"), Store.open(tmp_path / "run", FACTS):
            pass
        other.communicate("")


def test_damage_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Store.open(folder, FACTS) as store:
        store.part("budget", "a", lambda: ROWS)
        store.tensors("vanilla", "x", lambda: {"p": torch.zeros(1)})
    (folder / "parts" / "budget" / "a.parquet").write_bytes(b"PAR1 broken")
    (folder / "parts" / "vanilla" / "x.safetensors").write_bytes(b"broken")
    with Store.open(folder, FACTS) as store:
        with pytest.raises(CapaProbeError, match=r"a\.parquet cannot be read .*; remove it"):
            store.part("budget", "a", never)
        with pytest.raises(CapaProbeError, match=r"x\.safetensors cannot be read .*; remove it"):
            store.tensors("vanilla", "x", dict)
    (folder / "benchmark.json").write_text("{")
    with pytest.raises(CapaProbeError, match=r"benchmark\.json is damaged"), Store.open(folder, FACTS):
        pass


@pytest.mark.parametrize("key", ["", "../up", "a/b", "a b", "x" * 201, "\n"])
def test_keys_are_names_of_files(tmp_path: Path, key: str) -> None:
    with (
        Store.open(tmp_path / "run", FACTS) as store,
        pytest.raises(CapaProbeError, match="was given as the key of a part"),
    ):
        store.part("budget", key, lambda: ROWS)
    with (
        Store.open(None, FACTS) as store,
        pytest.raises(CapaProbeError, match="was given as the name of a table"),
    ):
        store.write("Up/and", ROWS)

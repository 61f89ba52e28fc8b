"""Depth of several models in one figure."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from capa_probe.benchmark.store import read_tables
from capa_probe.errors import CapaProbeError
from capa_probe.figures.depth_compared import depth_compared

ROOT = Path(__file__).parents[1]
FIRST = ROOT / "docs" / "data" / "depth-first"


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return read_tables(FIRST)


def test_lines_show_the_tables(tables: dict[str, pd.DataFrame]) -> None:
    other = {**tables, "depth_gone": tables["depth_gone"].assign(correct=lambda t: t["correct"] / 2)}
    figure = depth_compared({"one": tables, "half": other})
    gone, kept, regions = figure.axes
    wanted = tables["depth_gone"].query("task == 'all'").sort_values("layer")["correct"].to_numpy()
    for line, factor in zip(gone.lines, (1, 0.5), strict=True):
        np.testing.assert_allclose(line.get_ydata(), factor * wanted)
        np.testing.assert_allclose(line.get_xdata(), np.arange(9) / 8)
    random = (
        tables["depth_kept"].query("task == 'all' and layer == 2 and score == 'random'").set_index("keep")
    )
    np.testing.assert_allclose(
        kept.lines[0].get_ydata(),
        [wanted[-1], *random["correct"].loc[[0.5, 0.25, 0.1, 0.05]], wanted[2]],
    )
    rows = tables["depth_regions"].query("task == 'all' and layer == 2").set_index("tokens")["correct"]
    order = ["all", "others_removed", "region_removed", "region_kept", "others_kept"]
    np.testing.assert_allclose(regions.lines[0].get_ydata(), rows.loc[order])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"{name} (n = 210 questions about 154 images)" for name in ("one", "half")
    ]


def test_runs_without_regions_or_with_too_little(tables: dict[str, pd.DataFrame]) -> None:
    bare = {name: table for name, table in tables.items() if name != "depth_regions"}
    assert not depth_compared({"bare": bare}).axes[2].lines
    with pytest.raises(
        CapaProbeError, match=r"layer=3 was given, but the run of one has the layers \[2, 4\]"
    ):
        depth_compared({"one": tables}, layer=3)
    with pytest.raises(CapaProbeError, match="0 models were given; give 1 to 6"):
        depth_compared({})
    other = tables["depth_kept"].assign(keep=lambda table: table["keep"].replace(0.05, 0.02))
    with pytest.raises(CapaProbeError, match=r"other shares of the tokens at layer 2: .*0\.02\]"):
        depth_compared({"one": tables, "two": {**tables, "depth_kept": other}})
    blind = {**tables, "depth_gone": tables["depth_gone"].drop(columns="correct")}
    with pytest.raises(CapaProbeError, match="the run of one holds no accuracy"):
        depth_compared({"one": blind})


def test_the_script_takes_names_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "scripts" / "compare_depth.py"))["main"]
    main([f"one={FIRST}", f"two={FIRST}", "--out", str(tmp_path / "two.png")])
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as ended:
        main([str(FIRST), "--out", str(tmp_path / "none.png")])
    assert ended.value.code == 2
    assert "give a name and the folder of a run, as in NAME=RUN" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()

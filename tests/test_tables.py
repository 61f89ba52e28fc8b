"""Profile tables: summaries against a naive twin, writing, reading back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capa_probe.errors import CapaProbeError
from capa_probe.layer_table import summarise_layers
from capa_probe.run_folder import check_output, remove_profile
from capa_probe.schema import GROUP_COLUMNS, LAYER_SCHEMA, MEASURES, TOKEN_SCHEMA
from capa_probe.tables import LayerProfile
from capa_probe.writing import ProfileWriter
from tests.synthetic import World, facts, profile, tokens

WORLD = World(steps=2)


def naive_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Group by group, value by value."""
    rows = []
    for key, group in table.groupby(list(GROUP_COLUMNS), sort=False):
        row = dict(zip(GROUP_COLUMNS, key, strict=True)) | {"n_tokens": len(group)}
        for measure in MEASURES:
            known = [float(value) for value in group[measure] if not np.isnan(value)]
            row[f"{measure}_mean"] = sum(known) / len(known) if known else np.nan
            for stat, quantile in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
                row[f"{measure}_{stat}"] = np.quantile(known, quantile) if known else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def assert_same_summary(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    assert list(found.columns) == LAYER_SCHEMA.names == list(wanted.columns)
    keys = [*GROUP_COLUMNS, "n_tokens"]
    assert found[keys].to_numpy().tolist() == wanted[keys].to_numpy().tolist()
    rest = [name for name in found.columns if name not in keys]
    np.testing.assert_allclose(
        found[rest].to_numpy(float), wanted[rest].to_numpy(float), rtol=1e-5, atol=1e-6
    )


def write(path: Path, world: World = WORLD, rows: str = "all", rows_per_part: int = 1) -> LayerProfile:
    table, writer = tokens(world), ProfileWriter(path, rows_per_part)
    for sample in world.samples:
        writer.add(table[table["sample"] == sample], rows)
    return writer.finish(facts(world))


def test_the_schema_is_the_contract() -> None:
    wanted = (
        "sample step layer position kind image tile row col attention attention_text contribution removal_effect "
        "value_norm resid_pre_norm resid_mid_norm attn_update_norm ffn_update_norm attn_cosine ffn_cosine "
        "sink_strength sink_dim sink_strength_2 sink_dim_2 sink_strength_3 sink_dim_3 sink_strength_4 sink_dim_4"
    )
    assert TOKEN_SCHEMA.names == wanted.split()
    types = {name: str(TOKEN_SCHEMA.field(name).type) for name in TOKEN_SCHEMA.names}
    assert {types[name] for name in MEASURES} == {"float"}
    assert {types[name] for name in ("sample", "kind")} == {"string"}
    assert {type_ for name, type_ in types.items() if name not in (*MEASURES, "sample", "kind")} == {"int32"}
    assert len(LAYER_SCHEMA) == 5 + 4 * len(MEASURES)
    assert not any(name.startswith("sink_dim") for name in LAYER_SCHEMA.names)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    rows = pa.Table.from_pandas(table[TOKEN_SCHEMA.names], schema=TOKEN_SCHEMA, preserve_index=False)
    return summarise_layers(rows).to_pandas()


def test_summaries_equal_the_naive_twin() -> None:
    table = tokens(WORLD)
    assert_same_summary(summary(table), naive_summary(table))


@st.composite
def token_tables(draw: st.DrawFn) -> pd.DataFrame:
    """A few rows in any order, in groups of any size, values missing anywhere."""
    n = draw(st.integers(1, 24))
    table = tokens(World(samples=("x",), n_layers=1, n_text=n)).iloc[:n].copy()
    for name, values in (
        ("sample", ["p", "q"]),
        ("step", [0, 1]),
        ("layer", [0, 3]),
        ("kind", ["visual", "text"]),
    ):
        table[name] = draw(st.lists(st.sampled_from(values), min_size=n, max_size=n))
    numbers = st.one_of(st.just(np.nan), st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, 1.0]))
    for name in draw(st.sets(st.sampled_from(MEASURES))):
        table[name] = draw(st.lists(numbers, min_size=n, max_size=n))
    return table.reset_index(drop=True)


@given(token_tables())
@settings(max_examples=60)
def test_summaries_equal_the_naive_twin_on_anything(table: pd.DataFrame) -> None:
    table[list(MEASURES)] = table[list(MEASURES)].astype(np.float32)
    assert_same_summary(summary(table), naive_summary(table))


def test_summary_of_nothing() -> None:
    found = summary(tokens(WORLD).iloc[:0])
    assert found.empty
    assert list(found.columns) == LAYER_SCHEMA.names


@pytest.mark.parametrize("rows", ["all", "visual", "none"])
@pytest.mark.parametrize("on_disk", [True, False])
def test_what_is_written_is_read_back(tmp_path: Path, rows: str, on_disk: bool) -> None:
    table = tokens(WORLD)
    made = write(tmp_path / "run", rows=rows) if on_disk else profile(WORLD, rows)
    kept = {"all": table, "visual": table[table["kind"] == "visual"], "none": table.iloc[:0]}[rows]
    for found in [made, LayerProfile.load(tmp_path / "run")] if on_disk else [made]:
        assert found.rows == rows
        assert list(found.tokens.columns) == TOKEN_SCHEMA.names
        assert [str(t) for t in found.tokens.dtypes[1:4]] == ["int32"] * 3
        pd.testing.assert_frame_equal(found.tokens, kept.reset_index(drop=True), check_dtype=False)
        # Summaries come from all rows, whichever are kept.
        assert_same_summary(found.layers, naive_summary(table))
        assert found.manifest["n_token_rows"] == len(kept)
        assert found.manifest["n_layer_rows"] == len(found.layers)


def test_files_and_no_others_lie_in_a_finished_folder(tmp_path: Path) -> None:
    write(tmp_path / "run")
    names = {
        str(file.relative_to(tmp_path / "run")) for file in (tmp_path / "run").rglob("*") if file.is_file()
    }
    parts = {f"tokens/part-0000{part}.parquet" for part in range(3)}
    assert names == {"manifest.json", "layers.parquet", *parts}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["d_model"] == facts(WORLD)["d_model"]
    assert manifest["n_parts"] == 3


def test_batches_are_gathered_into_parts_of_whole_samples(tmp_path: Path) -> None:
    per_sample = len(tokens(WORLD)) // 3
    found = write(tmp_path / "run", rows_per_part=per_sample + 1)
    assert [sorted(part["sample"].unique()) for part in found.read(["sample"])] == [["a", "b"], ["c"]]


@pytest.mark.parametrize("on_disk", [True, False])
def test_read_streams_columns_and_rows(tmp_path: Path, on_disk: bool) -> None:
    found = write(tmp_path / "run") if on_disk else profile(WORLD)
    table = tokens(WORLD)
    wanted = table[(table["layer"] == 3) & (table["kind"] == "visual")][["position", "attention"]]
    for where in (
        [("layer", "==", 3), ("kind", "==", "visual")],
        [[("layer", "==", 3), ("kind", "==", "visual")]],
        (ds.field("layer") == 3) & (ds.field("kind") == "visual"),
    ):
        parts = list(found.read(["position", "attention"], where))
        assert len(parts) == 3
        assert all(list(part.columns) == ["position", "attention"] for part in parts)
        pd.testing.assert_frame_equal(
            pd.concat(parts, ignore_index=True), wanted.reset_index(drop=True), check_dtype=False
        )
    assert [len(part) for part in found.read(where=[("sample", "==", "b")])] == [0, len(table) // 3, 0]
    assert found.select(["layer"], [("layer", ">", 99)]).empty


@pytest.mark.parametrize("on_disk", [True, False])
def test_read_refuses_what_it_cannot_do(tmp_path: Path, on_disk: bool) -> None:
    found = write(tmp_path / "run") if on_disk else profile(WORLD)
    with pytest.raises(CapaProbeError, match="'phi'.*give a list of token columns: sample, step"):
        found.read(["phi"])
    with pytest.raises(CapaProbeError, match="columns='layer' was given"):
        found.read("layer")
    with pytest.raises(CapaProbeError, match="where='layer == 3' was given"):
        found.read(where="layer == 3")
    with pytest.raises(CapaProbeError, match="cannot be read as asked.*nowhere"):
        list(found.read(where=[("nowhere", "==", 3)]))


def test_a_profile_says_what_it_is(tmp_path: Path) -> None:
    text = repr(write(tmp_path / "run", rows="visual"))
    for fact in (
        "made-up",
        "3 samples",
        "5 layers",
        "2 decode steps",
        "visual tokens only",
        str(tmp_path / "run"),
    ):
        assert fact in text
    assert "in memory" in repr(profile(WORLD))


def test_load_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CapaProbeError, match="nowhere does not exist"):
        LayerProfile.load(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CapaProbeError, match="is not a folder"):
        LayerProfile.load(file)
    with pytest.raises(CapaProbeError, match=r"holds no profile \(manifest.json is missing\)"):
        LayerProfile.load(tmp_path)
    ProfileWriter(tmp_path / "begun").add(tokens(WORLD))
    with pytest.raises(CapaProbeError, match="a profile that was not finished; run it again"):
        LayerProfile.load(tmp_path / "begun")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": "soon"}', '{"format_version": 1}'])
def test_load_refuses_another_programs_manifest(tmp_path: Path, text: str) -> None:
    write(tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_text(text)
    with pytest.raises(CapaProbeError, match="is not the manifest of a profile"):
        LayerProfile.load(tmp_path / "run")


def test_load_refuses_newer_and_damaged_profiles(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(
        CapaProbeError, match=r"newer capa_probe \(format 2, this one reads up to 1\); upgrade"
    ):
        LayerProfile.load(run)
    (run / "manifest.json").write_text(json.dumps(manifest))

    part = run / "tokens" / "part-00000.parquet"
    whole = part.read_bytes()
    pq.write_table(pq.read_table(part).drop_columns(["attention", "row"]), part)
    with pytest.raises(CapaProbeError, match="part-00000.parquet lacks the columns row, attention"):
        LayerProfile.load(run)
    part.write_bytes(whole[:100])
    with pytest.raises(CapaProbeError, match="part-00000.parquet cannot be read"):
        LayerProfile.load(run)
    part.unlink()
    with pytest.raises(CapaProbeError, match="2 token parts lie in it, but its manifest says 3"):
        LayerProfile.load(run)


def test_the_writer_refuses_what_would_make_wrong_tables() -> None:
    table = tokens(WORLD)
    with pytest.raises(CapaProbeError, match="rows='some' was given"):
        ProfileWriter().add(table, "some")
    with pytest.raises(CapaProbeError, match="lack the columns attention, ffn_cosine"):
        ProfileWriter().add(table.drop(columns=["attention", "ffn_cosine"]))
    writer = ProfileWriter()
    writer.add(table[table["sample"] == "a"], "visual")
    with pytest.raises(CapaProbeError, match="rows='all' was given after rows='visual'"):
        writer.add(table[table["sample"] == "b"], "all")
    with pytest.raises(CapaProbeError, match="sample 'a' were added twice"):
        writer.add(table, "visual")


def test_output_paths(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "deep")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CapaProbeError, match="is a file"):
        ProfileWriter(file)
    with pytest.raises(CapaProbeError, match="is not empty and holds no profile"):
        ProfileWriter(tmp_path)
    write(tmp_path / "run")
    with pytest.raises(CapaProbeError, match="already holds a finished profile"):
        ProfileWriter(tmp_path / "run")


def test_an_interrupted_run_is_begun_again(tmp_path: Path) -> None:
    table = tokens(WORLD)
    writer = ProfileWriter(tmp_path / "run", rows_per_part=1)
    for sample in ("a", "b", "c"):
        writer.add(table[table["sample"] == sample].assign(attention=0.5))
    assert len(list((tmp_path / "run" / "tokens").iterdir())) == 3  # it writes while it runs
    found = write(tmp_path / "run", World(samples=("z",)))
    assert list(found.tokens["sample"].unique()) == ["z"]
    assert len(LayerProfile.load(tmp_path / "run").tokens) == len(found.tokens)


def test_removing_a_profile_leaves_other_files(tmp_path: Path) -> None:
    write(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "tokens" / "mine.txt").write_text("mine")
    remove_profile(tmp_path / "run")
    assert {file.name for file in (tmp_path / "run").rglob("*") if file.is_file()} == {
        "notes.txt",
        "mine.txt",
    }

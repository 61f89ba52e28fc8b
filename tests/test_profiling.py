"""``cp.profile`` from end to end: samples and tensors in, tables out, and what it says when something is wrong.

That the numbers are right is tested in ``tests/oracles``, that nothing stays on the model in ``tests/invariances``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from capa_probe.schema import MEASURES
from capa_probe.tables import is_finished, is_unfinished
from tests import processors, tiny

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
DOCS = Path(__file__).parents[1] / "docs" / "tables.md"
#: What differs between two runs on the same data with the same settings.
PASSING = ("created", "seconds")


def wrap(family: str = "llava") -> cp.HookedLVLM:
    return cp.HookedLVLM(tiny.shared(family), processors.shared(family))


def samples_of(n: int = 4) -> list[cp.Sample]:
    """Samples with one, two and no images, of different length."""
    images = [processors.image(20, 40, 1), processors.image(16, 16, 2), processors.image(40, 24, 3)]
    given = [
        cp.Sample("one", images[0], "what is it?", "a cat"),
        cp.Sample("two", images[1:], "which of the two is darker?"),
        cp.Sample("none", (), "hello"),
        cp.Sample("last", images[2], "why?", task="reason"),
    ]
    return given[:n]


def run(lvlm: cp.HookedLVLM, samples: Any, **options: Any) -> cp.LayerProfile:
    return cp.profile(lvlm, samples, **{"progress": False, **options})


def same(one: pd.DataFrame, other: pd.DataFrame, **tolerance: float) -> None:
    pd.testing.assert_frame_equal(one, other, check_exact=not tolerance, **tolerance)


def refused(match: str, lvlm: cp.HookedLVLM, samples: Any, **options: Any) -> str:
    with pytest.raises(CapaProbeError, match=match) as error:
        run(lvlm, samples, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


# -- what goes in


@FAMILIES
def test_samples_and_prepared_tensors_give_the_same_rows(family: str) -> None:
    lvlm, samples = wrap(family), samples_of()
    by_sample = run(lvlm, samples)
    prepared = [lvlm.prepare(list(s.images) or None, s.question) for s in samples]
    by_tensor = run(lvlm, iter(prepared))
    assert list(by_sample.tokens["sample"].unique()) == ["one", "two", "none", "last"]
    assert list(by_tensor.tokens["sample"].unique()) == ["0", "1", "2", "3"]
    same(by_sample.tokens.drop(columns="sample"), by_tensor.tokens.drop(columns="sample"))
    same(by_sample.layers.drop(columns="sample"), by_tensor.layers.drop(columns="sample"))
    # Every image and every visual token is there, in its place.
    for sample, inputs in zip(samples, prepared, strict=True):
        rows = by_sample.select(where=[("sample", "==", sample.id), ("layer", "==", 0)])
        assert len(rows) == inputs["attention_mask"].sum()
        assert (rows["kind"] == "visual").sum() == (inputs["input_ids"] == tiny.IMAGE).sum()
        spans = lvlm.spans(inputs).images
        assert sorted(set(rows["image"]) - {-1}) == list(range(len(spans)))
        for span in spans:
            own = rows[rows["image"] == span.index]
            assert list(own["position"]) == span.positions.tolist()
            for name in ("tile", "row", "col"):
                assert list(own[name]) == getattr(span, name).tolist()
            assert own["row"].min() == 0  # none without a place


@FAMILIES
def test_the_batch_size_changes_nothing(family: str) -> None:
    lvlm, samples = wrap(family), samples_of()
    one, four = (run(lvlm, samples, batch_size=n, steps=2, rows="all") for n in (1, 4))
    same(one.tokens, four.tokens, rtol=2e-4, atol=2e-6)
    same(one.layers, four.layers, rtol=2e-4, atol=2e-6)
    assert one.manifest["data_fingerprint"] == four.manifest["data_fingerprint"]


def test_images_from_files(tmp_path: Path) -> None:
    files = []
    for i, sample in enumerate(samples_of(2)):
        for j, image in enumerate(sample.images):
            files.append((sample.id, tmp_path / f"{i}-{j}.png"))
            image.save(files[-1][1])
    from_files = [
        cp.Sample(s.id, [path for owner, path in files if owner == s.id], s.question) for s in samples_of(2)
    ]
    same(run(wrap(), from_files).tokens, run(wrap(), samples_of(2)).tokens)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_limit(batch_size: int) -> None:
    lvlm, samples = wrap(), samples_of()
    two = run(lvlm, samples, limit=2, batch_size=batch_size)
    same(two.tokens, run(lvlm, samples[:2], batch_size=batch_size).tokens)
    assert two.manifest["n_samples"] == 2
    assert two.manifest["settings"]["limit"] == 2
    assert run(lvlm, samples, limit=99).manifest["n_samples"] == 4


def test_limit_within_a_batch_of_tensors_and_without_reading_further() -> None:
    lvlm = wrap()
    full = run(lvlm, [tiny.inputs("llava"), tiny.inputs("llava", seed=1)]).tokens

    def source() -> Iterator[dict[str, torch.Tensor]]:
        yield tiny.inputs("llava")
        yield tiny.inputs("llava", seed=1)
        raise AssertionError("read further than the limit")

    for limit in (2, 3, 4, 6):
        limited = run(lvlm, source(), limit=limit)
        assert limited.manifest["n_samples"] == limit
        same(limited.tokens, full[full["sample"].astype(int) < limit].reset_index(drop=True))


# -- what comes out


@pytest.mark.parametrize("steps", [0, 2])
def test_a_folder_and_memory_hold_the_same(steps: int, tmp_path: Path) -> None:
    lvlm, out = wrap("internvl"), tmp_path / "deep" / "run"
    memory = run(lvlm, samples_of(), steps=steps, batch_size=2)
    disk = run(lvlm, samples_of(), steps=steps, batch_size=2, out=out)
    loaded = cp.LayerProfile.load(out)
    assert memory.path is None
    assert disk.path == loaded.path == out
    for profile in (disk, loaded):
        same(profile.tokens, memory.tokens)
        same(profile.layers, memory.layers)
    assert loaded.manifest == disk.manifest == json.loads((out / "manifest.json").read_text())
    for key in memory.manifest.keys() | disk.manifest.keys():
        assert key in PASSING or memory.manifest[key] == disk.manifest[key], key
    assert is_finished(out)
    assert not is_unfinished(out)
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == ["layers.parquet", "manifest.json", "samples.parquet", "tokens/part-00000.parquet"]


@FAMILIES
def test_decode_steps(family: str) -> None:
    lvlm, samples = wrap(family), samples_of(3)
    tokens = run(lvlm, samples, steps=2, rows="all").tokens
    prefill = run(lvlm, samples).tokens
    same(tokens[tokens["step"] == 0].reset_index(drop=True), prefill, rtol=1e-5, atol=1e-6)
    lengths = prefill.groupby("sample")["position"].max() + 1
    seen = tokens.groupby(["sample", "step", "layer"])["position"].agg(["min", "max", "count"])
    for (sample, step, _), row in seen.iterrows():
        assert (row["min"], row["max"], row["count"]) == (
            0,
            lengths[sample] + step - 1,
            lengths[sample] + step,
        )
    # Greedy tokens by hand, to know which samples go on for how long.
    for sample in samples:
        inputs = lvlm.prepare(list(sample.images) or None, sample.question)
        with torch.no_grad():
            ids = lvlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :].tolist()
        wanted = min(2, new.index(2) if 2 in new else 3)
        assert tokens.loc[tokens["sample"] == sample.id, "step"].max() == wanted
    later = tokens[tokens["step"] > 0]
    generated = later["position"] >= later["sample"].map(lengths)
    assert (later.loc[generated, "kind"] == "text").all()
    assert (later.loc[generated, ["image", "tile", "row", "col"]] == -1).all(axis=None)
    total = later.groupby(["sample", "step", "layer"])["attention"].sum()
    np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_rows() -> None:
    lvlm, samples = wrap("qwen2_5_vl"), samples_of()
    kept = {rows: run(lvlm, samples, steps=1, rows=rows) for rows in ("all", "visual", "none")}
    full = kept["all"].tokens
    same(kept["visual"].tokens, full[full["kind"] == "visual"].reset_index(drop=True))
    assert len(kept["none"].tokens) == 0
    assert list(kept["none"].tokens.columns) == list(full.columns)
    for rows, profile in kept.items():
        assert profile.rows == profile.manifest["settings"]["rows"] == rows
        assert profile.manifest["n_token_rows"] == len(profile.tokens)
        assert profile.manifest["n_layer_rows"] == len(profile.layers)
        same(profile.layers, kept["all"].layers)  # computed from every row in any case
    assert run(lvlm, samples[:1]).rows == "all"
    assert run(lvlm, samples[:1], steps=1).rows == "visual"


def test_probes() -> None:
    lvlm, samples = wrap(), samples_of(2)
    everything = run(lvlm, samples, probes="all").tokens
    default = run(lvlm, samples)
    assert everything[list(MEASURES)].notna().any().all()
    assert default.tokens["removal_effect"].isna().all()
    same(
        default.tokens.drop(columns="removal_effect"),
        everything.drop(columns="removal_effect"),
    )
    assert "removal_effect" not in default.manifest["settings"]["probes"]
    for names, filled in (
        ("contribution", {"contribution"}),
        (["ffn_cosine", "value_norm"], {"ffn_cosine", "value_norm"}),
        (("attention",), {"attention", "attention_text"}),
        (["sink_strength"], {name for name in MEASURES if name.startswith("sink_strength")}),
        (["removal_effect", "removal_effect"], {"removal_effect"}),
    ):
        tokens = run(lvlm, samples, probes=names).tokens
        assert {name for name in MEASURES if tokens[name].notna().any()} == filled
        for name in filled:
            pd.testing.assert_series_equal(tokens[name], everything[name])
    listed = 'give "default", "all" or some of attention, contribution, removal_effect'
    refused(f"probes='nonsense' was given; {listed}", lvlm, samples, probes="nonsense")
    refused("nonsense", lvlm, samples, probes=["attention", "nonsense"])
    refused(r"probes=\[\] was given", lvlm, samples, probes=[])


def test_the_manifest_is_what_the_documentation_says(tmp_path: Path) -> None:
    lvlm = wrap("internvl")
    manifest = run(
        lvlm, samples_of(3), steps=1, batch_size=2, limit=9, sink_dims=[7, 3], out=tmp_path / "run"
    ).manifest
    section = DOCS.read_text(encoding="utf-8").split("## manifest")[1].split("\n## ")[0]
    documented = [
        key
        for line in section.splitlines()
        if line.startswith("| `")
        for key in re.findall(r"`(\w+)`", line.split("|")[1])
    ]
    assert sorted(manifest) == sorted(documented)
    expected = {
        "family": "internvl",
        "architecture": "InternVLForConditionalGeneration",
        "n_layers": 4,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_model": 32,
        "norm_eps": 1e-6,
        "dtype": "float32",
        "device": "cpu",
        "attention_backend": "sdpa",
        "n_samples": 3,
        "sink_dims": [3, 7],
        "published_sink_dims": None,
        "rows": "visual",
        "n_parts": 1,
        "revision": None,
    }
    assert {key: manifest[key] for key in expected} == expected
    settings = manifest["settings"]
    assert settings.pop("probes")[:2] == ["attention", "contribution"]
    assert settings == {"steps": 1, "batch_size": 2, "rows": "visual", "limit": 9}
    for package in ("capa-probe", "torch", "transformers", "transformer-lens"):
        assert manifest["versions"][package] == version(package)
    assert manifest["seconds"] > 0
    for key in ("config_hash", "data_fingerprint"):
        assert re.fullmatch("[0-9a-f]{64}", manifest[key])


def test_the_samples_table(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    (tmp_path / "bad.png").touch()
    file = tmp_path / "red.png"
    red.save(file)
    given = [
        cp.Sample("a", red, "what?", task="one"),
        cp.Sample("b", blue, "what?"),
        cp.Sample("bad", tmp_path / "bad.png", "what?"),
        cp.Sample("c", red, "why?", task="one"),
        cp.Sample("d", (), "why?"),
        cp.Sample("e", (red, blue), "why?"),
        cp.Sample("f", file, "why?"),
        cp.Sample("g", file.read_bytes(), "why?"),
    ]
    with pytest.warns(cp.errors.LeftOutWarning, match="1 of 8 samples is left out"):
        table = run(wrap(), given, out=tmp_path / "run").samples
    same(table, cp.LayerProfile.load(tmp_path / "run").samples)
    assert list(table["sample"]) == ["a", "b", "c", "d", "e", "f", "g"]
    assert list(table["n_images"]) == [1, 1, 1, 0, 2, 1, 1]
    assert list(table["task"].fillna("-")) == ["one", "-", "one", "-", "-", "-", "-"]
    key = table.set_index("sample")["images"]
    assert key["a"] == key["c"]
    assert key["f"] == key["g"]
    assert key["d"] == ""
    assert key[["a", "b", "d", "e", "f"]].nunique() == 5
    assert run(wrap(), [tiny.inputs("llava")]).samples.empty


def test_two_runs_are_identical() -> None:
    one, two = (run(wrap(), samples_of(), steps=2, batch_size=2) for _ in range(2))
    same(one.tokens, two.tokens)
    same(one.layers, two.layers)
    assert {k: v for k, v in one.manifest.items() if k not in PASSING} == {
        k: v for k, v in two.manifest.items() if k not in PASSING
    }


def test_the_fingerprint_tells_data_apart() -> None:
    lvlm, image = wrap(), processors.image(16, 16, 1)
    lists = [
        [cp.Sample("a", image, "what?")],
        [cp.Sample("b", image, "what?")],
        [cp.Sample("a", image, "why?")],
        [cp.Sample("a", processors.image(16, 16, 2), "what?")],
        [tiny.inputs("llava")],
        [tiny.inputs("llava", seed=1)],
    ]
    prints = [run(lvlm, samples, rows="none").manifest["data_fingerprint"] for samples in lists]
    assert len(set(prints)) == len(lists)


def test_progress_is_shown_only_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    run(wrap(), samples_of(2))
    assert capsys.readouterr() == ("", "")
    run(wrap(), samples_of(2), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "profile" in err
    assert "2/2" in err


# -- what is refused


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "No sample was given to profile; give at least one"),
        ([cp.Sample("a", (), "q"), cp.Sample("a", (), "r")], "Two samples have the id 'a'"),
        (cp.Sample("a", (), "q"), "A single Sample was given"),
        (tiny.inputs("llava"), "A single dict was given"),
        ("data/folder", "A single str was given .*load_samples"),
        ([cp.Sample("a", (), "q"), tiny.inputs("llava")], "A dict was given among samples"),
        ([tiny.inputs("llava"), cp.Sample("a", (), "q")], "A Sample without input_ids was given among"),
        ([{"pixel_values": torch.zeros(1)}], "A dict without input_ids"),
        ([17], "A int was given among samples"),
    ],
)
def test_samples_that_are_none(samples: Any, message: str) -> None:
    refused(message, wrap(), samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps=-1 was given; give a whole number of at least 0"),
        ({"steps": 1.5}, "steps=1.5 was given"),
        ({"batch_size": 0}, "batch_size=0 was given; give a whole number of at least 1"),
        ({"limit": 0}, "limit=0 was given"),
        ({"rows": "some"}, 'rows=.some. was given; give "all", "visual" or "none"'),
        ({"sink_dims": []}, "sink_dims=.* was given; give at least one dimension"),
        ({"sink_dims": [0, 32]}, "each from 0 to 31"),
        ({"sink_dims": [-1]}, "each from 0 to 31"),
    ],
)
def test_arguments_that_cannot_be_used(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(message, wrap(), samples_of(1), out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_missing_or_unreadable_image_is_named_with_its_sample(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    good = samples_of(2)
    for file, why in (("gone.png", "does not exist"), ("text.png", "cannot be read as an image")):
        bad = cp.Sample("bad", tmp_path / file, "what is it?")
        text = refused(f"{file} of sample 'bad' {why}", wrap(), [*good, bad], strict=True)
        assert "one" not in re.findall(r"'(\w+)'", text)


def test_images_and_placeholders_that_do_not_match_are_named_with_their_sample() -> None:
    bad = cp.Sample("bad", Image.new("RGB", (16, 16)), "<image> and <image>")
    refused("Sample bad: Prompt 0 holds 2 image placeholders", wrap(), [*samples_of(1), bad])


def test_samples_need_a_processor() -> None:
    refused("has no processor", cp.HookedLVLM(tiny.shared("llava")), samples_of(1))


def test_decoding_right_padded_inputs_is_refused() -> None:
    inputs = tiny.inputs("llava", padding_side="right")
    refused('steps=1 was asked for on right-padded inputs.*padding_side="left"', wrap(), [inputs], steps=1)


@FAMILIES
def test_a_statistic_that_is_not_finite_is_named_with_layer_and_sample(family: str) -> None:
    model = tiny.build(family)
    lvlm = cp.HookedLVLM(model)
    layer = lvlm.family.layers(model)[2]
    with torch.no_grad():
        layer.mlp.down_proj.weight[5] = torch.nan
    # The first layer that shows it is the one that is broken, whichever sample comes first.
    refused("ffn_update_norm of sample 0 at layer 2, step 0, is NaN or infinite", lvlm, [tiny.inputs(family)])
    refused(
        "sample 0 at layer 2, step 0", lvlm, [tiny.inputs(family)], steps=2, probes=["residual", "ffn_cosine"]
    )


def test_one_bad_sample_is_told_from_good_ones() -> None:
    inputs = tiny.inputs("llava", images=(1, 1, 1))
    inputs["pixel_values"][1, 0, 3, 3] = torch.nan
    refused("of sample 1 at layer 0, step 0, is NaN", wrap(), [inputs])
    assert run(wrap(), [inputs], limit=1).manifest["n_samples"] == 1  # the row of sample 1 is left out


def test_nan_everywhere_is_not_taken_for_not_measured() -> None:
    model = tiny.build("llava")
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.fill_(torch.nan)
    inputs = tiny.inputs("llava", images=(0, 0))
    refused("of sample 0 at layer 0, step 0, is NaN or infinite", cp.HookedLVLM(model), [inputs])


def test_values_too_large_for_float16_are_refused() -> None:
    model = tiny.build("llava").half()
    layer = model.model.language_model.layers[1]
    with torch.no_grad():
        layer.mlp.down_proj.weight.mul_(1e5)  # infinite in float16
    text = refused("at layer 1, step 0, is NaN or infinite", cp.HookedLVLM(model), [tiny.inputs("llava")])
    assert "load it in bfloat16 or float32" in text


def test_nan_logits_are_refused_where_they_choose_tokens() -> None:
    model = tiny.build("llava")
    with torch.no_grad():
        model.lm_head.weight[9] = torch.nan
    lvlm = cp.HookedLVLM(model)
    refused(
        "logits that choose generated token 1 of sample 0 hold NaN", lvlm, [tiny.inputs("llava")], steps=1
    )
    run(lvlm, [tiny.inputs("llava")])  # no logits enter the tables of prefill


# -- what is left behind


def test_a_user_s_hook_stays_and_is_seen_by_the_profile() -> None:
    lvlm = cp.HookedLVLM(tiny.build("llava"), processors.shared("llava"))
    plain = run(lvlm, samples_of(1)).tokens

    def double(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return 2 * x

    name = "blocks.1.hook_mlp_out"
    with lvlm.hooks([(name, double)]):
        doubled = run(lvlm, samples_of(1)).tokens
        assert len(lvlm.hook_dict[name].fwd_hooks) == 1
    before = plain["layer"] == 0
    same(doubled[before], plain[before])
    at = plain["layer"] == 1
    np.testing.assert_allclose(
        doubled.loc[at, "ffn_update_norm"], 2 * plain.loc[at, "ffn_update_norm"], rtol=1e-5
    )


def test_an_unfinished_folder_is_marked_and_can_be_run_again(tmp_path: Path) -> None:
    lvlm, out = wrap(), tmp_path / "run"
    broken = [*samples_of(), cp.Sample("bad", tmp_path / "gone.png", "what?")]
    refused("gone.png", lvlm, broken, out=out, strict=True)
    assert is_unfinished(out)
    assert not is_finished(out)
    assert not (out / "manifest.json").exists()
    with pytest.raises(CapaProbeError, match="holds a profile that was not finished; run it again"):
        cp.LayerProfile.load(out)
    again = run(lvlm, samples_of(), out=out)
    assert not is_unfinished(out)
    same(cp.LayerProfile.load(out).tokens, again.tokens)
    same(again.tokens, run(lvlm, samples_of()).tokens)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused("is not empty and holds no profile", wrap(), samples_of(1), out=tmp_path)
    refused("is a file", wrap(), samples_of(1), out=tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@FAMILIES
def test_decode_steps_follow_whichever_side_the_tokenizer_pads_on(family: str) -> None:
    processor = processors.build(family)
    processor.tokenizer.padding_side = "right"
    other = run(cp.HookedLVLM(tiny.shared(family), processor), samples_of(), steps=1, batch_size=4)
    same(other.tokens, run(wrap(family), samples_of(), steps=1, batch_size=4).tokens)


def test_labels_and_generation_settings_do_not_matter() -> None:
    model, inputs = tiny.build("llava"), tiny.inputs("llava")
    plain = run(cp.HookedLVLM(model), [inputs], steps=1).tokens
    model.generation_config.return_dict_in_generate = True
    same(run(cp.HookedLVLM(model), [inputs | {"labels": inputs["input_ids"]}], steps=1).tokens, plain)

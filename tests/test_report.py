"""The report: what it says is what the run's tables say, and what is missing is said, not left out."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from capa_probe import findings
from capa_probe.cli import app
from capa_probe.errors import CapaProbeError
from capa_probe.probes import choose_probes
from capa_probe.report import commands, words, write_report
from capa_probe.schema import MEASURES
from capa_probe.tables import LayerProfile
from tests import runs, synthetic
from tests.report_pages import Page, decoded, read
from tests.synthetic import World


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = runs.write(tmp_path_factory.mktemp("run") / "run", versions={"torch": "9.8.7"}, dtype="bfloat16")
    prof = LayerProfile.load(path)
    findings.write(prof, findings.find(prof, tau=synthetic.TAU, eta=0.97), path)
    return runs.add_examples(path, {"a": runs.picture(), "b": runs.picture(seed=1)})


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return read(write_report(run))


class TestContent:
    def test_summary(self, page: Page) -> None:
        assert "made-up" in page.text
        # Thresholds are those that the run's findings were made with.
        assert "attention sinks 3 layers 2 & 4; 1.2 % of visual tokens, counted in each layer" in page.text
        assert "roles of the sinks 33 % / 67 % Probability Dumps (1) / Structural Anchors (2)" in page.text
        assert "layers with a redundant FFN 2 of 5 layers 2-3; for visual tokens only: 3" in page.text
        assert "Layers 2 & 4 have attention sinks. In layer 2, where they get most, they are" in page.text
        assert "the highest, 2 in layer 2, is 4.2 % of the layer's visual tokens" in page.text
        assert "3 samples with 48 visual and" in page.text
        assert "(cosine above η = 0.97); in layer 3 not that of text tokens." in page.text
        assert "Only 3 samples were profiled" in page.text
        assert "pruned to 25 % of visual tokens not known give a run of confirm or depth as well" in page.text
        assert "few samples: 3" in page.text
        assert "too few sinks to tell dumps from anchors" in page.text

    def test_every_remark_is_there(self, run: Path, page: Page) -> None:
        found = findings.find(LayerProfile.load(run), tau=synthetic.TAU, eta=0.97)
        assert found.remarks
        for remark in found.remarks:
            assert " ".join(remark.split()) in page.text

    def test_strip_of_layers(self, page: Page) -> None:
        states = [
            a["class"] for tag, a in page.elements if tag == "span" and a.get("class", "").startswith("ffn ")
        ]
        assert states[:5] == ["ffn no", "ffn no", "ffn both", "ffn only", "ffn no"]
        titles = [title for title in page.attributes("title") if title.startswith("layer")]
        assert [title.split("; ")[-1] for title in titles] == [
            "0 sinks",
            "0 sinks",
            "2 sinks",
            "0 sinks",
            "1 sink",
        ]
        bars = [(a["class"], a["y"], a["height"]) for tag, a in page.elements if tag == "rect"]
        assert bars == [("dump", "22.0", "22.0"), ("anchor", "0.0", "22.0"), ("anchor", "22.0", "22.0")]

    def test_undetermined_sinks_are_in_the_legend_where_there_are_any(
        self, run: Path, tmp_path: Path
    ) -> None:
        found = findings.find(LayerProfile.load(run), tau=synthetic.TAU)
        assert found.by_layer is not None
        by_layer = found.by_layer.assign(n_undetermined=found.by_layer["n_dump"], n_dump=0)
        for given, expected in ((found, False), (replace(found, by_layer=by_layer), True)):
            page = read(write_report(run, tmp_path / "report.html", findings=given))
            assert (("i", {"class": "swatch undetermined"}) in page.elements) == expected

    def test_numbers_of_each_layer(self, run: Path, page: Page) -> None:
        table = findings.find(LayerProfile.load(run), tau=synthetic.TAU, eta=0.97).summary()
        for row in table.itertuples():
            cosines = f"{row.visual_cosine:.4f} {row.text_cosine:.4f} {row.redundant}"
            line = f"{row.layer} {cosines} {row.n_sinks} {row.n_dump} {row.n_anchor}"
            assert line in page.text

    def test_plots_with_captions(self, page: Page) -> None:
        for heading, caption in (
            ("FFN cosine", "Cosine between the residual stream that enters"),
            ("Attention sinks", "Sinks in per cent of"),
            ("Attention and contribution that sinks take", "What sinks have of"),
            ("Attention and contribution of visual tokens", "Share of the attention of"),
            ("Value norm", "L2 norm of a token's value vectors"),
        ):
            assert heading in page.text
            (start,) = [m.start() for m in re.finditer(caption, page.text)]
            assert "3 samples" in page.text[start : start + 700]
        assert page.chart("ffn_cosine")["shaded"] == [2, 3]
        assert page.chart("ffn_cosine")["marks"] == [[0, 0.97, "η = 0.97"]]

    def test_lines_of_the_plots_are_the_tables(self, run: Path, page: Page) -> None:
        prof = LayerProfile.load(run)
        found = findings.find(prof, tau=synthetic.TAU, eta=0.97)
        assert found.layers is not None
        assert found.by_layer is not None
        visual, text = page.chart("ffn_cosine")["lines"]
        np.testing.assert_allclose(visual["values"], found.layers["visual_cosine"])
        np.testing.assert_allclose(visual["low"], found.layers["visual_p05"])
        np.testing.assert_allclose(text["values"], found.layers["text_cosine"])
        sinks = {line["look"]: line["values"] for line in page.chart("sinks")["lines"]}
        for role in ("dump", "anchor"):
            share = 100 * found.by_layer[f"n_{role}"] / found.by_layer["n_visual"]
            np.testing.assert_allclose(sinks[role], share)
        tokens = prof.tokens
        for name in ("value_norm", "contribution"):
            for line in page.chart(name)["lines"]:
                own = tokens[tokens["kind"] == line["look"]]
                medians = own.groupby(["sample", "layer"])[name].median().groupby("layer").mean()
                np.testing.assert_allclose(line["values"], medians, rtol=1e-5)
        (attention, _) = page.chart("visual_share")["lines"]
        sums = tokens.groupby(["sample", "layer", "kind"])["attention"].sum().unstack()
        share = (100 * sums["visual"] / sums.sum(axis=1)).groupby("layer").mean()
        np.testing.assert_allclose(attention["values"], share, rtol=1e-4)

    def test_points_of_attention_against_contribution(self, run: Path, page: Page) -> None:
        tokens = LayerProfile.load(run).tokens
        layer = page.content["runs"][0]["points"]["layers"][2]
        assert {role: points["n"] for role, points in layer.items()} == {"": 46, "dump": 1, "anchor": 1}
        dump = tokens[(tokens["sample"] == "a") & (tokens["layer"] == 2) & (tokens["position"] == 3)]
        np.testing.assert_allclose(decoded(layer["dump"]["attention"]), dump["attention"], rtol=1e-5)
        np.testing.assert_allclose(decoded(layer["dump"]["contribution"]), dump["contribution"], rtol=1e-5)
        assert len(decoded(layer[""]["attention"])) == 46

    def test_examples(self, page: Page) -> None:
        first, second = page.examples
        assert first["question"] == "what is a?"
        assert (first["generated"], first["right"], first["answers"]) == (
            "crimson.",
            True,
            ["red", "Crimson"],
        )
        assert second["prompt"] == "USER: <image>\nwhat is b? ASSISTANT:"
        assert first["pictures"][0]["grid"] == [2, 8]
        # Sample a has a dump in layer 2, sample b an anchor in layers 2 and 4; tokens are counted from the first.
        assert first["sinks"] == [[2, 2, "dump"]]
        assert second["sinks"] == [[2, 4, "anchor"], [4, 4, "anchor"]]

    def test_numbers_of_the_examples(self, run: Path, page: Page) -> None:
        tokens = LayerProfile.load(run).tokens
        for example in page.examples:
            own = tokens[(tokens["sample"] == example["id"]) & (tokens["kind"] == "visual")]
            own = own.sort_values(["layer", "position"])
            assert example["positions"] == list(range(1, 17))
            assert set(example["values"]) == set(MEASURES) - {"removal_effect"}
            for name, text in example["values"].items():
                column = own[name].to_numpy(float)
                if name.endswith("cosine"):  # 1 - x, so that cosines near 1 keep their digits
                    column = 1 - column
                np.testing.assert_allclose(decoded(text), column, rtol=8e-6)

    def test_settings_versions_and_commands(self, run: Path, page: Page) -> None:
        for pair in (
            "torch 9.8.7",
            "dtype bfloat16",
            "decoder layers 5",
            "width (d_model) 1,024",
            "τ, on sink strength 10",
            "η, on the FFN cosine 0.97",
        ):
            assert pair in page.text
        assert f"capa-probe report {run}" in page.text
        assert "with the options that they were read with, if any: --prompt, --split, --config" in page.text
        assert (
            f"capa-probe profile made-up DATA --out {run} --dtype bfloat16 --tau 10.0 --eta 0.97" in page.text
        )


@pytest.mark.parametrize(
    "asked", [{"split": "otsu"}, {"split": "quantile", "quantile": 0.9}, {"split": "non-sink-median"}]
)
def test_agrees_with_the_findings_beside_it(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.synthetic.D_MODEL", 400)  # too narrow for the paper's 20
    world = replace(runs.WORLD, sinks=tuple(replace(sink, phi=15.0) for sink in runs.SINKS))
    path = runs.write(tmp_path / "run", runs.tokens(world), world)
    prof = LayerProfile.load(path)
    found = findings.find(prof, **asked)
    findings.write(prof, found, path)
    page = read(write_report(path))
    assert found.totals is not None
    counts = found.totals.set_index("role")["n_sinks"]
    assert f"Probability Dumps ({counts['dump']}) / Structural Anchors ({counts['anchor']})" in page.text
    facts = json.loads((path / "findings.json").read_text(encoding="utf-8"))
    assert any("the paper's 20 needs a wider residual stream" in remark for remark in facts["remarks"])
    for remark in facts["remarks"]:
        assert " ".join(remark.split()) in page.text
    assert "--tau" not in page.text


class TestOneFile:
    def test_refers_to_nothing_outside(self, run: Path, page: Page) -> None:
        text = (run / "report.html").read_text()
        for reference in page.attributes("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
            assert reference.startswith("#")
        assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "embed", "base", "form"}
        assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
        assert not page.attributes("style")
        namespace = "http://www.w3.org/2000/svg"
        assert text.count(namespace) == 1
        bare = re.sub(r'base64,[\w+/=]+|"[\w+/=]{80,}"', "", text.replace(namespace, ""))
        assert re.findall(r"url\((?!#)|@import|https?://|//[a-z]+\.[a-z]", bare) == []

    def test_every_reference_in_it_leads_somewhere_once(self, page: Page) -> None:
        ids = page.attributes("id")
        assert len(ids) == len(set(ids))
        inside = [name[1:] for name in page.attributes("href") if name.startswith("#")]
        assert inside
        assert set(inside) <= set(ids)
        used = set(re.findall(r'getElementById\("([^"]+)"\)|\btext\("([\w-]+)"', page.scripts[1]))
        assert {first or second for first, second in used} <= set(ids)

    def test_forbids_other_scripts_and_the_network(self, page: Page) -> None:
        (policy,) = [
            a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
        ]
        script, style = (
            base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            for text in (page.scripts[1], page.styles[0])
        )
        assert policy == (
            f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        )
        assert (len(page.scripts), len(page.styles)) == (2, 1)

    def test_all_words_are_escaped(self, tmp_path: Path) -> None:
        evil = '</title></style></script><script>alert("1")</script><img src=x onerror=alert(1)>{{ 7 * 7 }}'
        path = runs.write(
            tmp_path / "run",
            model=evil,
            versions={evil: evil},
            skipped=[{"sample": evil, "reason": evil}],
            settings={"steps": 0, evil: [evil]},
        )
        runs.add_examples(
            path, {"a": runs.picture()}, question=evil, prompt=evil, generated=evil, answers=[evil], task=evil
        )
        file = write_report(path)
        page = read(file)
        tags = [tag for tag, _ in page.elements]
        assert tags.count("script") == 2
        assert "img" not in tags
        assert "<script>alert" not in file.read_text()
        assert page.text.count('<script>alert("1")</script>') >= 9
        assert "49" not in [word.strip("}") for word in page.text.split()]
        for name in ("question", "prompt", "generated", "task"):
            assert page.examples[0][name] == evil

    def test_odd_characters(self, tmp_path: Path) -> None:
        path = runs.write(tmp_path / "run")
        runs.add_examples(path, {"a": runs.picture()}, question="naïve 色 \ud800 \u2028 end")
        assert read(write_report(path)).examples[0]["question"] == "naïve 色 \ud800 \u2028 end"

    def test_same_run_same_bytes(self, run: Path, tmp_path: Path) -> None:
        first, second = (write_report(run, tmp_path / name) for name in "ab")
        assert first.read_bytes() == second.read_bytes()

    def test_stays_small_with_photographs_and_many_layers(self, tmp_path: Path) -> None:
        """Four noisy photographs of 512 x 512 with 24 x 24 tokens, 32 layers: the default on a 7B model."""
        world = World(samples=tuple("abcd"), n_layers=32, side=24, n_text=3, sinks=runs.SINKS)
        path = runs.write(tmp_path / "run", synthetic.tokens(world), world)
        noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        photo = Image.fromarray(noise).resize((512, 512))
        runs.add_examples(path, dict.fromkeys("abcd", photo), grid=(24, 24))
        file = write_report(path)
        assert len(read(file).examples) == 4
        assert [example["missing"] for example in read(file).examples] == [[]] * 4
        assert file.stat().st_size < 8_000_000

    def test_stays_small_with_many_images_per_sample(self, tmp_path: Path) -> None:
        """Twelve photographs in each of the four examples that are shown by default."""
        world = World(samples=tuple("abcd"), side=24, n_text=3, sinks=runs.SINKS)
        one = synthetic.tokens(world)
        visual = one[one["kind"] == "visual"]
        more = [visual.assign(image=i, position=visual["position"] + 1000 * i) for i in range(1, 12)]
        path = runs.write(tmp_path / "run", pd.concat([one, *more]), world)
        noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        photo = Image.fromarray(noise).resize((512, 512))
        runs.add_examples(
            path,
            dict.fromkeys("abcd", photo),
            images=[{"file": "0-0.png", "grid": [24, 24], "tile_grid": [1, 1]}] * 12,
        )
        file = write_report(path)
        examples = read(file).examples
        assert file.stat().st_size < 9_000_000
        said = " ".join(why for example in examples for why in example["missing"])
        left_out = [
            int(n) for n in re.findall(r"(\d+) more images? of this sample (?:is|are) left out", said)
        ]
        shown = sum(len(example["pictures"]) for example in examples)
        assert len(left_out) == 4
        assert shown >= 8
        assert shown + sum(left_out) == 4 * 12
        # What is always kept, and what goes first.
        assert {"attention", "contribution", "value_norm"} <= set(examples[0]["values"])
        assert "left out: Attention from text, Attention cosine, Residual stream" in said

    def test_examples_that_there_is_no_room_for(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("capa_probe.report.build.EXAMPLES_ROOM", 1000)
        page = read(write_report(run, tmp_path / "small.html"))
        assert [example["id"] for example in page.examples] == ["a"]
        assert "1 more example is left out, to keep the report small." in page.text
        # 16 tokens in 5 layers, four characters each: two quantities have three quarters of it.
        assert list(page.examples[0]["values"]) == ["attention", "contribution"]
        assert "these are left out: Value norm, FFN cosine, Sink strength" in page.examples[0]["missing"][0]


class TestMissingParts:
    def test_no_sinks(self, tmp_path: Path) -> None:
        path = runs.write(tmp_path / "run", synthetic.tokens(World()), World())
        text = read(write_report(path)).text
        assert "attention sinks 0 in no layer" in text
        assert "No visual token is an attention sink" in text
        assert "no sinks in any layer" in text
        assert "No sinks at tau = 20; the largest sink strength" in text
        assert "Massive dimensions" not in text

    def test_no_token_rows(self, tmp_path: Path) -> None:
        path = runs.add_examples(runs.write(tmp_path / "run", rows="none"), {"a": runs.picture()})
        page = read(write_report(path))
        assert 'Sinks were not looked for: rows="none" kept no token rows.' in page.text
        (example,) = page.examples
        assert example["missing"] == ['Nothing is drawn over the images: rows="none" kept no token rows.']
        assert [picture["grid"] for picture in example["pictures"]] == [[0, 0]]
        assert "layers with a redundant FFN 2 of 5" in page.text

    def test_no_examples(self, tmp_path: Path) -> None:
        assert "This run keeps no examples" in read(write_report(runs.write(tmp_path / "run"))).text

    @pytest.mark.parametrize(
        ("probes", "said", "plots"),
        [
            (
                ["ffn_cosine"],
                "Sinks were not looked for: the profile lacks the probe attention and",
                {"ffn_cosine"},
            ),
            (
                ["attention", "contribution", "sink_strength"],
                "Redundant layers were not looked for",
                {"sinks", "sink_shares", "visual_share", "contribution", "sink_strength"},
            ),
            (
                ["residual"],
                "Redundant layers were not looked for",
                {"attn_update_norm", "ffn_update_norm", "attn_cosine"},
            ),
        ],
    )
    def test_probes_that_were_not_run(
        self, probes: list[str], said: str, plots: set[str], tmp_path: Path
    ) -> None:
        table = runs.tokens()
        measured = {
            "attention": ["attention", "attention_text"],
            "contribution": ["contribution"],
            "sink_strength": [name for name in table if name.startswith("sink_strength")],
            "ffn_cosine": ["ffn_cosine"],
            "value_norm": ["value_norm"],
            "residual": [
                "resid_pre_norm",
                "resid_mid_norm",
                "attn_update_norm",
                "ffn_update_norm",
                "attn_cosine",
            ],
        }
        for probe, columns in measured.items():
            if probe not in probes:
                table[columns] = np.nan
        path = runs.write(tmp_path / "run", table, settings={"steps": 0, "probes": probes})
        runs.add_examples(path, {"a": runs.picture()})
        page = read(write_report(path))
        assert said in page.text
        charts = page.content["charts"]
        assert {chart["name"] for chart in charts if chart["lines"]} == plots
        for chart in charts:
            assert bool(chart["missing"]) == (chart["name"] not in plots)
        (example,) = page.examples
        assert ("attention" in example["values"]) == ("attention" in probes)

    def test_threshold_that_the_width_has_no_room_for(self, tmp_path: Path) -> None:
        table = runs.tokens()
        table[[name for name in table if name.startswith("sink_dim")]] %= 64
        page = read(write_report(runs.write(tmp_path / "run", table, d_model=64)))
        assert "layers with a redundant FFN 2 of 5" in page.text
        assert "256" in page.text

    def test_an_example_of_another_run(self, tmp_path: Path) -> None:
        path = runs.write(tmp_path / "run")
        runs.add_examples(path, {"a": runs.picture(), "zzz": runs.picture()}, grid=(4, 4))
        first, second = (example["missing"] for example in read(write_report(path)).examples)
        assert first == ["The image that is kept and the visual tokens of this sample do not match."]
        assert second == ["It is not known where in the image its visual tokens lie."]

    def test_images_without_a_grid_are_shown_as_they_are(self, tmp_path: Path) -> None:
        images = [{"file": "0-0.png", "grid": None, "tile_grid": None}]
        path = runs.write(tmp_path / "run")
        (example,) = read(
            write_report(runs.add_examples(path, {"a": runs.picture()}, images=images))
        ).examples
        assert [picture["cells"] for picture in example["pictures"]] == [[]]
        assert example["missing"] == ["It is not known where in the image its visual tokens lie."]

    def test_dimensions_that_there_is_no_room_for(self, tmp_path: Path) -> None:
        """14 massive dimensions, and two published ones that are none."""
        found = [synthetic.Planted("a", 2, 2 + i, 20 + i, high=bool(i % 2)) for i in range(14)]
        world = World(sinks=tuple(found), cosines=runs.COSINES)
        path = runs.write(tmp_path / "run", runs.tokens(world), world, published_sink_dims=[90, 91])
        prof = LayerProfile.load(path)
        findings.write(prof, findings.find(prof, tau=synthetic.TAU), path)
        text = read(write_report(path)).text
        assert "2 more exceed τ less often. 2 more are published, and found in no layer here." in text

    def test_damaged_examples(self, tmp_path: Path) -> None:
        path = runs.add_examples(runs.write(tmp_path / "run"), {"a": runs.picture()})
        (path / "examples" / "0-0.png").unlink()
        (example,) = read(write_report(path)).examples
        assert example["missing"] == ["The image 0-0.png of the example is missing or cannot be read."]
        (path / "examples" / "examples.jsonl").write_text("{")
        assert "examples.jsonl cannot be read" in read(write_report(path)).text

    def test_left_out_samples(self, tmp_path: Path) -> None:
        skipped = [{"sample": f"s{i}", "reason": f"image {i}.png cannot be read."} for i in range(25)]
        text = read(write_report(runs.write(tmp_path / "run", skipped=skipped))).text
        assert "left out" in text
        assert "s19 image 19.png cannot be read." in text
        assert "5 more listed in manifest.json" in text

    def test_a_single_sample(self, tmp_path: Path) -> None:
        world = World(samples=("a",), cosines=runs.COSINES)
        text = read(write_report(runs.write(tmp_path / "run", synthetic.tokens(world), world))).text
        assert "A single sample was profiled" in text

    def test_fewer_examples(self, run: Path, tmp_path: Path) -> None:
        assert len(read(write_report(run, tmp_path / "a.html", n_examples=1)).examples) == 1
        assert "None were asked for." in read(write_report(run, tmp_path / "b.html", n_examples=0)).text


class TestErrors:
    @pytest.mark.parametrize("n", [-1, 1.5, True, "2"])
    def test_number_of_examples(self, n: object, run: Path) -> None:
        with pytest.raises(CapaProbeError, match="n_examples=.* whole number"):
            write_report(run, n_examples=n)  # type: ignore[arg-type]

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(CapaProbeError, match="does not exist"):
            write_report(tmp_path / "nowhere")
        with pytest.raises(CapaProbeError, match="holds no profile"):
            write_report(tmp_path)
        path = runs.write(tmp_path / "run")
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
        with pytest.raises(CapaProbeError, match="newer"):
            write_report(path)
        assert not (path / "report.html").exists()

    def test_output_is_a_folder(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(CapaProbeError, match="is a folder; give the file"):
            write_report(run, tmp_path)

    def test_what_was_there_stays_if_the_disk_is_full(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = write_report(run, tmp_path / "new" / "report.html")
        before = file.read_bytes()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            write_report(run, file)
        assert file.read_bytes() == before
        assert [path.name for path in file.parent.iterdir()] == ["report.html"]


class TestCommandLine:
    def test_writes_and_says_where(self, run: Path, tmp_path: Path) -> None:
        file = tmp_path / "a.html"
        done = CliRunner().invoke(app, ["report", str(run), "--out", str(file), "--examples", "1"])
        assert (done.exit_code, done.stdout.strip()) == (0, str(file))
        assert len(read(file).examples) == 1

    def test_bad_input_is_one_line_with_status_2(self, tmp_path: Path) -> None:
        for arguments in ([str(tmp_path)], [str(tmp_path), "--examples", "-1"], []):
            done = CliRunner().invoke(app, ["report", *arguments])
            assert done.exit_code == 2
            assert len(done.stderr.strip().splitlines()) == 1
            assert done.stderr.startswith("error: ")

    def test_help_has_an_example(self) -> None:
        assert "capa-probe report runs/demo" in CliRunner().invoke(app, ["report", "--help"]).stdout


class TestWords:
    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (0, "0"),
            (0.02061, "0.0206"),
            (12.345, "12.3"),
            (1234.5, "1,234"),
            (3.2e-7, "3.2e-07"),
            (float("nan"), "–"),
        ],
    )
    def test_numbers(self, value: float, shown: str) -> None:
        assert words.number(value) == shown

    @pytest.mark.parametrize(
        ("share", "shown"),
        [
            (0, "0 %"),
            (0.00123, "0.12 %"),
            (0.0456, "4.6 %"),
            (0.44, "44 %"),
            (1, "100 %"),
            (0.994, "99 %"),
            (0.997, ">99 %"),
            (1 - 1e-9, ">99 %"),
            (0.0001, "0.01 %"),
            (1e-7, "<0.01 %"),
            (float("nan"), "–"),
        ],
    )
    def test_shares(self, share: float, shown: str) -> None:
        assert words.percent(share) == shown

    def test_a_folder_is_named_by_its_last_part(self) -> None:
        assert words.model_name({"model": "/somewhere/models/mine"}) == "mine"
        assert words.model_name({"model": "llava-hf/llava-1.5-7b-hf"}) == "llava-hf/llava-1.5-7b-hf"

    def test_commands_are_quoted_and_leave_defaults_out(self) -> None:
        manifest = {
            "model": "my model",
            "settings": {"limit": 5, "steps": 2, "rows": "visual", "batch_size": 1},
        }
        first = commands.profile(Path("a run"), manifest, "auto", 0.96)
        assert first == "capa-probe profile 'my model' DATA --out 'a run' --limit 5 --steps 2"
        assert commands.report([Path("a run"), Path("b")]) == "capa-probe report 'a run' b"

    def test_commands_say_what_the_run_was_made_with(self) -> None:
        default = [probe.name for probe in choose_probes("default")]
        every = [probe.name for probe in choose_probes("all")]
        for probes, said in (
            (default, ""),
            (every, " --probes all"),
            (["attention", "residual"], " --probes attention,residual"),
        ):
            manifest = {"model": "m", "dtype": "float16", "settings": {"probes": probes}}
            first = commands.profile(Path("run"), manifest, "relative", 0.9)
            assert (
                first == f"capa-probe profile m DATA --out run --dtype float16{said} --tau relative --eta 0.9"
            )

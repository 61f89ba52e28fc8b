"""What the findings hold, write and say, on made-up profiles with and without sinks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from capa_probe.analysis import (
    classify_sinks,
    measure_sink_dims,
    model_sink_dims,
    paper_agreement,
    redundant_layers,
    role_stability,
    sink_bimodality,
    sink_summary,
    sink_totals,
)
from capa_probe.errors import CapaProbeError
from capa_probe.findings import FIGURES, FILES, Findings, find, read_settings, remove, write
from capa_probe.findings.files import TABLES
from capa_probe.report.words import verdict
from tests.synthetic import TAU, Planted, World, profile, profile_of, tokens

SAMPLES = tuple("abcd")
#: Three tokens that are sinks in every layer from 2 on, two of them anchors, and one of a single sample.
SINKS = (
    *(Planted(s, la, p, dim=7, high=p < 3) for s in SAMPLES for la in (2, 3, 4) for p in (1, 2, 3)),
    Planted("a", 4, 9, dim=8),
)
COSINES = {0: (0.5, 0.5), 1: (0.99, 0.9), 2: (0.5, 0.5), 3: (0.98, 0.5), 4: (0.5, 0.9)}
WORLD = World(samples=SAMPLES, sinks=SINKS, cosines=COSINES)


def said(found: Findings, words: str) -> list[str]:
    return [remark for remark in found.remarks if words in remark]


class TestTables:
    def test_are_those_of_the_analyses(self) -> None:
        prof, groups = profile(WORLD, published_sink_dims=[7]), {"a": 1, "b": 1}
        found = find(prof, tau=TAU, eta=0.96, groups=groups)
        sinks, dims = classify_sinks(prof, tau=TAU), measure_sink_dims(prof, TAU)
        for table, wanted in (
            (found.sinks, sinks),
            (found.by_layer, sink_summary(sinks)),
            (found.totals, sink_totals(sinks)),
            (found.bimodality, sink_bimodality(sinks, groups)),
            (found.stability, role_stability(sinks, groups)),
            (found.dims, dims),
            (found.model_dims, model_sink_dims(dims)),
            (found.layers, redundant_layers(prof, 0.96)),
        ):
            assert table is not None
            pd.testing.assert_frame_equal(table, wanted)
        assert found.agreement is None

    def test_the_split_is_passed_on(self) -> None:
        found = find(profile(WORLD), tau=TAU, split="quantile", quantile=0.9)
        assert found.sinks is not None
        assert (found.sinks.attrs["split"], found.sinks.attrs["quantile"]) == ("quantile", 0.9)
        with pytest.raises(CapaProbeError, match="split='half' was given; available"):
            find(profile(WORLD), tau=TAU, split="half")
        with pytest.raises(CapaProbeError, match="give a mapping of sample ids"):
            find(profile(WORLD), tau=TAU, groups=["a"])  # type: ignore[arg-type]

    def test_without_token_rows_only_the_layers_are_known(self) -> None:
        found = find(profile(WORLD, rows="none"), tau=TAU)
        assert found.layers is not None
        assert [getattr(found, name) for name in TABLES if name != "layers"] == [None] * (len(TABLES) - 1)
        assert said(found, 'rows="none" kept no token rows')

    def test_dimensions_are_known_where_sinks_cannot_be_classified(self) -> None:
        table = tokens(WORLD)
        at = (table["layer"] == 2) & (table["position"] == 1)
        table.loc[at, "contribution"] = np.nan
        found = find(profile_of(table, WORLD), tau=TAU)
        assert found.sinks is None
        assert found.dims is not None
        assert len(found.dims) == 4
        assert said(found, "Sinks could not be classified: contribution is missing")

    def test_a_threshold_out_of_reach_is_no_absence_of_sinks(self) -> None:
        message = (
            r"tau=40 can never be reached by a model of width 1024.*sqrt\(1024\) = 32; use tau=\"relative\""
        )
        with pytest.raises(CapaProbeError, match=message):
            find(profile(WORLD), tau=40.0)


class TestRemarks:
    def test_on_dimensions(self) -> None:
        found = find(profile(WORLD, published_sink_dims=[7, 700, 900]), tau=TAU)
        assert said(found, "published") == [
            "Of the sink dimensions published for a model of these sizes (7, 700, 900), 700, 900 exceed tau nowhere."
        ]
        (sentence,) = said(found, "few samples")
        assert sentence == (
            "Sink dimension 8 hangs on few samples: fewer than 95% of bootstrap resamples find it again in any one "
            "layer."
        )
        assert not said(find(profile(WORLD, published_sink_dims=[7]), tau=TAU), "published")

    def test_on_modes(self) -> None:
        clear = tuple(Planted(s, 2, p, dim=7, high=p < 4) for s in SAMPLES for p in range(1, 7))
        world = replace(WORLD, sinks=clear, side=8)
        found = find(profile(world), tau=TAU)
        assert found.sinks is not None
        assert len(found.sinks) == 24
        assert not said(found, "log C")  # two modes, and nothing to warn of
        table = tokens(world)
        table["contribution"] = np.random.default_rng(0).lognormal(size=len(table))
        found = find(profile_of(table, world), tau=TAU)
        assert found.bimodality is not None
        shape = found.bimodality["verdict"].iloc[-1]
        assert shape in ("unclear", "unimodal")
        (sentence,) = said(found, "not clearly bimodal")
        assert f"({shape}: {found.bimodality['n_tokens'].iloc[-1]} tokens, dip test p = " in sentence
        few = World(sinks=SINKS[:3])
        assert said(
            find(profile(few), tau=TAU),
            "Too few different tokens are sinks (3) to tell whether log C has two modes",
        )

    def test_on_stability(self) -> None:
        found = find(profile(WORLD), tau=TAU, groups=dict.fromkeys(SAMPLES, "one image"))
        assert said(found, "keep their role") == [
            "From one layer to the next, 100% of 24 pairs of sinks keep their role (56% by chance).",
            "From one question about an image to another, 100% of 54 pairs of sinks keep their role (56% by chance).",
        ]
        assert len(said(find(profile(WORLD), tau=TAU), "keep their role")) == 1

    def test_on_layers_whose_tokens_differ(self) -> None:
        table = tokens(WORLD)
        at = (table["layer"] == 3) & (table["kind"] == "visual")
        table.loc[at, "ffn_cosine"] = np.where(table["position"][at] <= 4, 0.9, 0.999)
        found = find(profile_of(table, WORLD), tau=TAU)
        (sentence,) = said(found, "on average")
        assert sentence == (
            "Redundant on average only: in layer 3, more than a tenth of the visual tokens are not above eta "
            "themselves (share above it: 75% in layer 3)."
        )
        assert not said(find(profile(WORLD), tau=TAU), "on average")
        assert not said(find(profile(WORLD, rows="none"), tau=TAU), "on average")

    def test_without_text_tokens_nothing_is_said_of_text(self) -> None:
        table = tokens(WORLD)
        found = find(profile_of(table[table["kind"] == "visual"], WORLD), tau=TAU)
        assert said(found, "text") == [
            "Whether layers are redundant for visual tokens only is not known: there are no text tokens."
        ]
        assert verdict(found)[1].endswith("; of text tokens nothing is known.")

    def test_intervals_need_two_samples_with_visual_tokens(self) -> None:
        table = tokens(WORLD)
        found = find(profile_of(table[(table["kind"] == "text") | (table["sample"] == "a")], WORLD), tau=TAU)
        assert said(found, "no intervals") == ["A single sample with visual tokens gives no intervals."]
        assert not said(find(profile(WORLD), tau=TAU), "no intervals")

    def test_on_the_paper(self) -> None:
        sizes: dict[str, Any] = {"family": "internvl", "n_layers": 28, "d_model": 3584}
        world = World(
            ("a", "b"), 28, 2, cosines={at: (0.99 if at in (2, 15) else 0.5, 0.5) for at in range(28)}
        )
        prof = profile(world, **sizes)
        found = find(prof)
        assert found.tau == 20
        assert found.layers is not None
        assert found.agreement == paper_agreement(found.layers, sizes)
        assert found.agreement is not None
        assert found.agreement.both == (2, 15)
        assert found.remarks[-1] == str(found.agreement)


class TestFiles:
    def read(self, folder: Path) -> dict[str, Any]:
        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is no JSON")

        text = (folder / "findings.json").read_text(encoding="utf-8")
        return dict(json.loads(text, parse_constant=refuse))

    def test_hold_the_tables(self, tmp_path: Path) -> None:
        prof = profile(WORLD, published_sink_dims=[7, 900])
        found = find(prof, tau=TAU)
        written = write(prof, found, tmp_path)
        assert [path.relative_to(tmp_path).as_posix() for path in written] == list(FILES[:8]) + [
            name for name in FILES[8:] if name.startswith(FIGURES)
        ]
        for name, file in TABLES.items():
            table = getattr(found, name)
            if file.endswith(".csv"):
                strings = {each: str for each in table if table[each].dtype.kind in "OU"}
                again = pd.read_csv(tmp_path / file, dtype=strings, keep_default_na=True)
                again = again.fillna(dict.fromkeys(strings, ""))
                pd.testing.assert_frame_equal(again, table, check_dtype=False)
        facts = self.read(tmp_path)
        assert [row["dim"] for row in facts["model_sink_dims"]] == [7, 8, 900]
        assert facts["model_sink_dims"][2]["largest"] is None
        assert facts["settings"]["split"] == "non-sink-median"
        assert facts["agreement"] is None

    def test_of_a_profile_without_sinks(self, tmp_path: Path) -> None:
        """Tables with their columns and no rows, or rows that say so; one remark."""
        prof = profile(World(samples=SAMPLES, cosines=COSINES))
        found = find(prof, tau=TAU)
        assert len(write(prof, found, tmp_path)) == len(FILES)
        some = find(profile(WORLD), tau=TAU)
        for name in TABLES:
            empty, full = getattr(found, name), getattr(some, name)
            assert list(empty) == list(full)
            assert empty.dtypes.equals(full.dtypes), name
        assert [remark[:20] for remark in found.remarks] == ["No sinks at tau = 10"]
        assert pd.read_csv(tmp_path / "sink_dims.csv").columns.tolist() == list(found.dims)  # type: ignore[arg-type]
        assert self.read(tmp_path)["model_sink_dims"] == []

    def test_of_a_profile_with_an_offset_only(self) -> None:
        """What passes tau and is no sink is said to be left out."""
        large = tuple(Planted(sample, 3, position, dim=8) for sample in SAMPLES for position in range(4, 10))
        found = find(profile(World(SAMPLES, sinks=large, cosines=COSINES)), tau=TAU)
        (remark,) = (each for each in found.remarks if each.startswith("No sinks"))
        assert "of a visual token, offset dimensions left out, is" in remark

    @pytest.mark.parametrize(
        "asked",
        [
            {},
            {"tau": "auto", "eta": 0.9},
            {"tau": "relative", "split": "otsu"},
            {"tau": TAU, "split": "quantile", "quantile": 0.9},
            {"tau": TAU, "groups": {"a": ("one", "image"), "b": ("one", "image"), "c": None}},
        ],
    )
    def test_say_how_to_find_them_again(
        self, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tests.synthetic.D_MODEL", 400)  # too narrow for the paper's 20
        world = replace(WORLD, sinks=tuple(replace(sink, phi=15.0) for sink in SINKS))
        prof = profile(world)
        found = find(prof, **asked)
        write(prof, found, tmp_path)
        settings = read_settings(tmp_path)
        assert settings["tau"] == asked.get("tau", "auto")
        again = find(prof, **settings)
        assert (again.remarks, again.tau, again.eta) == (found.remarks, found.tau, found.eta)
        for name in TABLES:
            pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name))

    def test_agreement_is_written(self, tmp_path: Path) -> None:
        world = World(("a", "b"), 28, 2, cosines=dict.fromkeys(range(28), (0.5, 0.5)))
        prof = profile(world, family="internvl", d_model=3584, published_sink_dims=[3])
        write(prof, find(prof), tmp_path)
        facts = self.read(tmp_path)
        assert facts["agreement"]["model"] == "InternVL3-8B"
        assert facts["agreement"]["jaccard"] == 0

    def test_are_all_removed_and_nothing_else(self, tmp_path: Path) -> None:
        prof = profile(WORLD)
        (tmp_path / "notes.csv").touch()
        write(prof, find(prof, tau=TAU), tmp_path)
        assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == {
            *FILES,
            "notes.csv",
        }
        remove(tmp_path)
        assert [path.name for path in tmp_path.rglob("*")] == ["notes.csv"]

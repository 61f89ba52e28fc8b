"""How things show themselves in notebooks: the right facts, the right tokens, and nothing from data as markup."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import capa_probe as cp
from capa_probe.display import short_path
from capa_probe.lvlm.inputs import LVLMInputs
from capa_probe.pruning import FastV, Pruner
from capa_probe.pruning.ffn import SkipFFN
from capa_probe.pruning.trace import Trace
from tests import processors, tiny

MARKUP = "<script>alert('x')</script>"
SIZES = {"llava": (16, 16), "qwen2_5_vl": (16, 32), "internvl": (16, 48)}
VOID = {"img", "br", "meta"}


class Reader(HTMLParser):
    """Elements, texts and attributes; every element must be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def read(shown: Any) -> Reader:
    """What a notebook would show; it must be harmless and need nothing from elsewhere."""
    found = Reader(shown._repr_html_())
    assert not found.all("script")
    for _, attrs in found.elements:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("href", "src"):
            assert (attrs.get(name) or "data:image/").startswith("data:image/")
    return found


def picture(attrs: dict[str, str | None]) -> Image.Image:
    content = (attrs["href"] or "").partition("base64,")[2]
    return Image.open(io.BytesIO(base64.b64decode(content)))


def lines(html: Reader, axis: str) -> int:
    """Different lines of a kind ("V" across, "H" down) that the grids draw."""
    found = {move for path in html.all("path") for move in re.findall(rf"M[^M]+{axis}[^M]+", path["d"] or "")}
    return len(found)


def tables(html: str) -> list[pd.DataFrame]:
    """Tables with a head, numbers as numbers where a whole column is."""
    found = []
    for part in re.findall(r"<table.*?</table>", html):
        heads = [unescape(cell) for cell in re.findall(r"<th [^>]*>(.*?)</th>", part)]
        rows = [
            [unescape(cell) for cell in re.findall(r"<td [^>]*>(.*?)</td>", row)]
            for row in part.partition("<tbody>")[2].split("</tr>")[:-1]
        ]
        if heads:
            frame = pd.DataFrame(rows, columns=heads)
            found.append(frame.apply(_numbers))
    return found


def _numbers(cells: pd.Series[Any]) -> pd.Series[Any]:
    numbers = pd.to_numeric(cells, errors="coerce")
    return cells if numbers.isna().any() else numbers


def prepared(family: str, question: str = "what?") -> tuple[cp.HookedLVLM, LVLMInputs, Image.Image]:
    lvlm = cp.HookedLVLM(tiny.shared(family), processors.shared(family))
    image = processors.image(*SIZES[family])
    return lvlm, lvlm.prepare(image, question), image


class TestModel:
    def test_says_what_it_is(self) -> None:
        said = read(cp.HookedLVLM(tiny.shared("qwen2_5_vl"))).text
        n = sum(weight.numel() for weight in tiny.shared("qwen2_5_vl").parameters())
        for fact in (
            f"{n:,}, float32, on cpu",
            "4 layers, d_model 32, 4 heads over 2 KV heads",
            "sdpa",
            "none: only",
        ):
            assert fact in said

    @pytest.mark.parametrize(
        ("name", "shown"),
        [
            ("/home/me/models/llava", ".../models/llava"),
            ("/llava", "/llava"),
            ("models/of/mine/llava", "models/of/mine/llava"),
            ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
            ("", ""),
        ],
    )
    def test_a_card_does_not_tell_where_a_folder_lies_on_a_machine(self, name: str, shown: str) -> None:
        assert short_path(name) == shown

    def test_a_name_is_no_markup(self) -> None:
        lvlm = cp.HookedLVLM(tiny.build("llava"))
        lvlm.model.config.name_or_path = MARKUP
        assert MARKUP in read(lvlm).text


class TestSpans:
    @pytest.mark.parametrize(("family", "grid"), [("llava", (4, 4)), ("qwen2_5_vl", (2, 4))])
    def test_the_grid_lies_over_what_the_tokens_cover(self, family: str, grid: tuple[int, int]) -> None:
        lvlm, inputs, image = prepared(family)
        spans = lvlm.spans(inputs)
        shown = read(spans)
        assert (lines(shown, "H"), lines(shown, "V")) == (grid[0] + 1, grid[1] + 1)
        (drawn,) = shown.all("image")
        assert np.array_equal(np.asarray(picture(drawn)), np.asarray(lvlm.family.seen(lvlm.processor, image)))
        assert f"{grid[0] * grid[1]} visual tokens, grid {grid[0]} x {grid[1]}" in shown.text
        assert repr(spans) in shown.text

    def test_tiles_and_thumbnail(self) -> None:
        lvlm, inputs, _ = prepared("internvl")
        shown = read(lvlm.spans(inputs))
        assert "1 x 3 tiles of 2 x 2" in shown.text
        assert "thumbnail" in shown.text
        assert len(shown.all("image")) == 2
        tiles, thumbnail = lvlm.spans(inputs).show().markup.split("</figure>")[:2]
        # Grids of 2 x 6 and of 2 x 2 tokens.
        assert (
            lines(Reader(tiles + "</figure></div></div>"), "V"),
            len(re.findall(r"V16", thumbnail)) // 2,
        ) == (7, 3)

    def test_dropped_tokens_are_covered_and_no_others(self) -> None:
        lvlm, inputs, _ = prepared("llava")
        spans = lvlm.spans(inputs)
        kept = spans.visual.clone()
        gone = spans.images[0].positions[[1, 6, 15]]  # row 0, col 1; row 1, col 2; row 3, col 3
        kept[0, gone] = False
        shown = Reader(spans.show(kept).markup)
        veils = [rect for rect in shown.all("rect") if rect.get("fill-opacity")]
        assert [(float(r["x"] or 0), float(r["y"] or 0)) for r in veils] == [(4, 0), (8, 4), (12, 12)]
        assert {(r["width"], r["height"]) for r in veils} == {("4.00", "4.00")}
        assert "13 kept" in shown.text
        assert not [rect for rect in read(spans).all("rect") if rect.get("fill-opacity")]

    def test_dropped_tokens_of_tiles_and_of_the_thumbnail(self) -> None:
        lvlm, inputs, _ = prepared("internvl")
        (span,) = (spans := lvlm.spans(inputs)).images
        kept = spans.visual.clone()
        kept[0, span.positions[[4 + 1, 12 + 2]]] = False  # tile 1: row 0, col 1; thumbnail: row 1, col 0
        figures = spans.show(kept).markup.split("</figure>")
        places = [
            re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"[^>]*fill-opacity', figure) for figure in figures[:2]
        ]
        width, height = lvlm.family.seen(lvlm.processor, processors.image(*SIZES["internvl"])).size
        assert places == [[(f"{3 * width / 6:.2f}", "0.00")], [("0.00", f"{height / 2:.2f}")]]

    def test_the_strip_has_every_position_once(self) -> None:
        inputs = tiny.inputs("llava", (1, 2, 0))
        spans = cp.HookedLVLM(tiny.shared("llava")).spans(inputs)
        strips = spans._repr_html_().split("<svg")[1:]
        assert len(strips) == 3
        for row, strip in enumerate(strips):
            seen = torch.zeros(spans.visual.shape[1], dtype=torch.long)
            for start, width, kind in re.findall(r'<rect x="(\d+)" width="(\d+)".*?<title>(\w+)', strip):
                part = slice(int(start), int(start) + int(width))
                assert getattr(spans, kind)[row, part].all()
                seen[part] += 1
            assert (seen == 1).all()

    def test_tensors_prepared_elsewhere_show_no_picture(self) -> None:
        lvlm, inputs, _ = prepared("llava")
        assert lvlm.spans(inputs).pictures is not None
        spans = lvlm.spans(dict(inputs))
        assert spans.pictures is None
        assert not read(spans).all("image")

    def test_pictures_of_another_prompt_are_not_shown(self) -> None:
        lvlm, inputs, _ = prepared("llava")
        one = tiny.inputs("llava", (1, 1))
        mixed = LVLMInputs(dict(one))
        mixed.pictures = inputs.pictures
        assert lvlm.spans(mixed).pictures is None

    def test_a_processor_that_fails_leaves_a_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lvlm, inputs, _ = prepared("llava")
        spans = lvlm.spans(inputs)

        def fail(*args: Any) -> Any:
            raise ValueError(MARKUP)

        monkeypatch.setattr(type(lvlm.family), "seen", fail)
        assert f"cannot be shown: {MARKUP}" in read(spans).text

    def test_only_a_mask_of_the_same_prompt(self) -> None:
        lvlm, inputs, _ = prepared("llava")
        with pytest.raises(cp.CapaProbeError, match="kept of shape"):
            lvlm.spans(inputs).show(torch.ones(1, 3, dtype=torch.bool))

    def test_reprs_are_short(self) -> None:
        spans = cp.HookedLVLM(tiny.shared("qwen2_5_vl")).spans(tiny.inputs("qwen2_5_vl", (1, 2, 0)))
        n = spans.visual.numel()
        assert repr(spans) == (
            f"TokenSpans(3 x {n // 3} positions: 20 visual, {int(spans.text.sum())} text, "
            f"{int(spans.padding.sum())} padding; visual tokens by image: 4 (grid 2 x 2), 8 (grid 2 x 4), "
            "8 (grid 4 x 2))"
        )
        assert (
            repr(spans.images[1]) == "ImageSpan(sample=1, index=0, tokens=8, grid=(2, 4), tile_grid=(1, 1))"
        )


class TestSample:
    def test_shows_its_image_with_its_regions(self) -> None:
        image = processors.image(30, 40)
        sample = cp.Sample("a", image, "what?", ("yes", "no"), "colors", [[[3, 4, 10, 12.5]]])
        shown = read(sample)
        (drawn,) = shown.all("image")
        assert np.array_equal(np.asarray(picture(drawn)), np.asarray(image))
        places = {tuple(rect[key] for key in ("x", "y", "width", "height")) for rect in shown.all("rect")}
        assert places == {("3", "4", "7", "8.5")}
        for fact in ("what?", "yes, no", "colors"):
            assert fact in shown.text

    def test_text_is_no_markup_and_a_missing_image_is_named(self, tmp_path: Path) -> None:
        sample = cp.Sample(MARKUP, tmp_path / "<b>none.png", MARKUP, MARKUP, MARKUP)
        said = read(sample).text
        assert said.count(MARKUP) >= 4
        assert "<b>none.png" in said
        assert said.count("does not exist") == 1

    def test_many_images_are_counted(self) -> None:
        shown = read(cp.Sample("a", [processors.image(8, 8, seed) for seed in range(6)], "what?"))
        assert len(shown.all("image")) == 4
        assert "6, of which 2 are not shown" in shown.text

    def test_large_photographs_are_scaled_down(self) -> None:
        html = cp.Sample("a", processors.image(1500, 3000), "what?")._repr_html_()
        assert len(html) < 700_000
        assert picture(Reader(html).all("image")[0]).size == (768, 384)


@pytest.fixture(scope="module")
def prof() -> cp.LayerProfile:
    inputs = tiny.inputs("llava", (1, 2))
    return cp.profile(cp.HookedLVLM(tiny.shared("llava")), [inputs], progress=False)


class TestProfile:
    def test_means_by_layer_are_those_of_the_table(self, prof: cp.LayerProfile) -> None:
        (shown,) = tables(prof._repr_html_())
        assert shown["layer"].tolist() == [0, 1, 2, 3]
        means = prof.layers.groupby(["kind", "layer"])[["ffn_cosine_mean", "attention_mean"]].mean()
        for kind in ("visual", "text"):
            wanted = means.loc[kind, "ffn_cosine_mean"]
            assert shown[f"FFN cosine, {kind}"].tolist() == pytest.approx(wanted.tolist(), abs=6e-4)
            wanted = means.loc[kind, "attention_mean"]
            assert shown[f"attention, {kind}"].tolist() == pytest.approx(wanted.tolist(), rel=6e-3)

    def test_says_what_it_is(self, prof: cp.LayerProfile, tmp_path: Path) -> None:
        assert "in memory" in read(prof).text
        inputs = tiny.inputs("llava", (1,))
        lvlm = cp.HookedLVLM(tiny.build("llava"))
        lvlm.model.config.name_or_path = MARKUP
        on_disk = cp.profile(lvlm, [inputs], out=tmp_path / "run", probes="attention", progress=False)
        said = read(on_disk).text
        assert f".../{tmp_path.name}/run" in said
        assert str(tmp_path) not in said
        assert MARKUP in said
        assert "FFN cosine" not in said  # was not measured


class TestPruners:
    def test_a_line_names_what_is_not_the_default(self) -> None:
        assert repr(cp.CAPA(layers=(3,))) == "CAPA(layers=(3,), keep=0.25)"
        assert repr(FastV()) == "FastV(layers=(2,), keep=0.5)"
        pruner = cp.CAPA(layers=(2, 5), keep=(0.5, 3), execution="masked", tau="relative")
        assert repr(pruner) == "CAPA(layers=(2, 5), keep=(0.5, 3), execution='masked', tau='relative')"
        assert eval(repr(pruner), {"CAPA": cp.CAPA}) == pruner

    def test_a_method_of_ones_own_has_it_too(self) -> None:
        @dataclass(frozen=True)
        class Mine(Pruner):
            strength: float = 1.0

            def score_tokens(self, scoring: Any) -> Any:
                return scoring.contribution

        assert repr(Mine(layers=(1,), strength=2.0)).endswith("Mine(layers=(1,), keep=0.25, strength=2.0)")

        class Named(Mine):
            def __repr__(self) -> str:
                return "named"

        assert repr(Named()) == "named"

    def test_the_card_says_what_it_does(self) -> None:
        pruner = cp.CAPA(layers=(2, 5), keep=(0.5, 12), budget="image", ffn=SkipFFN([1, 2, 3, 6]))
        said = read(pruner).text
        assert (
            "Of the visual tokens of each image, keeps 50 % from layer 2 on, 12 tokens from layer 5 on."
            in said
        )
        (shown,) = tables(pruner._repr_html_())
        known = shown.set_index("setting")
        assert known.loc["budget"].tolist() == ["'image'", ""]
        assert known.loc["execution"].tolist() == ["'compact'", "default"]
        assert known.loc["ffn"].tolist() == ["SkipFFN in layers 1-3 & 6", ""]
        assert "Drops no token." in read(cp.CAPA()).text
        assert "keeps 25 % after layer 2." in read(cp.CAPA(layers=2, score_at="same")).text
        assert "every decode step sees 25 %" in read(cp.CAPA(layers=2, rescore="every_step")).text
        assert MARKUP in read(cp.CAPA(layers=2, sink_dims=(MARKUP,))).text  # type: ignore[arg-type]

    def test_a_trace_counts_what_was_kept(self) -> None:
        lvlm, inputs, _ = prepared("llava")
        with cp.CAPA(layers=(2,), keep=0.25).attach(lvlm) as trace:
            lvlm(**inputs)
        assert repr(trace) == "Trace(layer 2: 4 of 16 visual tokens)"
        (shown,) = tables(trace._repr_html_())
        assert shown["of these visual"].tolist() == trace.visual_tokens[:, 0].tolist() == [16, 16, 4, 4]
        assert shown["positions"].tolist() == list(trace.lengths)
        assert repr(Trace()) == "Trace(no forward has run)"
        read(Trace())

    def test_a_batch_that_differs_shows_every_count(self) -> None:
        lvlm = cp.HookedLVLM(tiny.shared("llava"))
        with cp.CAPA(layers=(2,), keep=0.25).attach(lvlm) as trace:
            lvlm(**tiny.inputs("llava", (1, 2)))
        assert repr(trace) == "Trace(layer 2: 4 / 8 of 16 / 32 visual tokens)"

    def test_factors_with_their_fit(self) -> None:
        lvlm = cp.HookedLVLM(tiny.shared("llava"))
        alpha = cp.calibrate_hadamard(lvlm, [tiny.inputs("llava", (1, 1))], layers=[1, 3], progress=False)
        (shown,) = tables(alpha._repr_html_())
        assert shown["layer"].tolist() == [1, 3]
        assert shown["R²"].tolist() == pytest.approx([alpha.r2[1], alpha.r2[3]], abs=6e-5)
        assert shown["mean alpha"].tolist() == pytest.approx(
            [float(alpha.alpha[n].mean()) for n in (1, 3)], abs=6e-4
        )
        assert "32 visual tokens of 2 samples" in read(alpha).text
        assert "unknown" in read(cp.HadamardFFN({0: torch.ones(4)})).text

"""Figures show what the tables say, leave matplotlib as it was, and come out the same every time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import colors
from matplotlib.figure import Figure
from PIL import Image

from capa_probe.analysis import classify_sinks, redundant_layers
from capa_probe.errors import CapaProbeError
from capa_probe.figures import attention_contribution, ffn_cosine, save
from capa_probe.figures.scatter_tables import MAX_POINTS, panel_layers, rank_correlation
from capa_probe.figures.style import FAINT, ROLES, TEXT, VISUAL
from capa_probe.tables import LayerProfile
from tests import synthetic
from tests.synthetic import Planted, World

#: Layers 2 and 3 are redundant, layer 3 for visual tokens only.
COSINES = {0: (0.5, 0.8), 1: (0.9, 0.9), 2: (0.99, 0.98), 3: (0.98, 0.9), 4: (0.9, 0.99)}
SINKS = (Planted("a", 2, 3, 17), Planted("b", 2, 5, 17, high=True), Planted("b", 4, 5, 17, high=True))
WORLD = World(sinks=SINKS, cosines=COSINES)


def words(figure: Figure) -> str:
    """All text in a figure."""
    texts = [text.get_text() for text in figure.findobj(mpl.text.Text)]
    return "\n".join(text for text in texts if text)


def curve(figure: Figure, colour: str) -> np.ndarray:
    """The longest line of a colour: (point, 2)."""
    lines = [line for line in figure.axes[0].lines if line.get_color() == colour]
    return max((np.column_stack(line.get_data()) for line in lines), key=len)


def points(axes: Any, colour: str) -> np.ndarray:
    """Scattered points of one colour: (point, 2)."""
    wanted = colors.to_rgb(colour)
    found = [np.ma.getdata(c.get_offsets()) for c in axes.collections if len(c.get_offsets())
             and tuple(c.get_facecolor()[0][:3]) == wanted]  # fmt: skip
    return np.concatenate(found) if found else np.empty((0, 2))


@pytest.fixture(scope="module")
def prof() -> LayerProfile:
    return synthetic.profile(WORLD)


class TestFFNCosine:
    def test_shows_the_table(self, prof: LayerProfile) -> None:
        table = redundant_layers(prof)
        figure = ffn_cosine(table)
        np.testing.assert_allclose(curve(figure, VISUAL), table[["layer", "visual_cosine"]])
        np.testing.assert_allclose(curve(figure, TEXT), table[["layer", "text_cosine"]])
        filled, hollow = [line for line in figure.axes[0].lines if line.get_markersize() == 6.5]
        assert list(filled.get_xdata()) == [2, 3]
        assert list(hollow.get_xdata()) == [0, 1, 4]

    def test_says_what_is_redundant_and_on_how_much(self, prof: LayerProfile) -> None:
        said = words(ffn_cosine(redundant_layers(prof)))
        assert "layers 2-3; not so for text tokens: layer 3" in said
        assert "3 samples with 48 visual and 18 text tokens" in said
        assert "η = 0.96" in said
        assert "decoder layer" in said
        assert "cosine of FFN input and output" in said
        assert "redundant for both" in said
        assert "redundant for visual tokens only" in said

    def test_shades_the_redundant_layers(self, prof: LayerProfile) -> None:
        figure = ffn_cosine(redundant_layers(prof))
        spans = {patch.get_x() + 0.5: patch for patch in figure.axes[0].patches}
        assert sorted(spans) == [2, 3]
        assert colors.to_hex(spans[3].get_facecolor()) == VISUAL.lower()
        assert colors.to_hex(spans[2].get_facecolor()) != VISUAL.lower()

    def test_threshold_is_the_one_given(self, prof: LayerProfile) -> None:
        figure = ffn_cosine(redundant_layers(prof, eta=0.985), eta=0.985)
        assert "η = 0.985" in words(figure)
        assert any(set(line.get_ydata()) == {0.985} for line in figure.axes[0].lines)

    @pytest.mark.parametrize("cosine", [1.0, 0.9999999, -0.5, 0.0])
    def test_extreme_cosines_lie_inside_the_axes(self, cosine: float, tmp_path: Path) -> None:
        table = redundant_layers(synthetic.profile(WORLD))
        table.loc[3, ["visual_cosine", "visual_low", "visual_high"]] = cosine
        figure = ffn_cosine(table)
        save(figure, tmp_path / "figure")
        low, high = figure.axes[0].get_ylim()
        assert low < high
        assert low <= cosine
        assert high >= min(cosine, 0.9999)

    def test_a_single_sample_has_no_interval(self) -> None:
        table = redundant_layers(synthetic.profile(World(samples=("a",), cosines=COSINES)))
        assert "no intervals from a single sample" in words(ffn_cosine(table))
        assert "1 sample with" in words(ffn_cosine(table))

    def test_bad_tables(self, prof: LayerProfile) -> None:
        table = redundant_layers(prof)
        with pytest.raises(CapaProbeError, match="is empty"):
            ffn_cosine(table.iloc[:0])
        with pytest.raises(CapaProbeError, match="lacks the columns text_low, n_text"):
            ffn_cosine(table.drop(columns=["text_low", "n_text"]))


class TestAttentionContribution:
    def test_shows_every_visual_token_by_role(self, prof: LayerProfile) -> None:
        sinks = classify_sinks(prof, tau=synthetic.TAU)
        figure = attention_contribution(prof.tokens, sinks)
        visual = prof.tokens[prof.tokens["kind"] == "visual"]
        for layer, axes in enumerate(figure.axes):
            here = sinks[sinks["layer"] == layer]
            for role, (colour, _) in ROLES.items():
                rows = here.loc[here["role"] == role, ["attention", "contribution"]]
                np.testing.assert_allclose(points(axes, colour), rows)
            others = visual[visual["layer"] == layer].merge(
                here[["sample", "position"]], on=["sample", "position"], how="left", indicator=True
            )
            others = others.loc[others["_merge"] == "left_only", ["attention", "contribution"]]
            np.testing.assert_allclose(points(axes, FAINT), others)
            assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")

    def test_says_what_it_shows(self, prof: LayerProfile) -> None:
        said = words(attention_contribution(prof.tokens, classify_sinks(prof, tau=synthetic.TAU)))
        assert f"3 sinks at τ = {synthetic.TAU:g}" in said
        assert "3 samples, 48 visual tokens per layer" in said
        assert "1 dump, 1 anchor" in said
        assert "Structural Anchor" in said
        assert "Probability Dump" in said
        assert "undetermined" not in said
        assert "sinks count from layer 2 on" in said
        assert "(probability, mean over heads)" in said
        assert "L2 norm" in said

    def test_no_sinks(self) -> None:
        prof = synthetic.profile(World())
        figure = attention_contribution(prof.tokens, classify_sinks(prof, tau=synthetic.TAU))
        assert f"No sinks at τ = {synthetic.TAU:g}" in words(figure)
        assert "Structural Anchor" not in words(figure)
        assert len(points(figure.axes[0], FAINT)) == 48

    def test_zeros_are_drawn_at_the_edge_and_counted(self, prof: LayerProfile, tmp_path: Path) -> None:
        tokens = prof.tokens.copy()
        visual = tokens.index[tokens["kind"] == "visual"]
        tokens.loc[visual[:3], "attention"] = 0.0
        tokens.loc[visual[2:5], "contribution"] = 0.0
        figure = attention_contribution(tokens, classify_sinks(prof, tau=synthetic.TAU))
        assert "5 tokens with a value of 0" in words(figure)
        drawn = points(figure.axes[0], FAINT)
        assert (drawn > 0).all()
        assert (drawn[:3, 0] < drawn[3:, 0].min()).all()
        save(figure, tmp_path / "figure")

    def test_decode_steps_are_passed_over(self) -> None:
        world = World(steps=2)
        prof = synthetic.profile(world, rows="visual")
        figure = attention_contribution(prof.tokens, classify_sinks(prof, tau=synthetic.TAU))
        assert len(points(figure.axes[0], FAINT)) == 48

    def test_layers(self, prof: LayerProfile) -> None:
        sinks = classify_sinks(prof, tau=synthetic.TAU)
        figure = attention_contribution(prof.tokens, sinks, layers=[4, 1, 2])
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["Layer 4", "Layer 1", "Layer 2"]
        figure = attention_contribution(prof.tokens, sinks, layers=range(5))
        assert [axes.get_visible() for axes in figure.axes] == [True] * 5 + [False]
        with pytest.raises(CapaProbeError, match="of layer 7, 9"):
            attention_contribution(prof.tokens, sinks, layers=[1, 7, 9])
        with pytest.raises(CapaProbeError, match="no rows of visual tokens"):
            attention_contribution(prof.tokens[prof.tokens["kind"] == "text"], sinks)
        with pytest.raises(CapaProbeError, match="lack the columns contribution"):
            attention_contribution(prof.tokens.drop(columns="contribution"), sinks)

    def test_many_points_are_thinned_and_that_is_said(self) -> None:
        prof = synthetic.profile(World(samples=tuple("abcdefghij"), n_layers=1, side=20))
        figure = attention_contribution(prof.tokens, classify_sinks(prof, tau=synthetic.TAU))
        assert len(points(figure.axes[0], FAINT)) == MAX_POINTS
        assert f"at most {MAX_POINTS:,} drawn" in words(figure)
        assert "4,000 visual tokens" in words(figure)

    def test_panels_are_spread_over_all_layers(self) -> None:
        assert panel_layers(range(8)) == list(range(8))
        assert panel_layers(range(32)) == [0, 4, 9, 13, 18, 22, 27, 31]

    def test_rank_correlation_is_spearmans(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(20):
            pair = rng.integers(0, 6, size=(2, 12)).astype(float)  # many ties
            # The textbook form: Pearson's correlation of the mean ranks.
            ranks = np.array([[((x > row).sum() + (x >= row).sum() + 1) / 2 for x in row] for row in pair])
            frame = pd.DataFrame({"attention": pair[0], "contribution": pair[1]})
            assert rank_correlation(frame) == pytest.approx(np.corrcoef(ranks)[0, 1])
            assert rank_correlation(np.exp(frame)) == pytest.approx(rank_correlation(frame))
        constant = pd.DataFrame({"attention": [1.0, 1.0, 1.0], "contribution": [1.0, 2.0, 3.0]})
        assert np.isnan(rank_correlation(constant))

    def test_correlation_stands_in_the_title(self, prof: LayerProfile) -> None:
        tokens = prof.tokens
        figure = attention_contribution(tokens, classify_sinks(prof, tau=synthetic.TAU))
        here = tokens[(tokens["layer"] == 3) & (tokens["kind"] == "visual")]
        assert figure.axes[3].get_title(loc="right") == f"ρ = {rank_correlation(here):.2f}"


def contrast(first: str, second: str) -> float:
    """Distance of two colours as seen with deuteranopia (Viénot, Brettel and Mollon 1999), in linear RGB."""
    gamma = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    one, two = (gamma @ (np.array(colors.to_rgb(colour)) ** 2.2) for colour in (first, second))
    return float(np.linalg.norm(one - two))


class TestStyle:
    def test_colours_differ_for_readers_who_confuse_red_and_green(self) -> None:
        palette = [FAINT, *(colour for colour, _ in ROLES.values())]
        assert min(contrast(a, b) for a, b in itertools.combinations(palette, 2)) > 0.08
        assert contrast(VISUAL, TEXT) > 0.3
        assert len({marker for _, marker in ROLES.values()}) == len(ROLES)

    def test_nothing_is_left_behind(self, prof: LayerProfile, tmp_path: Path) -> None:
        import matplotlib.pyplot as plt

        before, figures = dict(mpl.rcParams), plt.get_fignums()
        save(ffn_cosine(redundant_layers(prof)), tmp_path / "one.png")
        save(attention_contribution(prof.tokens, classify_sinks(prof, tau=10.0)), tmp_path / "two.png")
        assert dict(mpl.rcParams) == before
        assert plt.get_fignums() == figures

    def test_a_users_settings_do_not_show(self, prof: LayerProfile, tmp_path: Path) -> None:
        save(ffn_cosine(redundant_layers(prof)), tmp_path / "plain.png")
        with mpl.rc_context(
            {"font.size": 22, "axes.facecolor": "black", "lines.linewidth": 9, "figure.dpi": 50}
        ):
            save(ffn_cosine(redundant_layers(prof)), tmp_path / "odd.png")
        assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "odd.png").read_bytes()


class TestSave:
    def test_png_and_pdf(self, prof: LayerProfile, tmp_path: Path) -> None:
        figure = ffn_cosine(redundant_layers(prof))
        files = save(figure, tmp_path / "new" / "folder" / "f", pdf=True)
        assert files == [tmp_path / "new" / "folder" / name for name in ("f.png", "f.pdf")]
        assert sorted((tmp_path / "new" / "folder").iterdir()) == sorted(files)
        with Image.open(files[0]) as image:
            assert image.size == tuple(round(150 * inches) for inches in figure.get_size_inches())
        assert files[1].read_bytes().startswith(b"%PDF")
        assert save(figure, tmp_path / "v1.5") == [tmp_path / "v1.5.png"]

    def test_same_tables_same_bytes(self, prof: LayerProfile, tmp_path: Path) -> None:
        for name in ("first", "second"):
            sinks = classify_sinks(prof, tau=synthetic.TAU)
            save(ffn_cosine(redundant_layers(prof)), tmp_path / name / "a", pdf=True)
            save(attention_contribution(prof.tokens, sinks), tmp_path / name / "b", pdf=True)
        for file in (tmp_path / "first").iterdir():
            assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name

    def test_nothing_is_cut_off(self, prof: LayerProfile) -> None:
        sinks = classify_sinks(prof, tau=synthetic.TAU)
        figures = [ffn_cosine(redundant_layers(prof)), attention_contribution(prof.tokens, sinks)]
        figures += [
            attention_contribution(prof.tokens, sinks, layers=[2]),
            ffn_cosine(redundant_layers(prof), -0.9),
        ]
        for figure in figures:
            width, height = figure.get_size_inches() * figure.dpi
            box = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= width
            assert box.y1 <= height


def test_a_notebook_shows_a_figure_as_an_image() -> None:
    """Without pyplot, a plain matplotlib figure would show as its name only."""
    layers = redundant_layers(synthetic.profile(synthetic.World()))
    assert ffn_cosine(layers)._repr_png_().startswith(b"\x89PNG")

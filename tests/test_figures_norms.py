"""The figure of norms: what it draws is what the tables hold."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from capa_probe.analysis import classify_sinks
from capa_probe.errors import CapaProbeError
from capa_probe.figures import norms
from capa_probe.figures.cosine_axis import cosine_limits, from_nines, nines
from capa_probe.figures.style import ROLES, TEXT, VISUAL
from capa_probe.tables import LayerProfile
from tests import runs, synthetic
from tests.synthetic import World


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text())


def line(axes: object, colour: str, style: str = "-") -> np.ndarray:
    (found,) = [
        each for each in axes.lines  # type: ignore[attr-defined]
        if each.get_color() == colour and each.get_linestyle() == style
    ]  # fmt: skip
    return np.column_stack(found.get_data())


@pytest.fixture(scope="module")
def prof() -> LayerProfile:
    return synthetic.profile(runs.WORLD)


class TestNorms:
    def test_lines_are_medians_averaged_over_samples(self, prof: LayerProfile) -> None:
        figure = norms(prof.layers)
        names = ("value_norm", "attn_update_norm", "ffn_update_norm", "attn_cosine", "ffn_cosine")
        for axes, name in zip(figure.axes, names, strict=True):
            for kind, colour in (("visual", VISUAL), ("text", TEXT)):
                rows = prof.tokens[prof.tokens["kind"] == kind]
                medians = rows.groupby(["sample", "layer"])[name].median().groupby("layer").mean()
                if name.endswith(
                    "cosine"
                ):  # what is above 1, as made-up cosines can be, is drawn at the edge
                    medians = medians.clip(upper=1 - 3e-6)
                np.testing.assert_allclose(line(axes, colour)[:, 1], medians, rtol=1e-5)
        for axes, stream in zip(figure.axes[1:3], ("resid_pre_norm", "resid_mid_norm"), strict=True):
            rows = prof.tokens[prof.tokens["kind"] == "visual"]
            medians = rows.groupby(["sample", "layer"])[stream].median().groupby("layer").mean()
            (dotted,) = [
                each for each in axes.lines if each.get_color() == VISUAL and each.get_marker() == "None"
            ]
            np.testing.assert_allclose(dotted.get_ydata(), medians, rtol=1e-5)

    def test_roles(self, prof: LayerProfile) -> None:
        sinks = classify_sinks(prof, tau=synthetic.TAU)
        figure = norms(prof.layers, sinks)
        marks = [each for each in figure.axes[0].lines if each.get_color() == ROLES["anchor"][0]]
        expected = sinks[sinks["role"] == "anchor"].groupby("layer")["value_norm"].median()
        np.testing.assert_allclose(np.column_stack(marks[0].get_data()), expected.reset_index())
        assert "Probability Dump" in words(figure)
        assert "Probability Dump" not in words(norms(prof.layers))

    def test_says_units_and_numbers(self, prof: LayerProfile) -> None:
        said = words(norms(prof.layers))
        assert "3 samples with 48 visual tokens and 18 text tokens" in said
        assert "L2 norm (activation units)" in said

    def test_what_was_not_measured_has_no_panel(self, prof: LayerProfile) -> None:
        table = prof.layers.copy()
        table.loc[:, [name for name in table if name.startswith("value_norm")]] = np.nan
        assert [axes.get_title(loc="left") for axes in norms(table).axes] == [
            "Added by attention",
            "Added by the FFN",
            "Cosine: attention",
            "Cosine: FFN",
        ]
        table.loc[:, [name for name in table if "update_norm" in name]] = np.nan
        with pytest.raises(CapaProbeError, match="neither value norms nor residual updates"):
            norms(table)
        with pytest.raises(CapaProbeError, match="lacks the columns step"):
            norms(prof.layers.drop(columns="step"))

    def test_decode_steps_are_passed_over(self) -> None:
        world = World(steps=2, cosines=runs.COSINES)
        layers = synthetic.profile(world, rows="visual").layers
        prefill = layers[layers["step"] == 0]
        for axes, alone in zip(norms(layers).axes, norms(prefill).axes, strict=True):
            np.testing.assert_array_equal(line(axes, VISUAL), line(alone, VISUAL))

    def test_ticks_are_numbers_within_a_decade(self, prof: LayerProfile) -> None:
        table = prof.layers.copy()
        for name in ("p05", "p50", "p95"):
            table[f"value_norm_{name}"] = {"p05": 2.2, "p50": 3.0, "p95": 4.4}[name]
        figure = norms(table)
        figure.canvas.draw()
        low, high = figure.axes[0].get_ylim()
        ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert len([tick for tick in ticks if tick and low <= float(tick) <= high]) >= 3


class TestCosineAxis:
    def test_there_and_back(self) -> None:
        cosines = np.array([-1.0, 0.0, 0.5, 0.96, 0.999, 1 - 3e-6])
        np.testing.assert_allclose(from_nines(nines(cosines)), cosines, atol=1e-9)
        np.testing.assert_allclose(nines(np.array([0.9, 0.99, 0.999])), [1, 2, 3])

    def test_all_values_lie_inside_and_ticks_among_them(self) -> None:
        axes = Figure().subplots()
        axes.set_yscale("function", functions=(nines, from_nines))
        cosine_limits(axes, [0.7, 0.999, np.nan])
        low, high = axes.get_ylim()
        assert 0.5 < low < 0.7 < 0.999 < high < 0.9999
        assert list(axes.yaxis.get_major_locator()()) == [0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999]

"""Figures of confirmations and trainings show the numbers of their tables, each where it belongs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from capa_probe.errors import CapaProbeError
from capa_probe.figures.accuracy_budget import accuracy_budget, accuracy_budget_tables
from capa_probe.figures.accuracy_cost import accuracy_cost, accuracy_cost_tables, stage_looks
from capa_probe.figures.entry import Source
from capa_probe.figures.ffn_kinds import ffn_kinds, ffn_kinds_tables
from capa_probe.figures.over_steps import apart, over_steps, over_steps_tables
from capa_probe.figures.score_ranks import score_ranks, score_ranks_tables
from capa_probe.figures.sink_removal import sink_removal, sink_removal_tables
from capa_probe.figures.style import METHODS, SCORES, STAGES
from capa_probe.figures.training import smoothed, training, training_tables
from demo_training.training_table import training_table
from tests import benchmark_tables

TABLES = benchmark_tables.tables()
MADE: dict[str, tuple[Callable[..., Any], Callable[..., Figure]]] = {
    "accuracy_budget": (accuracy_budget_tables, accuracy_budget),
    "ffn_kinds": (ffn_kinds_tables, ffn_kinds),
    "sink_removal": (sink_removal_tables, sink_removal),
    "over_steps": (over_steps_tables, over_steps),
    "accuracy_cost": (accuracy_cost_tables, accuracy_cost),
    "score_ranks": (score_ranks_tables, score_ranks),
}


def drawn(name: str, tables: dict[str, pd.DataFrame] = TABLES) -> Figure:
    select, draw = MADE[name]
    return draw({"small": select(Source(tables))})


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text())


def bars(axes: Any, label: str) -> np.ndarray:
    """Mean, low and high of every point of a series with error bars: (point, 3)."""
    found = [c for c in axes.containers if isinstance(c, ErrorbarContainer) and c.get_label() == label]
    assert found, f"no series {label} among {[c.get_label() for c in axes.containers]}"
    rows = []
    for container in found:
        ends = container[2][-1].get_segments()
        for middle, segment in zip(container[0].get_ydata(), ends, strict=True):
            rows.append([middle, *sorted(segment[:, 1])])
    return np.array(rows)


def expected(rows: pd.DataFrame, measure: str) -> np.ndarray:
    return np.array(
        [[row[measure], row[f"{measure}_low"], row[f"{measure}_high"]] for _, row in rows.iterrows()]
    )


def of_all(name: str, **condition: Any) -> pd.DataFrame:
    table = TABLES[name]
    chosen = table["task"] == "all"
    for column, value in condition.items():
        chosen &= table[column] == value
    return table[chosen]


def test_accuracy_by_budget_shows_the_table() -> None:
    figure = drawn("accuracy_budget")
    for axes, stage in zip(figure.axes, benchmark_tables.STAGES, strict=True):
        assert f"layer {benchmark_tables.STAGES[stage]}" in axes.get_title(loc="left")
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["25 %", "50 %", "all"]
        for score in SCORES:
            rows = of_all("budget", stage=stage, score=score).sort_values("keep")
            np.testing.assert_allclose(bars(axes, score), expected(rows, "correct"))
    assert "40 questions about 39 images" in words(figure)


def test_accuracy_without_known_answers_is_agreement() -> None:
    blind = TABLES["budget"].assign(correct=np.nan, correct_low=np.nan, correct_high=np.nan)
    figure = drawn("accuracy_budget", TABLES | {"budget": blind})
    rows = of_all("budget", stage="early", score="random").sort_values("keep")
    np.testing.assert_allclose(bars(figure.axes[0], "random"), expected(rows, "agrees"))
    assert "agreement with" in words(figure)


def test_a_share_of_tokens_that_one_score_lacks_is_a_gap() -> None:
    table = TABLES["budget"]
    lacking = table[(table["score"] != "random") | (table["keep"] != 0.25)]
    axes = drawn("accuracy_budget", TABLES | {"budget": lacking}).axes[0]
    (line,) = [c[0] for c in axes.containers if c.get_label() == "random"]
    assert np.isnan(np.asarray(line.get_ydata(), float)).tolist() == [True, False, False]


def test_models_stand_in_rows() -> None:
    other = benchmark_tables.tables(seed=100)
    tables = {"one": accuracy_budget_tables(Source(TABLES)), "two": accuracy_budget_tables(Source(other))}
    figure = accuracy_budget(tables)
    assert len(figure.axes) == 6
    table = other["budget"]
    rows = table[(table["task"] == "all") & (table["stage"] == "late") & (table["score"] == "attention")]
    shown = bars(figure.axes[5], "attention")
    np.testing.assert_allclose(shown, expected(rows.sort_values("keep"), "correct"))
    assert {"one", "two"} <= set(words(figure).splitlines())


def test_kinds_of_ffn_show_the_table() -> None:
    answers, distance = drawn("ffn_kinds").axes
    for kind in ("full", "hadamard", "skip"):
        np.testing.assert_allclose(
            bars(answers, kind), expected(of_all("ffn_redundancy", ffn=kind), "correct")
        )
        if kind != "full":  # the distance from itself says nothing
            rows = of_all("ffn_redundancy", ffn=kind)
            np.testing.assert_allclose(bars(distance, kind), expected(rows, "hellinger"))
    assert "(1, 2, 3)" in answers.get_xticklabels()[0].get_text()


def test_removed_sinks_show_the_table() -> None:
    answers, distance = drawn("sink_removal").axes
    for axes, measure in ((answers, "correct"), (distance, "hellinger")):
        for role in ("dump", "anchor"):
            for removed in ("role", "non_sinks", "visual"):
                rows = of_all("dumps_anchors", layer=4, role=role, removed=removed)
                np.testing.assert_allclose(bars(axes, f"4 {role} {removed}"), expected(rows, measure))
    labels = [tick.get_text() for tick in answers.get_xticklabels()]
    assert labels == [
        "layer 3\n12 dumps\nn = 40",
        "layer 4\n9 dumps\nn = 40",
        "layer 3\n5 anchors\nn = 40",
        "layer 4\n4 anchors\nn = 40",
    ]


def test_without_sinks_the_figure_says_why() -> None:
    none = {
        "dumps_anchors": TABLES["dumps_anchors"].iloc[:0],
        "dumps_anchors_notes": pd.DataFrame({"note": ["0 sinks at tau = 5."]}),
    }
    assert "0 sinks at tau = 5." in words(drawn("sink_removal", TABLES | none))
    none = {
        "ffn_redundancy": TABLES["ffn_redundancy"].iloc[:0],
        "ffn_redundancy_notes": pd.DataFrame({"note": ["No layer has it."]}),
    }
    assert "No layer has it." in words(drawn("ffn_kinds", TABLES | none))


def test_models_without_sinks_have_a_sentence_and_no_row() -> None:
    none = {
        "dumps_anchors": TABLES["dumps_anchors"].iloc[:0],
        "dumps_anchors_notes": pd.DataFrame({"note": ["0 sinks at tau = 5."]}),
    }
    some, bare = (sink_removal_tables(Source(TABLES | more)) for more in ({}, none))
    figure = sink_removal({"one": some, "two": bare})
    assert len(figure.axes) == 2
    said = words(figure).splitlines()
    assert "one" in said  # whose row it is
    assert "two: 0 sinks at tau = 5." in said
    same = words(sink_removal({"two": bare, "three": bare})).splitlines()
    assert "two, three: 0 sinks at tau = 5." in same  # said once
    alone = sink_removal({"two": bare})
    assert not alone.axes
    assert alone.get_figheight() < 1.5
    for one, other in ((some, bare), (bare, some)):
        assert (
            sink_removal({"one": one, "two": other}).get_figheight()
            < 1.5 * sink_removal({"one": some}).get_figheight()
        )


def test_steps_that_few_answers_reach_are_left_out() -> None:
    steps, maps = (
        TABLES[name].assign(n=np.where(TABLES[name]["step"] == 3, 4, 40))
        for name in ("over_steps", "over_steps_maps")
    )
    figure = drawn("over_steps", TABLES | {"over_steps": steps, "over_steps_maps": maps})
    for axes in figure.axes:
        assert "3" not in {tick.get_text().splitlines()[0] for tick in axes.get_xticklabels()}
    few = {name: table.assign(n=2) for name, table in (("over_steps", steps), ("over_steps_maps", maps))}
    small = drawn("over_steps", TABLES | few)  # no question more: all are shown
    assert small.axes[0].get_xticklabels()[-1].get_text() == "3\n2"


def test_all_distances_lie_inside_their_panels() -> None:
    table = TABLES["over_steps"]
    far = table.assign(hellinger_high=np.where(table["stage"] == "late", 1.0, table["hellinger_high"]))
    figure = drawn("over_steps", TABLES | {"over_steps": far})
    assert {axes.get_ylim()[1] >= 1 for axes in figure.axes} == {True}


def test_labels_are_moved_apart_and_no_further() -> None:
    assert apart([0.5, 0.1], 0.2) == pytest.approx([0.5, 0.1])
    assert apart([0.3, 0.3, 0.9], 0.2) == pytest.approx([0.2, 0.4, 0.9])
    moved = apart([0.1, 0.11, 0.12, 0.5], 0.1)
    assert moved == pytest.approx([0.01, 0.11, 0.21, 0.5])
    assert apart([], 0.1) == []


def test_steps_show_the_table() -> None:
    *stages, maps = drawn("over_steps").axes
    for axes, stage in zip(stages, benchmark_tables.STAGES, strict=True):
        for method in ("contribution", "attention", "random", "every_step"):
            rows = of_all("over_steps", stage=stage, method=method).sort_values("step")
            # What ranks anew at every step prunes nothing at the prompt.
            rows = rows[rows["step"] > 0] if method == "every_step" else rows
            np.testing.assert_allclose(bars(axes, method), expected(rows, "hellinger"))
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [f"{s}\n40" for s in range(4)]
    for layer in range(5):
        (line,) = [line for line in maps.lines if line.get_label() == f"layer {layer}"]
        rows = of_all("over_steps_maps", layer=layer, against="previous")
        np.testing.assert_allclose(line.get_xydata(), rows[["step", "hellinger"]])
    assert METHODS["every_step"].colour in {line.get_color() for line in stages[0].lines}


def test_cost_shows_the_tables() -> None:
    flops, *timed = drawn("accuracy_cost").axes
    (vanilla,) = of_all("together", method="vanilla").to_dict("records")
    for stage in benchmark_tables.STAGES:
        (line,) = [line for line in flops.lines if line.get_label() == f"{stage} contribution"]
        rows = of_all("budget", stage=stage, score="contribution").sort_values("keep")
        assert line.get_color() == STAGES[stage].colour
        np.testing.assert_allclose(line.get_xdata(), rows["flops"] / vanilla["flops"])
        np.testing.assert_allclose(line.get_ydata(), rows["correct"])
    rows = of_all("together", method="capa")
    np.testing.assert_allclose(bars(flops, "capa"), expected(rows, "correct"))
    shares = [x for c in flops.containers if c.get_label() == "capa" for x in np.atleast_1d(c[0].get_xdata())]
    np.testing.assert_allclose(shares, rows["flops"] / vanilla["flops"])
    (own,) = [c for c in flops.containers if c.get_label() == "vanilla"]
    np.testing.assert_allclose(own[0].get_xydata(), [[1, vanilla["correct"]]])
    for axes, phase in zip(timed, ("prefill", "decode step"), strict=True):
        time = TABLES["together_time"]
        time = time[time["phase"] == phase]
        points = [c for c in axes.containers if c.get_label() == "capa"]
        np.testing.assert_allclose([float(c[0].get_xdata()[0]) for c in points], time["ratio"])
        across = [sorted(c[2][0].get_segments()[0][:, 0]) for c in points]
        np.testing.assert_allclose(across, time[["ratio_low", "ratio_high"]])
        np.testing.assert_allclose([float(c[0].get_ydata()[0]) for c in points], rows["correct"])
        low, high = axes.get_xlim()
        assert low < time["ratio_low"].min() <= time["ratio_high"].max() < high
        assert low < 1 < high


def test_stages_of_any_name_have_looks_of_their_own() -> None:
    assert stage_looks(["late"]) == {"late": STAGES["late"]}
    named = stage_looks(["layer 2", "layer 8", "layer 16"])
    assert list(named) == ["layer 2", "layer 8", "layer 16"]
    assert list(named.values()) == list(STAGES.values())
    assert len(stage_looks([f"layer {n}" for n in range(5)])) == 5


def test_rank_correlations_show_the_table() -> None:
    axes = drawn("score_ranks").axes
    for panel, scored_at in zip(axes, ("previous", "same"), strict=True):
        for score in SCORES:
            rows = of_all("knockout", scored_at=scored_at, score=score, effect="hellinger")
            np.testing.assert_allclose(bars(panel, score), expected(rows, "spearman"))
        assert [tick.get_text() for tick in panel.get_xticklabels()] == ["1", "3", "4"]


class TestTraining:
    def models(self) -> dict[str, dict[str, pd.DataFrame]]:
        source = Source(
            {
                "training": training_table(benchmark_tables.log()),
                "evaluation": benchmark_tables.evaluation(),
            }
        )
        return {"small": training_tables(source)}

    def test_a_step_that_was_made_twice_counts_once_as_it_came_last(self) -> None:
        lines = benchmark_tables.log()
        table = training_table(lines)
        own = table[(table["stage"] == "symbols") & (table["step"] == 50)]
        assert dict(zip(own["task"], own["right"].round(4).astype(float), strict=True)) == pytest.approx(
            lines[4]["accuracy"], abs=1e-6
        )
        assert list(table["stage"].unique()) == ["tower", "symbols", "projector", "joint"]
        assert table[table["stage"] == "projector"]["task"].tolist() == [""]

    def test_means_are_of_three_lines(self) -> None:
        table = training_table(benchmark_tables.log())
        own = table[table["stage"] == "symbols"]
        values = own[own["task"] == "color"].sort_values("step")["right"].to_numpy(dtype=float)
        naive = [values[max(i - 1, 0) : i + 2].mean() for i in range(len(values))]
        np.testing.assert_allclose(smoothed(own)["color"], naive, rtol=1e-6)

    def test_means_of_a_long_stage_are_of_a_twentieth_of_it(self) -> None:
        lines = 200
        values = np.random.default_rng(0).random(lines)
        log = pd.DataFrame({"step": 25 * np.arange(1, lines + 1), "task": "color", "right": values})
        shown = smoothed(log)["color"]
        naive = [values[max(i - 5, 0) : i + 5].mean() for i in range(0, lines, 5)]
        np.testing.assert_allclose(shown, naive)
        assert list(shown.index) == list(log["step"][::5])

    def test_shows_log_and_test(self) -> None:
        figure = training(self.models())
        table = training_table(benchmark_tables.log())
        curves = [line for axes in figure.axes for line in axes.lines]
        own = table[table["stage"] == "symbols"]
        (colour,) = [line for line in curves if line.get_label() == "color" and len(line.get_xdata()) == 4]
        np.testing.assert_allclose(colour.get_ydata(), smoothed(own)["color"])
        losses = [
            line.get_ydata() for axes in figure.axes if axes.get_yscale() == "log" for line in axes.lines
        ]
        np.testing.assert_allclose(losses[1], own.drop_duplicates("step")["loss"])
        (test,) = [axes for axes in figure.axes if axes.get_title(loc="left") == "test split"]
        points = [c for c in test.containers if isinstance(c, ErrorbarContainer)]
        assert [float(c[0].get_xdata()[0]) for c in points] == [0.9, 0.3]
        assert [sorted(c[2][0].get_segments()[0][:, 0]) for c in points] == [
            pytest.approx([0.85, 0.94]),
            pytest.approx([0.21, 0.41]),
        ]
        assert [patch.get_width() for patch in test.patches] == [0.1, 0.08]
        assert "n = 120 per task" in words(figure)

    def test_a_model_has_panels_of_its_own_stages_alone(self) -> None:
        source = self.models()["small"]
        log = source["training"]
        short = {"training": log[log["stage"].isin(["tower", "joint"])], "evaluation": source["evaluation"]}
        figure = training({"long": source, "short": short})
        titles = [
            axes.get_title(loc="left").splitlines()[0] for axes in figure.axes if axes.get_title(loc="left")
        ]
        assert sorted(titles) == sorted(
            ["tower", "symbols", "projector", "joint", "test split", "tower", "joint", "test split"]
        )
        losses = {axes.get_ylim() for axes in figure.axes if axes.get_yscale() == "log"}
        assert len(losses) == 1  # one scale, since only the first panel of a row is labelled

    @pytest.mark.parametrize("models", [1, 2])
    def test_no_words_lie_on_others(self, models: int) -> None:
        figure = training({str(number): self.models()["small"] for number in range(models)})
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        boxes = [
            text.get_window_extent(canvas.get_renderer())
            for axes in figure.axes
            for text in (axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label)
            if text.get_text()
        ] + [text.get_window_extent(canvas.get_renderer()) for text in figure.texts]
        for one, other in itertools.combinations(boxes, 2):
            assert not one.padded(-1).overlaps(other.padded(-1))

    def test_questions_about_single_patches_have_a_legend_of_their_own(self) -> None:
        figure = training(self.models())
        headings = [legend.get_title().get_text() for legend in figure.legends]
        assert headings == ["Tasks", "Single patches (tower)"]

    def test_an_empty_log(self) -> None:
        models = self.models()
        models["small"]["training"] = models["small"]["training"].iloc[:0]
        with pytest.raises(CapaProbeError, match="training log of small is empty"):
            training(models)


@pytest.mark.parametrize("name", MADE)
def test_bad_tables(name: str) -> None:
    select, draw = MADE[name]
    with pytest.raises(CapaProbeError, match=r"There is no table \w+; give a run of capa-probe confirm"):
        select(Source({}))
    tables = select(Source(TABLES))
    first = next(iter(tables))
    broken = {first: tables[first].drop(columns=["n_images", tables[first].columns[0]])}
    with pytest.raises(CapaProbeError, match=r"The table \w+ lacks the columns .*n_images"):
        draw({"small": tables | broken})
    with pytest.raises(CapaProbeError, match="7 models were given to one figure; give 1 to 6"):
        draw({str(number): tables for number in range(7)})


@pytest.mark.parametrize("name", MADE)
def test_nothing_in_a_figure_lies_outside_it_or_on_its_title(name: str) -> None:
    figure = drawn(name)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    width, height = figure.bbox.size
    low = min(text.get_window_extent(renderer).y0 for text in figure.texts)
    (legend,) = figure.legends
    box = legend.get_window_extent(renderer)
    assert box.x1 <= width + 1
    assert box.y0 >= -1
    for axes in figure.axes:
        tight = axes.get_tightbbox(renderer)
        if tight is not None:
            assert tight.y1 <= low + 1
            assert tight.y0 >= box.y1 - 1
            assert tight.x0 >= -1
            assert tight.x1 <= width + 1

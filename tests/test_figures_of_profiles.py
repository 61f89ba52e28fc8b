"""Figures of profiles show what their tables say: distributions, split, spread, shares, overlays; and the palette."""

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
from capa_probe.examples import read_examples
from capa_probe.figures import (
    attention_contribution,
    ffn_cosine,
    ffn_cosines,
    norm_summary,
    norms_compared,
    overlay_tables,
    overlays,
    save,
    sink_split,
    split_tables,
    style,
    token_shares,
)
from capa_probe.figures.entry import Source
from capa_probe.figures.of_profile import PROFILE_ENTRIES
from capa_probe.figures.overlay_tables import overlay_layers
from capa_probe.figures.scatter_tables import scatter_tables
from capa_probe.figures.style import FAINT, ROLES, TEXT, VISUAL, run_looks, task_looks
from capa_probe.figures.token_shares import token_shares_tables
from capa_probe.patches import layouts
from capa_probe.tables import LayerProfile
from tests import runs, synthetic
from tests.synthetic import Planted, World

SAMPLES = tuple("abcdefgh")
#: In each sample and layer two sinks, one of them high.
PLANTED = tuple(
    Planted(sample, layer, place + layer, 17, high=high)
    for sample in SAMPLES
    for layer in (2, 3)
    for place, high in ((1, False), (9, True))
)
WORLD = World(samples=SAMPLES, n_layers=4, sinks=PLANTED, cosines=runs.COSINES)


def words(figure: Figure) -> str:
    texts = [text.get_text() for text in figure.findobj(mpl.text.Text)]
    return "\n".join(text for text in texts if text)


@pytest.fixture(scope="module")
def prof() -> LayerProfile:
    return synthetic.profile(WORLD)


@pytest.fixture(scope="module")
def sinks(prof: LayerProfile) -> pd.DataFrame:
    return classify_sinks(prof, tau=synthetic.TAU)


@pytest.fixture(scope="module")
def no_sinks(prof: LayerProfile) -> pd.DataFrame:
    return classify_sinks(prof, tau=30)


def source(prof: LayerProfile, sinks: pd.DataFrame, **more: Any) -> Source:
    tables = {"sinks": sinks, "layers": redundant_layers(prof), **more}
    return Source(tables, None, prof, {"tau": synthetic.TAU, "eta": 0.96})


class TestMargins:
    def test_distributions_are_of_all_tokens(self, prof: LayerProfile, sinks: pd.DataFrame) -> None:
        tables = scatter_tables(prof.tokens, sinks, most=3)
        assert tables["points"].groupby(["layer", "role"]).size().max() == 3
        tokens = prof.tokens[prof.tokens["kind"] == "visual"]
        margins = tables["margins"]
        np.testing.assert_allclose(margins.groupby(["layer", "role", "axis"])["share"].sum(), 1, rtol=1e-5)
        own = margins.query("layer == 2 and role == 'anchor' and axis == 'contribution'")
        assert own["share"].to_numpy() == pytest.approx(1)
        assert 10 ** own["low"].iloc[0] <= 1e3 <= 1.001 * 10 ** own["high"].iloc[0]
        attention = np.log10(tokens.loc[tokens["layer"] == 1, "attention"])
        own = margins.query("layer == 1 and axis == 'attention'")
        middle = ((own["low"] + own["high"]) / 2 * own["share"]).sum()
        assert middle == pytest.approx(attention.mean(), abs=float((own["high"] - own["low"]).max()) / 2)

    @pytest.mark.parametrize("axis", ["attention", "contribution"])
    def test_what_was_not_measured_is_not_drawn(
        self, prof: LayerProfile, sinks: pd.DataFrame, axis: str
    ) -> None:
        tokens = prof.tokens.copy()
        tokens.loc[(tokens["sample"] == "c") & (tokens["layer"] == 1), axis] = np.nan
        with pytest.raises(CapaProbeError, match=rf"{axis} is missing \(NaN\).*'c' at layer 1"):
            scatter_tables(tokens, sinks)
        scatter_tables(tokens, sinks, [0, 2])

    def test_drawn_by_role(self, prof: LayerProfile, sinks: pd.DataFrame) -> None:
        figure = attention_contribution(prof.tokens, sinks, [2])
        top, right = figure.axes[0].child_axes
        for strip in (top, right):
            found = {colors.to_hex(patch.get_facecolor()) for patch in strip.patches}
            assert found == {FAINT, ROLES["dump"][0].lower(), ROLES["anchor"][0].lower()}
        # On the panel's own scale.
        assert top.get_xlim() == figure.axes[0].get_xlim()
        assert right.get_ylim() == figure.axes[0].get_ylim()


class TestSinkSplit:
    def test_relative_to_the_others(self, sinks: pd.DataFrame) -> None:
        tables = split_tables(sinks)
        wanted = sinks["contribution"].astype(float) / sinks["others_contribution"].astype(float)
        np.testing.assert_allclose(np.sort(tables["points"]["value"]), np.sort(wanted), rtol=1e-6)
        assert tables["splits"]["value"].eq(1).all()
        assert tables["bins"]["n"].sum() == len(sinks)
        figure = sink_split({"made-up": tables})
        for role, (colour, _) in ROLES.items():
            drawn = [c for c in figure.axes[0].collections if colors.to_hex(c.get_facecolor()[0]) == colour.lower()
                     if len(c.get_offsets())]  # fmt: skip
            values = np.concatenate([c.get_offsets()[:, 1] for c in drawn]) if drawn else np.array([])
            own = wanted[(sinks["role"] == role).to_numpy()]
            np.testing.assert_allclose(np.sort(values), np.sort(own), rtol=1e-6)
        said = words(figure)
        assert "32 sinks at τ = 10" in said
        assert "split (non-sink-median)" in said
        assert "too few\n(16)" in said

    def test_split_of_a_layer_parts_the_roles(self, prof: LayerProfile) -> None:
        table = split_tables(classify_sinks(prof, tau=synthetic.TAU, split="otsu"))
        points = table["points"]
        for layer, value in table["splits"].itertuples(index=False):
            own = points[points["layer"] == layer]
            assert own.loc[own["role"] == "dump", "value"].max() < value
            assert own.loc[own["role"] == "anchor", "value"].min() > value
        assert "contribution C" in words(sink_split({"made-up": table}))

    def test_bimodal_is_said(self) -> None:
        many = World(samples=tuple(f"s{i}" for i in range(24)), n_layers=3, sinks=tuple(
            Planted(f"s{i}", 2, place, 17, high=high) for i in range(24) for place, high in ((1, False), (9, True))
        ))  # fmt: skip
        table = synthetic.tokens(many)
        sink = table["contribution"].isin([1e3, 1e-3])
        table.loc[sink, "contribution"] *= np.random.default_rng(0).lognormal(sigma=0.5, size=sink.sum())
        found = classify_sinks(synthetic.profile_of(table, many), tau=synthetic.TAU)
        assert "bimodal: dip p < 0.001" in words(sink_split({"m": split_tables(found)}))

    def test_no_sinks_are_said(self, prof: LayerProfile, sinks: pd.DataFrame, no_sinks: pd.DataFrame) -> None:
        entry = next(entry for entry in PROFILE_ENTRIES if entry.name == "sink_split")
        tables = entry.select(source(prof, no_sinks))
        said = words(entry.draw({"made-up": tables}))
        assert "No sinks at τ = 30" in said
        assert "largest sink strength of a visual token outside offset dimensions: 25 (layer 2)" in said
        figure = entry.draw({"one": split_tables(sinks), "two": tables})
        assert len(figure.axes) == 2
        assert not entry.draw({"made-up": tables}).axes
        both = words(figure)
        assert "one: 32 sinks" in both
        assert "two: no sinks" in both

    def test_contributions_of_zero_are_said(self, sinks: pd.DataFrame) -> None:
        changed = sinks.copy()
        changed.attrs = sinks.attrs
        changed.loc[changed.index[:3], "contribution"] = 0
        assert "3 with nothing to compare with, or C = 0, left out" in words(
            sink_split({"m": split_tables(changed)})
        )

    def test_bad_tables(self, sinks: pd.DataFrame) -> None:
        with pytest.raises(CapaProbeError, match="table points of m lacks the columns role"):
            sink_split({"m": split_tables(sinks) | {"points": pd.DataFrame({"layer": [], "value": []})}})


class TestFFNSpread:
    def test_bars_are_quantiles_of_single_tokens(self, prof: LayerProfile) -> None:
        figure = ffn_cosine(redundant_layers(prof))
        for kind, colour in (("visual", VISUAL), ("text", TEXT)):
            (bars,) = [
                c
                for c in figure.axes[0].collections
                if isinstance(c, mpl.collections.LineCollection)
                and colors.to_hex(c.get_color()[0]) == colour.lower()
            ]
            own = prof.tokens[prof.tokens["kind"] == kind].groupby("layer")["ffn_cosine"]
            for (low, high), layer in zip((s[:, 1] for s in bars.get_segments()), range(4), strict=True):
                wanted = np.quantile(own.get_group(layer).astype(float), [0.05, 0.95])
                np.testing.assert_allclose([low, high], wanted, atol=1e-6)
        above = figure.axes[1].lines
        table = redundant_layers(prof)
        np.testing.assert_allclose(above[1].get_ydata(), table["visual_share_above"])
        np.testing.assert_allclose(above[0].get_ydata(), table["text_share_above"])

    def test_without_rows_there_is_no_spread(self) -> None:
        figure = ffn_cosine(redundant_layers(synthetic.profile(WORLD, rows="none")))
        assert len(figure.axes) == 1
        assert "single tokens" not in words(figure)

    def test_models_side_by_side(self, prof: LayerProfile) -> None:
        table = redundant_layers(prof).assign(eta=0.96, confidence=0.95)
        figure = ffn_cosines({"one": {"layers": table}, "two": {"layers": table.iloc[:3]}})
        assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["one", "two"]
        assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
        assert "two: redundant FFN in layer 2; not so for text tokens: none (8 samples)" in words(figure)
        with pytest.raises(CapaProbeError, match=r"eta = 0\.9 and 0\.96"):
            ffn_cosines({"one": {"layers": table}, "two": {"layers": table.assign(eta=0.9)}})


class TestTokenShares:
    def test_stacks_and_marks(self, prof: LayerProfile, sinks: pd.DataFrame) -> None:
        tables = token_shares_tables(source(prof, sinks))
        tables["transitions"].loc[1, "transition"] = True
        figure = token_shares({"made-up": tables})
        for axes, quantity in zip(figure.axes, ("attention", "contribution"), strict=False):
            own = tables["shares"][tables["shares"]["quantity"] == quantity]
            (line,) = [
                line for line in axes.lines if line.get_color() == "white" and len(line.get_xdata()) > 2
            ]
            np.testing.assert_allclose(line.get_ydata()[::2], own["all_visual"])
            np.testing.assert_allclose(line.get_xdata()[::2], own["layer"] - 0.5)
            tops = [c.get_paths()[0].vertices[:, 1].max() for c in axes.collections]
            assert max(tops) == pytest.approx(1, abs=1e-5)
            marks = {line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2}
            assert marks == set(tables["transitions"].query("transition")["layer"] - 0.5)
            assert 1.5 in marks
        said = words(figure)
        assert "1→2" in said
        assert "The paper's pruning layers: those for LLaVA-1.5-7B, scaled to depth" in said
        assert "VisiPruner's stages" in said
        assert "8 samples of 8 images" in said
        assert "Structural Anchor" in said

    def test_nothing_to_compare_and_no_sinks(self, no_sinks: pd.DataFrame) -> None:
        single = synthetic.profile(World(samples=("a",), n_layers=1))
        tables = token_shares_tables(Source({}, None, single, {}))
        said = words(token_shares({"m": tables}))
        assert "one layer: nothing to compare" in said
        assert "no sinks" in said
        alone = token_shares_tables(Source({}, None, synthetic.profile(World(samples=("a",))), {}))
        assert "Nothing to tell transition layers by" in words(token_shares({"m": alone}))

    def test_visual_rows_only(self, sinks: pd.DataFrame) -> None:
        prof = synthetic.profile(WORLD, rows="visual", family="none of the paper's")
        tables = token_shares_tables(source(prof, sinks))
        assert "stages" not in tables
        assert tables["published"].empty
        said = words(token_shares({"m": tables}))
        assert "VisiPruner" not in said
        assert "The paper's" not in said
        assert "first token" not in said


def grid_of(
    table: pd.DataFrame, grid: tuple[int, int], tile_grid: tuple[int, int], thumbnail: bool
) -> pd.DataFrame:
    """Visual tokens laid out tile by tile, as a tiling model has them."""
    table = table.copy()
    n = grid[0] * grid[1]
    place = table["position"] - 1
    visual = table["kind"] == "visual"
    n_tiles = tile_grid[0] * tile_grid[1]
    table.loc[visual, "tile"] = place[visual] // n
    table.loc[visual, "row"] = place[visual] % n // grid[1]
    table.loc[visual, "col"] = place[visual] % n % grid[1]
    if thumbnail:
        table.loc[visual & (table["tile"] == n_tiles), "tile"] = -1
    return table


def written(
    path: Path, grid: tuple[int, int], tile_grid: tuple[int, int], thumbnail: bool, size: tuple[int, int]
) -> tuple[LayerProfile, pd.DataFrame]:
    n = grid[0] * grid[1] * (tile_grid[0] * tile_grid[1] + thumbnail)
    world = World(samples=("a", "b"), n_layers=5, side=4, sinks=runs.SINKS)
    assert n == world.n_visual
    table = grid_of(synthetic.tokens(world), grid, tile_grid, thumbnail)
    runs.write(path, table, world)
    images = [{"file": "0-0.png", "grid": list(grid), "tile_grid": list(tile_grid)}]
    runs.add_examples(path, {"a": runs.picture(*size)}, images=images)
    prof = LayerProfile.load(path)
    return prof, classify_sinks(prof, tau=synthetic.TAU)


#: Grid, tiles, thumbnail, picture: square, not square, tiles with a thumbnail.
SHAPES = [
    ((4, 4), (1, 1), False, (120, 120)),
    ((2, 8), (1, 1), False, (160, 40)),
    ((2, 2), (1, 3), True, (180, 60)),
    ((2, 2), (2, 2), False, (80, 80)),
]


class TestOverlays:
    @pytest.mark.parametrize(("grid", "tile_grid", "thumbnail", "size"), SHAPES)
    def test_every_value_lies_on_its_place(
        self, tmp_path: Path, grid: Any, tile_grid: Any, thumbnail: bool, size: Any
    ) -> None:
        prof, sinks = written(tmp_path / "run", grid, tile_grid, thumbnail, size)
        (example,) = read_examples(tmp_path / "run")
        tables = overlay_tables(prof, example, tmp_path / "run" / "examples", sinks, [1, 2])
        figure = overlays(tables)
        save(figure, tmp_path / "figure")
        own = prof.tokens.query("sample == 'a' and layer == 2 and kind == 'visual'")
        ways = [(own[own["tile"] >= 0], tile_grid)]
        if thumbnail:
            ways.append((own[own["tile"] < 0], (1, 1)))
        rows = {
            (axes.get_ylabel().splitlines()[0], axes.get_ylabel().splitlines()[-1]): at
            for at, axes in enumerate(figure.axes)
            if axes.get_ylabel()
        }
        for tokens, tiles in ways:
            values = np.full((grid[0] * tiles[0], grid[1] * tiles[1]), np.nan)
            for token in tokens.itertuples():  # by hand
                tile = max(token.tile, 0)
                values[tile // tiles[1] * grid[0] + token.row, tile % tiles[1] * grid[1] + token.col] = (
                    token.contribution
                )
            where = "thumbnail" if tiles != tile_grid else f"{tiles[0]} × {tiles[1]} tiles"
            where = "(L2 norm)" if tile_grid == (1, 1) else where
            panel = figure.axes[rows["Contribution", where] + 1]  # beside that of layer 1
            shown = np.asarray(panel.images[1].get_array())
            # Tiles and thumbnail are on one scale.
            wanted = 0.3 + 0.48 * np.sqrt(values / own["contribution"].max())
            np.testing.assert_allclose(shown[..., 3], wanted, rtol=1e-5)
            assert f"max {values.max():.2g}" in [text.get_text() for text in panel.texts]
        titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
        assert titles == ["Image", "Layer 1", "Layer 2"]
        sinks_of = {where for what, where in rows if what == "Sinks"}
        assert len(sinks_of) == 1  # a row for where the sinks are, and none for where none is
        said = words(figure)
        assert "16 visual tokens per layer" in said
        assert "1 sink at τ = 10" in said
        assert "Removal effect: not in this profile" in said
        assert "what is a?" in said

    def test_sinks_are_outlined_where_they_are(self, tmp_path: Path) -> None:
        prof, sinks = written(tmp_path / "run", (2, 8), (1, 1), False, (160, 40))
        (example,) = read_examples(tmp_path / "run")
        figure = overlays(overlay_tables(prof, example, tmp_path / "run" / "examples", sinks, [2]))
        boxes = [patch for axes in figure.axes for patch in axes.patches]
        assert len(boxes) == 1
        # Position 3 is the third token: row 0, column 2, 20 x 20 pixels each.
        assert (boxes[0].get_x(), boxes[0].get_y(), boxes[0].get_width(), boxes[0].get_height()) == (
            39.5,
            -0.5,
            20,
            20,
        )
        assert colors.to_hex(boxes[0].get_edgecolor()) == ROLES["dump"][0].lower()

    def test_removal_effect_and_no_sinks(self, tmp_path: Path) -> None:
        prof, _ = written(tmp_path / "run", (4, 4), (1, 1), False, (60, 60))
        (example,) = read_examples(tmp_path / "run")
        none = classify_sinks(prof, tau=30)
        tables = overlay_tables(prof, example, tmp_path / "run" / "examples", none, [3])
        assert "removal_effect" not in tables["tokens"]
        tables["tokens"]["removal_effect"] = 2 * tables["tokens"]["contribution"]
        said = words(overlays(tables))
        assert "Removal effect\n(L2 norm)" in said
        assert "not in this profile" not in said
        assert "no sinks at τ = 30 in the layers shown" in said
        unknown = overlay_tables(prof, example, tmp_path / "run" / "examples", None, [3])
        assert "sinks were not classified" in words(overlays(unknown))

    def test_the_entry_takes_the_example_with_most_sinks(self, tmp_path: Path) -> None:
        path = tmp_path / "run"
        runs.write(path)
        runs.add_examples(path, {name: runs.picture() for name in "cab"})
        prof = LayerProfile.load(path)
        found = classify_sinks(prof, tau=synthetic.TAU)
        entry = next(entry for entry in PROFILE_ENTRIES if entry.name == "overlays")
        tables = entry.select(Source({"sinks": found}, path, prof, {}))
        assert tables["picture"]["sample"].tolist() == ["b"]
        assert 2 in tables["tokens"]["layer"].tolist()  # the layer with most sinks
        entry.draw({"made-up": tables})
        with pytest.raises(CapaProbeError, match="keeps no examples"):
            entry.select(Source({}, tmp_path, prof, {}))

    def test_what_has_no_place(self, tmp_path: Path) -> None:
        prof, sinks = written(tmp_path / "run", (4, 4), (1, 1), False, (60, 60))
        (example,) = read_examples(tmp_path / "run")
        folder = tmp_path / "run" / "examples"
        tables = overlay_tables(prof, example, folder, sinks, [2])
        with pytest.raises(CapaProbeError, match="do not match"):
            overlays(tables | {"picture": tables["picture"].assign(grid_rows=2)})
        with pytest.raises(CapaProbeError, match="lacks the columns role"):
            overlays(tables | {"tokens": tables["tokens"].drop(columns="role")})
        (folder / "0-0.png").write_bytes(b"no image")
        with pytest.raises(CapaProbeError, match=r"0-0\.png of the example is missing or cannot be read"):
            overlay_tables(prof, example, folder, sinks, [2])

    def test_layers(self) -> None:
        assert overlay_layers(8) == [0, 2, 5, 7]
        assert overlay_layers(3) == [0, 1, 2]
        assert overlay_layers(1) == [0]
        assert overlay_layers(32, pd.DataFrame({"layer": [12, 12, 30]})) == [0, 12, 21, 31]


class TestPatches:
    def test_layouts_and_spread(self) -> None:
        tokens = pd.DataFrame(
            {
                "position": range(6),
                "image": [0] * 5 + [1],
                "tile": [0, 1, 0, 1, -1, 0],
                "row": 0,
                "col": [0, 0, 1, 1, 0, 0],
            }
        )
        tiles, thumbnail = layouts(tokens, 0, (1, 2), (2, 1))
        assert (tiles.label, thumbnail.label) == ("2 × 1 tiles", "thumbnail")
        assert tiles.spread(np.arange(6), -1).tolist() == [[0, 2], [1, 3]]
        spread = thumbnail.spread(np.arange(6))
        assert spread[0, 0] == 4
        assert np.isnan(spread[0, 1])
        with pytest.raises(CapaProbeError, match="not known where"):
            layouts(tokens, 2, (1, 2), (2, 1))
        with pytest.raises(CapaProbeError, match="not known where"):
            layouts(tokens, 0, None, None)
        with pytest.raises(CapaProbeError, match="do not match"):
            layouts(tokens, 0, (1, 1), (2, 1))


class TestSeveralModels:
    def test_norms(self, prof: LayerProfile, sinks: pd.DataFrame) -> None:
        tables = norm_summary(prof.layers, sinks)
        figure = norms_compared({"one": tables, "two": tables})
        assert len(figure.axes) == 10
        assert "one: 8 samples with 128 visual tokens and 48 text tokens" in words(figure)

    def test_too_many(self, sinks: pd.DataFrame) -> None:
        tables = split_tables(sinks)
        with pytest.raises(CapaProbeError, match="7 models were given"):
            sink_split({str(number): tables for number in range(7)})

    def test_every_entry_draws_what_it_selects(
        self, prof: LayerProfile, sinks: pd.DataFrame, tmp_path: Path
    ) -> None:
        for entry in PROFILE_ENTRIES:
            if entry.name == "overlays":
                continue  # above, since it takes a folder
            tables = entry.select(source(prof, sinks))
            # As the set keeps them: through a file, without attributes.
            kept = {}
            for name, table in tables.items():
                table.to_parquet(tmp_path / f"{name}.parquet")
                kept[name] = pd.read_parquet(tmp_path / f"{name}.parquet")
            assert words(entry.draw({"m": tables})) == words(entry.draw({"m": kept}))
            with pytest.raises(CapaProbeError):
                entry.select(Source({}, None, None, {"eta": 0.96}))


#: Machado, Oliveira and Fernandes (2009), severity 1: linear RGB as seen without one kind of cone.
BLIND = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as someone sees it."""
    rgb = np.array(colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(seen @ linear, 0, 1)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) / np.array([[0.95047], [1.0], [1.08883]])
    xyz = to_xyz @ linear
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


class TestPalette:
    @pytest.mark.parametrize("seen", BLIND)
    @pytest.mark.parametrize("group", ["roles", "kinds", "scores", "methods", "ffn", "stages", "runs"])
    def test_what_stands_together_can_be_told_apart(self, group: str, seen: str) -> None:
        groups = {
            "roles": {role: colour for role, (colour, _) in ROLES.items()} | {"other": FAINT},
            "kinds": {"visual": VISUAL, "text": TEXT},
            "scores": {name: look.colour for name, look in style.SCORES.items()},
            "methods": {
                name: style.METHODS[name].colour
                for name in ("capa", "fastv", "vision-attention", "every_step", "random", "unpruned")
            },
            "ffn": {name: look.colour for name, look in style.FFN.items()},
            "stages": {name: look.colour for name, look in style.STAGES.items()},
            "runs": {name: look.colour for name, look in run_looks("abcdef").items()},
        }
        for (one, a), (other, b) in itertools.combinations(groups[group].items(), 2):
            distance = np.linalg.norm(lab(a, BLIND[seen]) - lab(b, BLIND[seen]))
            # 2.3 is what can just be seen side by side; far apart on a figure takes several times as much.
            assert distance > 10, f"{one} and {other}: {distance:.1f}"

    def test_looks_are_unique_and_stay(self) -> None:
        assert len(set(style.TASKS.values())) == len(style.TASKS)
        assert len({look.marker for look in style.SCORES.values()}) == len(style.SCORES)
        assert style.METHODS["capa"] == style.METHODS["contribution"]
        one = task_looks(["chain", "mine", "yours"])
        other = task_looks(["yours", "color", "mine", "chain"])
        assert {name: other[name] for name in one} == one
        assert one["chain"] == style.TASKS["chain"]
        many = task_looks(f"task {number}" for number in range(40))
        assert len(set(many.values())) == 40
        with pytest.raises(CapaProbeError, match="0 models were given; give 1 to 6"):
            run_looks([])


def test_pictures_are_kept_small(tmp_path: Path) -> None:
    prof, sinks = written(tmp_path / "run", (4, 4), (1, 1), False, (60, 60))
    Image.fromarray(np.zeros((900, 1200, 3), np.uint8)).save(tmp_path / "run" / "examples" / "0-0.png")
    (example,) = read_examples(tmp_path / "run")
    tables = overlay_tables(prof, example, tmp_path / "run" / "examples", sinks, [2])
    (tmp_path / "kept.png").write_bytes(tables["picture"]["png"].iloc[0])
    with Image.open(tmp_path / "kept.png") as kept:
        assert kept.size == (320, 240)


def test_the_strongest_token_is_not_one_of_an_offset() -> None:
    everywhere = tuple(Planted(sample, 2, place, 33, phi=20) for sample in SAMPLES for place in range(1, 17))
    world = World(samples=SAMPLES, n_layers=4, sinks=(*everywhere, Planted("a", 3, 4, 40, phi=9)))
    prof = synthetic.profile(world)
    with pytest.warns(UserWarning, match="offsets rather than sink dimensions"):
        none = classify_sinks(prof, tau=synthetic.TAU)
    assert none.empty
    entry = next(entry for entry in PROFILE_ENTRIES if entry.name == "sink_split")
    said = words(entry.draw({"made-up": entry.select(source(prof, none))}))
    assert "outside offset dimensions: 9 (layer 3)" in said

"""In bfloat16 a profile is as exact as rounded activations allow; the same from bfloat16 eager attention is not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import measure_precision
import pandas as pd
import pytest
import torch
from precision_runs import COLUMNS, build, make_inputs, rounded
from transformers import LlavaForConditionalGeneration

import capa_probe as cp
from capa_probe.schema import MEASURES
from tests import tiny
from tests.invariances.comparing import assert_same, profiled, worst_difference

SMALL: dict[str, Any] = {"width": 64, "layers": 4}
#: Unit roundoff of bfloat16: 8 significant bits.
ROUNDOFF = 2.0**-8
PROJECTED = ("contribution", "removal_effect")


@pytest.fixture(scope="module")
def errors() -> pd.DataFrame:
    """Of small models, over four seeds: one row per offset, column and way."""
    results = measure_precision.measure((0, 30, 300), (0, 1, 2, 3), **SMALL)
    return pd.DataFrame(results["rows"]).set_index(["offset", "column", "way"])


def test_no_column_is_left_out() -> None:
    others = {f"sink_strength_{rank}" for rank in (2, 3, 4)}
    assert set(COLUMNS) | others == set(MEASURES)


@pytest.mark.parametrize("offset", [0, 30, 300])
@pytest.mark.parametrize("column", COLUMNS)
def test_errors_are_no_larger_than_rounding_of_activations_explains(
    errors: pd.DataFrame, column: str, offset: int
) -> None:
    own, unavoidable, eager = (errors.loc[(offset, column, way)] for way in measure_precision.WAYS)
    for quantile in ("error_median", "error_p95"):
        assert own[quantile] <= 1.35 * unavoidable[quantile]
    assert eager["error_median"] > own["error_median"]


@pytest.mark.parametrize("offset", [0, 30, 300])
@pytest.mark.parametrize("column", COLUMNS)
def test_computing_alone_adds_no_rounding_of_bfloat16(errors: pd.DataFrame, column: str, offset: int) -> None:
    """Attention logits have the rounding of float32 at their size; the projection runs in the model's dtype."""
    own = errors.loc[(offset, column, "capa_probe"), "own_p95"]
    if column in PROJECTED:
        assert (
            own <= ROUNDOFF / 2
        )  # once, and on the average over heads; rounded before that too, it would be more
    elif column.startswith("attention"):
        assert own <= max(10, 4 * offset) * 2.0**-24
    else:
        assert own <= 10 * 2.0**-24


def test_the_error_of_computing_in_bfloat16_eager_attention(errors: pd.DataFrame) -> None:
    """On the same activations: a rounding at least, and where logits share an offset, most of the digits."""
    for column in COLUMNS:
        assert errors.loc[(0, column, "eager"), "own_median"] > 0.25 * ROUNDOFF
    attention = errors.xs("attention", level="column")
    own = {offset: attention.loc[(offset, "eager"), "own_median"] for offset in (0, 30, 300)}
    assert own[0] < 0.003 < 0.01 < own[30] < 0.06 < 0.1 < own[300]
    for offset, error in own.items():
        assert error > 1e4 * attention.loc[(offset, "capa_probe"), "own_median"]


def test_the_offset_is_one_that_the_softmax_does_not_see() -> None:
    """In float32 the model's attention is the same with and without, so that the trial is one of rounding alone."""
    tables = []
    for offset in (0, 30):
        model = build(offset, **SMALL).double()
        inputs = make_inputs(model)
        inputs["pixel_values"] = inputs["pixel_values"].double()
        tables.append(profiled(cp.HookedLVLM(model), [inputs]))
        scores = []
        with torch.no_grad(), cp.HookedLVLM(model).attention_calls(scores.append, layers=[1]):
            model(**inputs)
        call = scores[0]
        logits = call.scaling * call.query[0, 0, -1] @ call.key[0, 0].T
        assert abs(float(logits.mean()) - offset) < 1
        assert 0.3 < float(logits.std()) < 3
    # The one dimension turns a little, by 2e-3 over 60 positions, and so mixes with its pair.
    worst = worst_difference(*tables)
    assert max(worst["attention"], worst["contribution"], worst["resid_mid_norm"]) < 0.02


def test_rounding_is_to_the_nearest_bfloat16_and_reaches_every_activation() -> None:
    x = torch.linspace(-3, 3, 1001)
    assert float(((rounded(x) - x).abs() / x.abs().clamp(min=1e-6)).max()) <= ROUNDOFF
    assert math.isclose(float(rounded(torch.tensor(1 + 3 * 2.0**-9))), 1 + 2.0**-7)


def test_a_bfloat16_model_gives_the_same_rows_in_any_batch() -> None:
    """Nothing of a batch enters a row but what the backend's own kernels round differently."""
    model = build(0, **SMALL).bfloat16()
    inputs = make_inputs(model)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    twice = {name: torch.cat([x, x]) for name, x in inputs.items()}
    lvlm = cp.HookedLVLM(model)
    alone, pair = profiled(lvlm, [inputs]), profiled(lvlm, [twice])
    halves = [pair[pair["sample"] == name].reset_index(drop=True).assign(sample="0") for name in "01"]
    assert_same(halves[1], halves[0], tolerance=0)
    for name in ("attention", "contribution", "resid_mid_norm"):
        one, other = (torch.tensor(table[name].to_numpy()) for table in (halves[0], alone))
        torch.testing.assert_close(one, other, rtol=0.05, atol=1e-4)


def test_how_a_model_comes_to_bfloat16(tmp_path: Path) -> None:
    """Cast as a whole it has other rotary frequencies; loaded in bfloat16 it has those of its config."""
    model = tiny.build("llava")
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wanted = model.model.language_model.rotary_emb.inv_freq.clone()
    own, cast = (each.model.language_model.rotary_emb.inv_freq for each in (loaded, model.to(torch.bfloat16)))
    assert torch.equal(own, wanted)
    assert cast.dtype == torch.bfloat16
    assert not torch.equal(cast.float(), own)


def test_the_docs_show_what_was_measured() -> None:
    results = json.loads(measure_precision.RESULTS.read_text(encoding="utf-8"))
    page = measure_precision.PAGE.read_text(encoding="utf-8")
    assert measure_precision.table(results) in page
    assert f"](images/{measure_precision.FIGURE.name})" in page
    assert Path(measure_precision.FIGURE).stat().st_size > 10_000
    drawn = measure_precision.draw(results)
    left, right = drawn.axes
    assert [label.get_text() for label in left.get_yticklabels()] == list(COLUMNS)
    assert len(right.lines) == 6
    rows = pd.DataFrame(results["rows"]).set_index(["offset", "column", "way"])
    medians = {way: rows.xs(way, level="way")["error_median"] for way in measure_precision.WAYS}
    above = (medians["capa_probe"] / medians["rounding"]).groupby("offset").max()
    eager = (medians["eager"] / medians["capa_probe"]).loc[measure_precision.SHOWN]
    cosines = {name: eager.pop(name) for name in ("ffn_cosine", "attn_cosine")}
    assert set(above.index) == set(measure_precision.OFFSETS)
    shown = (above[measure_precision.SHOWN] - 1, above.max() - 1)
    assert f"at most {shown[0]:.0%} above".replace("%", " %") in page
    assert f"({shown[1]:.0%} over all".replace("%", " %") in " ".join(page.split())
    assert (eager.idxmin(), f"{eager.min():.1f}", f"{eager.max():.0f}") == ("sink_strength", "1.5", "5")
    assert [f"{factor:.0f}" for factor in cosines.values()] == ["18", "31"]

"""Every column of a profile against loops over eager float32 attention (``tests.oracles.loops``)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

import capa_probe as cp
from capa_probe.lvlm.inputs import LVLMInputs
from capa_probe.probes import attention, recorder
from capa_probe.schema import MEASURES
from tests import tiny
from tests.oracles import compare, loops, models
from tests.oracles.prompts import Prompt, batch, write
from tests.oracles.worst import LAYOUTS, STEPS, profile

#: Agreement that the documentation promises, relative, in float32.
TOLERANCE = 1e-5


class Case(NamedTuple):
    family: str
    prompts: list[Prompt]
    tokens: list[loops.Row]

    def inputs(self, padding_side: str = "left") -> LVLMInputs:
        return batch(self.family, self.prompts, padding_side)

    def lvlm(self, attn: str = "sdpa") -> cp.HookedLVLM:
        return cp.HookedLVLM(models.build(self.family, attn))


@pytest.fixture(scope="module", params=tiny.FAMILY_NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    family = request.param
    prompts = [write(family, layout, seed) for seed, layout in enumerate(LAYOUTS)]
    return Case(family, prompts, loops.table(models.build(family, "eager"), family, prompts, STEPS))


@pytest.mark.parametrize(("attn", "remembered"), [("sdpa", True), ("sdpa", False), ("eager", True)])
def test_prefill_and_decode_steps(
    case: Case, attn: str, remembered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with what long generations keep from step to step, instead of computing it anew."""
    monkeypatch.setattr(recorder, "STEPS_TO_REMEMBER", 1 if remembered else STEPS + 1)
    prof = profile(case.lvlm(attn), [case.inputs()], STEPS)
    far = compare.agree(prof.tokens, case.tokens, TOLERANCE)
    assert set(far) == set(prof.tokens.columns)
    far = compare.agree(prof.layers, loops.summary(case.tokens, MEASURES), TOLERANCE)
    assert set(far) == set(prof.layers.columns)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_on_its_own_keeps_no_cache_and_pads_on_either_side(
    case: Case, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_CHUNK", 3)  # several chunks, the last one shorter
    tokens = profile(case.lvlm(), [case.inputs(side)]).tokens
    compare.agree(tokens, [row for row in case.tokens if row["step"] == 0], TOLERANCE)


def test_one_sample_at_a_time(case: Case) -> None:
    inputs = [batch(case.family, [prompt]) for prompt in case.prompts]
    compare.agree(profile(case.lvlm(), inputs, steps=STEPS).tokens, case.tokens, TOLERANCE)


def test_sink_strength_over_chosen_dimensions(case: Case) -> None:
    """Three dimensions for four columns, so that the last one does not apply."""
    dims = (3, 17, 29)
    prompts = case.prompts[:1]
    wanted = loops.table(models.build(case.family, "eager"), case.family, prompts, 1, dims)
    tokens = profile(case.lvlm(), [batch(case.family, prompts)], steps=1, sink_dims=dims).tokens
    # The least of three coordinates may be nearly zero; phi is compared on the scale of the whole vector, which is 1.
    compare.agree(tokens, wanted, TOLERANCE, (*compare.ABSOLUTE, "sink_strength"))
    assert set(tokens["sink_dim"]) == {-1, *dims}
    assert tokens["sink_strength_4"].isna().all()


def test_a_sample_ends_at_its_stop_token(case: Case) -> None:
    """The oracle writes its own tokens, one argmax at a time; a sample has no step for a stop token."""
    lvlm, eager = case.lvlm(), models.build(case.family, "eager")
    inputs = case.inputs()
    ids = lvlm.model.generate(**inputs, max_new_tokens=STEPS + 1, do_sample=False)
    stop = int(ids[1, inputs["input_ids"].shape[1] + 1])  # the second token of the second sample
    lvlm.model.generation_config.eos_token_id = eager.generation_config.eos_token_id = stop
    wanted = loops.table(eager, case.family, case.prompts, STEPS)
    tokens = profile(lvlm, [inputs], steps=STEPS).tokens
    compare.agree(tokens, wanted, TOLERANCE)
    assert tokens.groupby("sample")["step"].max()["1"] < STEPS


def test_the_oracle_says_something_in_every_column(case: Case) -> None:
    """Numbers that differ from token to token, so that a constant or a shifted column would not agree."""
    rows = pd.DataFrame(case.tokens)
    for step, layer in ((0, 0), (0, 3), (STEPS, 2)):
        own = rows[(rows["sample"] == "1") & (rows["step"] == step) & (rows["layer"] == layer)]
        for name in MEASURES:
            values = own[name].dropna()
            everywhere = step == 0 or name in ("attention", "contribution", "removal_effect", "value_norm")
            assert len(values) == (len(own) if everywhere else name != "attention_text"), name
            if everywhere:
                assert values.std() > 1e-4 * abs(values.mean()), name
                assert values.nunique() > len(values) / 2, name
    assert not np.allclose(
        rows["attention"], 1 / rows.groupby(["sample", "step"])["position"].transform("max"), 0.5
    )


def test_the_comparison_sees_every_column_of_every_row(case: Case) -> None:
    """A number that is off by twice the tolerance, in any column, is not let through."""
    wanted = [row for row in case.tokens if row["step"] == 0]
    exact = pd.DataFrame(wanted)
    assert set(compare.agree(exact, wanted, 0.0)) == set(exact.columns)
    row = len(exact) // 2
    for name in exact.columns:
        wrong = exact.copy()
        value = exact.loc[row, name]
        if isinstance(value, str):
            wrong.loc[row, name] = "other"
        elif name in MEASURES:
            scale = (
                1
                if name in compare.ABSOLUTE
                else exact.loc[row, compare.OF]
                if name == compare.DIFFERENCE
                else 0
            )
            wrong.loc[row, name] = value + 2 * TOLERANCE * max(abs(value), scale)
        else:
            wrong.loc[row, name] = value + 1
        with pytest.raises(AssertionError):
            compare.agree(wrong, wanted, TOLERANCE)

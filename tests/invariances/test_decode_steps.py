"""A decode step with its KV cache measures what a fresh prefill over the prompt and the same tokens measures."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import capa_probe as cp
from capa_probe.probes import recorder
from tests import tiny
from tests.invariances import towers
from tests.invariances.comparing import MEASURED, TOLERANCE, assert_same, in_dtype, profiled

STEPS = 3
#: Filled for every key; the other columns only in the query's own row, attention_text at no decode step.
OF_KEYS = ("attention", "contribution", "removal_effect", "value_norm")


@pytest.fixture(autouse=True)
def _few_steps_are_enough_to_remember_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a long generation, where contributions are not computed anew at every step."""
    monkeypatch.setattr(recorder, "STEPS_TO_REMEMBER", 1)


def longer(inputs: dict[str, Tensor], ids: Tensor, step: int) -> dict[str, Tensor]:
    """The prompt with the first generated tokens written after it."""
    n_prompt = inputs["input_ids"].shape[1]
    ones = torch.ones(len(ids), step, dtype=torch.long)
    new = {"attention_mask": ones, "mm_token_type_ids": 0 * ones.int()}
    grown = {name: torch.cat([inputs[name], x], dim=1) for name, x in new.items() if name in inputs}
    return {**inputs, **grown, "input_ids": ids[:, : n_prompt + step]}


def as_a_step(prefill: pd.DataFrame, step: int) -> pd.DataFrame:
    """The rows of a prefill with what a decode step does not fill taken out."""
    table = prefill.assign(step=step).astype({"step": prefill["step"].dtype})
    query = table.groupby(["sample", "layer"])["position"].transform("max") == table["position"]
    for name in MEASURED:
        if name == "attention_text":
            table[name] = float("nan")
        elif name not in OF_KEYS:
            table[name] = table[name].where(query, -1 if name.startswith("sink_dim") else float("nan"))
    return table


def check(model: PreTrainedModel, inputs: dict[str, Tensor], tolerance: float) -> None:
    model.generation_config.suppress_tokens = [tiny.IMAGE]  # a prompt with one more would lack its image
    lvlm = cp.HookedLVLM(model)
    stepped = profiled(lvlm, [inputs], steps=STEPS)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=STEPS + 1, do_sample=False)
    assert set(stepped["step"]) == set(range(STEPS + 1))
    for step in range(STEPS + 1):
        found = stepped[stepped["step"] == step].reset_index(drop=True)
        fresh = profiled(lvlm, [longer(inputs, ids, step)])
        assert_same(found, as_a_step(fresh, step) if step else fresh, tolerance)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_each_family(family: str, attn: str) -> None:
    model = tiny.build(family, attn=attn)
    model.generation_config.eos_token_id = None
    check(model, tiny.inputs(family), TOLERANCE)


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_in_float64_nothing_is_left_but_the_rounding_of_the_table(family: str) -> None:
    model = tiny.build(family).double()
    model.generation_config.eos_token_id = None
    check(model, in_dtype(tiny.inputs(family), torch.float64), 1e-6)


@pytest.mark.parametrize("name", towers.MEASURED)
def test_other_towers(name: str) -> None:
    """Also where a sliding window's cache has dropped the keys that a fresh prefill still has."""
    check(towers.build(name), tiny.inputs("llava"), TOLERANCE)


def test_a_static_cache() -> None:
    model = tiny.build("llava")
    model.generation_config.eos_token_id = None
    model.generation_config.cache_implementation = "static"
    check(model, tiny.inputs("llava"), TOLERANCE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_sliding_window_wider_than_the_prompt_fills_while_decoding(cache: str) -> None:
    """The window passes its first key at the second step, not before; a static cache then writes over its values."""
    inputs = tiny.inputs("llava", images=(0, 0), tail=(4, 3))
    n_prompt = inputs["input_ids"].shape[1]
    model = towers.build("mistral, sliding windows")
    model.generation_config.cache_implementation = cache
    config = model.config.text_config
    config.sliding_window = n_prompt + 1
    for layer in model.model.language_model.layers:
        layer.self_attn.sliding_window = n_prompt + 1
    check(model, inputs, TOLERANCE)
    tokens = profiled(cp.HookedLVLM(model), [inputs], steps=STEPS)
    first = tokens[(tokens["sample"] == "0") & (tokens["position"] == 0) & (tokens["layer"] == 2)]
    hidden = (first.sort_values("step")["attention"] == 0).tolist()
    assert hidden == [False, False, True, True]


@pytest.mark.parametrize("steps", [16, 17, 33])
def test_steps_measured_together_are_those_measured_one_by_one(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny.build("llava"), tiny.inputs("llava")
    model.generation_config.eos_token_id = None
    lvlm = cp.HookedLVLM(model)
    together = profiled(lvlm, [inputs], steps=steps)
    query = together.groupby(["sample", "step", "layer"]).tail(1)
    assert len(query) == len(inputs["input_ids"]) * (steps + 1) * lvlm.n_layers
    assert query.drop(columns="attention_text").notna().all(axis=None)
    monkeypatch.setattr(recorder, "STEPS_AT_ONCE", 1)
    monkeypatch.setattr(recorder, "STEPS_TO_REMEMBER", steps + 1)
    assert_same(together, profiled(lvlm, [inputs], steps=steps))


def test_answers_that_end_while_steps_wait() -> None:
    """Samples of a batch end at different steps, all of them before those that wait would be measured together."""
    model, inputs = tiny.build("llava"), tiny.inputs("llava")
    config, lvlm = model.generation_config, cp.HookedLVLM(model)
    config.no_repeat_ngram_size, config.suppress_tokens, config.eos_token_id = 1, [tiny.IMAGE], None
    whole = profiled(lvlm, [inputs], steps=14)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=14, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    config.eos_token_id = [int(ids[0, 4]), int(ids[1, 8]), int(ids[2, 11])]
    ends = torch.isin(ids, torch.tensor(config.eos_token_id)).int().argmax(dim=1).tolist()
    assert 0 < min(ends) < max(ends) < 14
    ended = profiled(lvlm, [inputs], steps=14)
    wanted = whole[whole["step"] <= whole["sample"].astype(int).map(dict(enumerate(ends)))]
    assert_same(ended, wanted.reset_index(drop=True))

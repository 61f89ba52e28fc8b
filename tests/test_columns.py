"""The token table against itself: decode against prefill, padding, stop tokens. ``tests/oracles`` has the numbers."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

import capa_probe as cp
from tests import tiny


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_decode_steps_equal_a_longer_prefill(family: str) -> None:
    """Step t of a profile with the KV cache equals the prefill of the prompt with t generated tokens appended."""
    model = tiny.build(family)
    model.generation_config.eos_token_id = None
    lvlm = cp.HookedLVLM(model)
    inputs = tiny.inputs(family)
    stepped = cp.profile(lvlm, [inputs], steps=3, rows="all", probes="all", progress=False).tokens
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    n_prompt = inputs["input_ids"].shape[1]
    for step in (1, 3):
        longer = dict(inputs)
        longer["input_ids"] = ids[:, : n_prompt + step]
        ones = torch.ones(3, step, dtype=torch.long)
        longer["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
        if "mm_token_type_ids" in longer:
            longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * ones.int()], dim=1)
        prefill = cp.profile(lvlm, [longer], probes="all", progress=False).tokens
        rows = stepped[stepped["step"] == step].reset_index(drop=True)
        assert len(rows) == len(prefill)
        for column in ("attention", "contribution", "removal_effect", "value_norm"):
            np.testing.assert_allclose(rows[column], prefill[column], rtol=2e-4, atol=1e-6, err_msg=column)
        last = rows.groupby(["sample", "layer"])["position"].transform("max") == rows["position"]
        for column in ("resid_pre_norm", "ffn_cosine", "attn_update_norm", "sink_strength_3"):
            np.testing.assert_allclose(rows.loc[last, column], prefill.loc[last, column], rtol=2e-4)
            assert rows.loc[~last, column].isna().all()
        assert rows["attention_text"].isna().all()
        assert (rows.loc[~last, "sink_dim"] == -1).all()


def test_steps_stop_at_the_stop_token() -> None:
    model = tiny.build("llava")
    inputs = tiny.inputs("llava")
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)[
            :, inputs["input_ids"].shape[1] :
        ]
    stop = int(generated[1, 2])
    model.generation_config.eos_token_id = stop
    tokens = cp.profile(cp.HookedLVLM(model), [inputs], steps=5, rows="all", progress=False).tokens
    for sample in range(3):
        hits = (generated[sample] == stop).nonzero().flatten().tolist()
        wanted = min([5, *hits])
        assert tokens.loc[tokens["sample"] == str(sample), "step"].max() == wanted


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_batch_composition_and_padding_do_not_matter(family: str) -> None:
    lvlm = cp.HookedLVLM(tiny.shared(family))
    left = cp.profile(lvlm, [tiny.inputs(family)], progress=False).tokens
    right = cp.profile(lvlm, [tiny.inputs(family, padding_side="right")], progress=False).tokens
    pd.testing.assert_frame_equal(left, right, rtol=2e-4, atol=2e-6)


def test_attention_over_a_sample_sums_to_one() -> None:
    tokens = cp.profile(cp.HookedLVLM(tiny.shared("llava")), [tiny.inputs("llava")], progress=False).tokens
    totals = tokens.groupby(["sample", "layer"])[["attention", "attention_text"]].sum(min_count=1)
    np.testing.assert_allclose(totals["attention"], 1, rtol=1e-5)
    assert totals["attention_text"].map(lambda x: math.isnan(x) or abs(x - 1) < 1e-5).all()


def test_sink_strength_over_given_dimensions_is_exact() -> None:
    lvlm = cp.HookedLVLM(tiny.shared("llava"))
    inputs = tiny.inputs("llava")
    tokens = cp.profile(lvlm, [inputs], sink_dims=[3, 17], progress=False).tokens
    _, cache = lvlm.run_with_cache(**inputs, names_filter="blocks.2.hook_resid_pre")
    x = cache["blocks.2.hook_resid_pre"][0, inputs["attention_mask"][0].bool()]
    phi = (x / (x.pow(2).mean(-1, keepdim=True) + lvlm.norm_eps).sqrt()).abs()[:, [3, 17]]
    rows = tokens[(tokens["sample"] == "0") & (tokens["layer"] == 2)]
    np.testing.assert_allclose(rows["sink_strength"], phi.amax(-1), rtol=1e-5)
    np.testing.assert_allclose(rows["sink_strength_2"], phi.amin(-1), rtol=1e-5)
    assert set(rows["sink_dim"]) | set(rows["sink_dim_2"]) == {3, 17}
    assert rows["sink_strength_3"].isna().all()

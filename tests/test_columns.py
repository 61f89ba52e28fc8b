"""The token table against itself: stop tokens, sums, given dimensions.

``tests/oracles`` has the numbers, ``tests/invariances`` what must not change them.
"""

from __future__ import annotations

import math

import numpy as np
import torch

import capa_probe as cp
from tests import tiny


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

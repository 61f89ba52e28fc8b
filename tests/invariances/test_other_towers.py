"""Sliding windows, normed queries and keys, soft-capping: other towers than Llama are measured right, or refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2Model,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen3Config,
)

import capa_probe as cp
from capa_probe.lvlm import tap
from tests import reference, tiny
from tests.invariances import towers
from tests.invariances.comparing import MEASURED as MEASURED_COLUMNS
from tests.invariances.comparing import TOLERANCE, assert_same, profiled
from tests.oracles import compare
from tests.oracles.columns import Row

MEASURED = pytest.mark.parametrize("name", towers.MEASURED)


@pytest.fixture(scope="module", params=towers.MEASURED)
def tower(request: pytest.FixtureRequest) -> tuple[str, list[Row]]:
    """The name of a tower, and its columns worked out in loops over its own eager attention."""
    return request.param, reference.prefill(towers.build(request.param, "eager"), tiny.inputs("llava"))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_every_column_of_a_prefill_equals_loops_over_eager_attention(
    tower: tuple[str, list[Row]], attn: str
) -> None:
    name, wanted = tower
    tokens = profiled(cp.HookedLVLM(towers.build(name, attn)), [tiny.inputs("llava")])
    far = compare.agree(tokens[list(wanted[0])], wanted, TOLERANCE)
    assert set(MEASURED_COLUMNS) < set(far)


@pytest.mark.parametrize("name", [name for name in towers.MEASURED if "sliding" in name])
def test_windows_are_windows(name: str) -> None:
    """The trial is one of sliding windows: outside nothing is attended to, and removing a token there does nothing."""
    model = towers.build(name)
    tokens = profiled(cp.HookedLVLM(model), [tiny.inputs("llava")], steps=3)
    kinds = getattr(model.config.text_config, "layer_types", None) or ["sliding_attention"] * 4
    last = tokens.groupby(["sample", "step"])["position"].transform("max")
    outside = tokens["position"] <= last - towers.WINDOW
    for layer, kind in enumerate(kinds):
        rows = tokens[(tokens["layer"] == layer) & outside]
        hidden = kind == "sliding_attention"
        assert len(rows) > 100
        for column in ("attention", "contribution", "removal_effect"):
            assert (rows[column] == 0).all() == hidden
        assert (rows["value_norm"] > 0).all()
    assert "sliding_attention" in kinds


@MEASURED
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_probing_them_changes_nothing(name: str, attn: str) -> None:
    model, inputs = towers.build(name, attn), tiny.inputs("llava")
    lvlm = cp.HookedLVLM(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with lvlm.attention_calls(lambda call: None):
            assert torch.equal(model(**inputs).logits, plain)
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), ids)


@MEASURED
def test_their_rows_do_not_depend_on_the_padding(name: str) -> None:
    lvlm = cp.HookedLVLM(towers.build(name))
    one, other = (profiled(lvlm, [tiny.inputs("llava", padding_side=side)]) for side in ("left", "right"))
    assert_same(one, other)


@pytest.mark.parametrize("name", towers.REFUSED)
def test_towers_that_would_be_measured_wrongly_are_refused_by_name(name: str) -> None:
    with pytest.raises(cp.CapaProbeError, match=towers.REFUSED[name][2]) as error:
        cp.HookedLVLM(towers.build(name))
    assert "\n" not in str(error.value)


def test_granite_without_its_factor_is_measured() -> None:
    model = towers.build("granite")
    for layer in model.model.language_model.layers:
        layer.residual_multiplier = 1.0
    profiled(cp.HookedLVLM(model), [tiny.inputs("llava")])


def test_soft_capping_that_reaches_the_tap_is_refused_and_nothing_stays() -> None:
    """However a tower came to it: the argument itself is refused, wherever somebody listens."""
    sizes = {**tiny.TEXT, "head_dim": 8}
    model = Gemma2Model(Gemma2Config(**sizes, attn_implementation="eager")).eval()
    ids, seen = torch.arange(3, 12)[None], []

    class Listener:
        def on_call(self, call: tap.AttentionCall) -> tap.AttentionCall:
            seen.append(call)
            return call

    listener, attention = Listener(), model.layers[1].self_attn
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        tap.listen(model, attention, 1, listener)
        try:
            with pytest.raises(cp.CapaProbeError, match="Gemma2Attention passes softcap to its attention"):
                model(ids)
        finally:
            tap.unlisten(model, attention, listener)
        assert torch.equal(model(ids).last_hidden_state, plain)
    assert not seen


def test_internvl_around_qwen3_as_in_internvl_3_5() -> None:
    small = tiny.build("internvl").config
    text = Qwen3Config(**tiny.TEXT, head_dim=12)
    config = InternVLConfig(
        vision_config=small.vision_config, text_config=text, image_token_id=tiny.IMAGE, image_seq_length=4
    )
    models = {}
    for attn in ("sdpa", "eager"):
        torch.manual_seed(0)
        config._attn_implementation = attn
        models[attn] = InternVLForConditionalGeneration(config).eval()
    inputs = tiny.inputs("internvl")
    wanted = reference.prefill(models["eager"], inputs)
    for model in models.values():
        compare.agree(profiled(cp.HookedLVLM(model), [inputs])[list(wanted[0])], wanted, TOLERANCE)

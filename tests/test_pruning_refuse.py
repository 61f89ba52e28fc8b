"""What a pruner refuses, what it warns of, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from capa_probe.pruning import CAPA, FastV, Pruner, Random, Scoring
from capa_probe.pruning.ffn import SkipFFN
from tests import tiny
from tests.test_hooked import FAMILIES, built, state

ONE = CAPA(layers=(2,), keep=0.25)
FFN = SkipFFN((2,))
ROLES = CAPA(layers=(3,), protect_anchors=True, tau=3.0)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def wrapped() -> cp.HookedLVLM:
    return cp.HookedLVLM(tiny.shared("llava"))


class TestSettings:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"keep": 0.0}, "keep=0 was given, which leaves no visual token; say allow_none=True"),
            ({"keep": 1.2}, r"keep=1.2 was given; give a share in \(0, 1\] or a whole number"),
            ({"keep": -2}, "keep=-2 was given"),
            ({"layers": (2, 1)}, r"layers=\(2, 1\) was given; give different layers in rising order"),
            ({"layers": (1, 1)}, "different layers in rising order"),
            ({"layers": None}, r"layers=None was given; give whole numbers, such as \(5,\)"),
            ({"layers": 2.5}, "layers=2.5 was given; give whole numbers"),
            ({"layers": (1.5,)}, r"layers=\(1.5,\) was given; give whole numbers"),
            (
                {"layers": (1, 2), "keep": (0.5,)},
                r"keep=\(0.5,\) holds 1 values for the pruning layers \(1, 2\); give one for all",
            ),
            ({"layers": (1, 2), "keep": (0.25, 0.5)}, "rises from layer to layer"),
            ({"layers": (1, 2), "keep": (10, 20)}, "rises from layer to layer"),
            ({"execution": "fast"}, 'execution=\'fast\' was given; give "compact" or "masked"'),
            ({"score_at": "next"}, "score_at='next' was given"),
            ({"budget": "batch"}, "budget='batch' was given"),
            ({"positions": "new"}, "positions='new' was given"),
            ({"score": "entropy"}, "score='entropy' was given; give one of contribution, attention"),
            ({"rescore": "never"}, "rescore='never' was given"),
            ({"rescore": "every_step", "protect_anchors": True}, 'use rescore="prefill"'),
            ({"ffn": "skip"}, "ffn='skip' was given; give a HadamardFFN"),
        ],
    )
    def test_that_make_no_sense(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(CapaProbeError, match=message):
            CAPA(**{"layers": (2,), **options})

    def test_are_normalised(self) -> None:
        given: Any = ([1, 2], [0.5, 0.25])
        assert CAPA(layers=given[0], keep=given[1]) == CAPA(layers=(1, 2), keep=(0.5, 0.25))
        assert CAPA(layers=(1, 2), keep=0.25).keeps == {1: 0.25, 2: 0.25}
        one: Any = 3
        assert CAPA(layers=one).layers == (3,)

    @pytest.mark.parametrize(
        ("pruner", "message"),
        [
            (CAPA(layers=(0,)), r"layers=\(0,\) was given for a model of 4 layers; .* from 1 to 3"),
            (CAPA(layers=(2, 4)), r"layers=\(2, 4\) was given for a model of 4 layers; .* from 1 to 3"),
            (CAPA(layers=(3,), score_at="same"), 'score_at="same" give layers from 0 to 2'),
            (Random(layers=(-1,)), "give layers from 0 to 3"),
            (replace(ROLES, sink_dims=(7, 32)), r"sink_dims=\[7, 32\] was given; .* each from 0 to 31"),
            (replace(ROLES, sink_dims=()), "give at least one dimension"),
            (replace(ROLES, tau=20.0), "tau=20 can never be reached by a model of width 32"),
            (replace(ROLES, tau=-1.0), "tau=-1.0 was given; give a positive number"),
        ],
    )
    def test_what_the_model_lacks(self, pruner: Pruner, message: str) -> None:
        lvlm = wrapped()
        with pytest.raises(CapaProbeError, match=message), pruner.attach(lvlm):
            pass

    def test_more_tokens_than_there_are(self) -> None:
        lvlm, inputs = wrapped(), tiny.inputs("llava", (1,))
        with (
            FastV(layers=(2,), keep=17).attach(lvlm),
            pytest.raises(
                CapaProbeError, match="keep=17 was given, but the prompt has only 16 visual tokens"
            ),
        ):
            lvlm.model(**inputs)

    @pytest.mark.parametrize("execution", ["masked", "compact"])
    def test_more_tokens_than_one_row_or_image_has(self, execution: Any) -> None:
        lvlm, inputs = (
            cp.HookedLVLM(tiny.shared("qwen2_5_vl")),
            tiny.inputs("qwen2_5_vl", (2, 1)),
        )  # 4 and 8, 8
        settings: dict[str, Any] = {"layers": (2,), "execution": execution}
        with (
            FastV(**settings, keep=10).attach(lvlm),
            pytest.raises(
                CapaProbeError, match="keep=10 was given, but row 1 of the batch has only 8 visual"
            ),
        ):
            lvlm.model(**inputs)
        with (
            FastV(**settings, keep=5, budget="image").attach(lvlm),
            pytest.raises(CapaProbeError, match="keep=5 .* image 0 of row 0 of the batch has only 4 visual"),
        ):
            lvlm.model(**inputs)
        with FastV(**settings, keep=4, budget="image").attach(lvlm) as trace:
            lvlm.model(**inputs)
        assert trace.visual_tokens[2].tolist() == [8, 4]

    @pytest.mark.parametrize("execution", ["masked", "compact"])
    def test_no_visual_token_by_name(self, execution: Any) -> None:
        lvlm, inputs = wrapped(), tiny.inputs("llava", (1,))
        pruner = CAPA(layers=(2,), keep=0, allow_none=True, execution=execution)
        with pruner.attach(lvlm) as trace:
            logits = lvlm.model(**inputs, logits_to_keep=1).logits
        assert torch.equal(trace.kept[2], lvlm.spans(inputs).text)
        assert not logits.isnan().any()


class TestModes:
    def test_static_caches(self) -> None:
        lvlm, inputs = wrapped(), tiny.inputs("llava", (1,))
        with ONE.attach(lvlm):
            cache = StaticCache(config=lvlm.model.config.get_text_config(), max_cache_len=64)
            with pytest.raises(
                CapaProbeError, match="StaticCache with StaticLayers was given.*a DynamicCache"
            ):
                lvlm.model(**inputs, past_key_values=cache)
            with pytest.raises(
                CapaProbeError, match="StaticCache .* leave cache_implementation at its default"
            ):
                lvlm.model.generate(**inputs, max_new_tokens=2, cache_implementation="static")

    def test_generation_without_a_cache(self) -> None:
        lvlm, inputs = wrapped(), tiny.inputs("llava", (1,))
        with ONE.attach(lvlm):
            for options in ({"use_cache": False}, {"guidance_scale": 1.5}):
                with pytest.raises(CapaProbeError, match="Generation without a KV cache was asked for"):
                    lvlm.model.generate(**inputs, max_new_tokens=2, **options)
            lvlm.model(**inputs, use_cache=False)  # a plain forward is no generation

    def test_a_prefill_in_chunks(self) -> None:
        lvlm, inputs = wrapped(), tiny.inputs("llava", (1,))
        with ONE.attach(lvlm), pytest.raises(CapaProbeError, match="leave prefill_chunk_size at None"):
            lvlm.model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)

    def test_assisted_generation(self) -> None:
        lvlm, inputs = wrapped(), tiny.inputs("llava", (1,))
        with ONE.attach(lvlm), pytest.raises(CapaProbeError, match="Assisted generation was asked for"):
            lvlm.model.generate(**inputs, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=2)

    def test_flash_attention(self) -> None:
        model = built("llava")
        lvlm = cp.HookedLVLM(model)
        model.model.language_model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(CapaProbeError, match='"flash_attention_2", which'), ONE.attach(lvlm):
            pass

    def test_sliding_windows(self) -> None:
        model = tiny.build("internvl", use_sliding_window=True, sliding_window=8, max_window_layers=2)
        lvlm = cp.HookedLVLM(model)
        with pytest.raises(CapaProbeError, match="layers of sliding_attention"), ONE.attach(lvlm):
            pass

    def test_video(self) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared("qwen2_5_vl")), tiny.inputs("qwen2_5_vl", (1,))
        with ONE.attach(lvlm), pytest.raises(CapaProbeError, match="Video input"):
            lvlm.model(**inputs, pixel_values_videos=torch.zeros(4, 96), video_grid_thw=torch.ones(1, 3))

    def test_inputs_without_ids(self) -> None:
        lvlm = wrapped()
        with ONE.attach(lvlm), pytest.raises(CapaProbeError, match="pass input_ids"):
            lvlm.model(inputs_embeds=torch.zeros(1, 5, 32))

    def test_a_part_of_the_model(self) -> None:
        lvlm = wrapped()
        with (
            ONE.attach(lvlm),
            pytest.raises(CapaProbeError, match="run lvlm.model, which the pruner follows"),
        ):
            lvlm.model.model.language_model(inputs_embeds=torch.zeros(1, 5, 32))


class TestWithoutAnImage:
    @pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
    def test_it_runs_unpruned_and_says_so(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), tiny.inputs(family, (0,))
        plain = lvlm.model(**inputs).logits
        ids = lvlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        with ONE.attach(lvlm) as trace:
            with pytest.warns(UserWarning, match="The prompt holds no image and run"):
                assert torch.equal(lvlm.model(**inputs).logits, plain)
            with pytest.warns(UserWarning, match="no image"):
                assert torch.equal(lvlm.model.generate(**inputs, max_new_tokens=3, do_sample=False), ids)
        assert trace.kept[2].all()
        assert trace.visual_tokens.sum() == 0

    def test_some_rows_are_named(self) -> None:
        lvlm, inputs = wrapped(), tiny.inputs("llava", (0, 1, 0))
        with ONE.attach(lvlm), pytest.warns(UserWarning, match="Rows 0, 2 of the batch hold no image"):
            lvlm.model(**inputs)


class TestAttaching:
    def test_twice_is_refused(self) -> None:
        lvlm = wrapped()
        again = cp.HookedLVLM(lvlm.model)
        message = "Random was to be attached to a model on which CAPA is attached already; leave that one's"
        with ONE.attach(lvlm):
            for other in (lvlm, again):
                with pytest.raises(CapaProbeError, match=message), Random(layers=(1,)).attach(other):
                    pass
        with Random(layers=(1,)).attach(again):
            pass

    @pytest.mark.parametrize(
        "pruner", [ONE, CAPA(layers=(2,), execution="masked"), CAPA(layers=(2,), ffn=FFN)]
    )
    def test_beside_an_ffn_is_refused(self, pruner: Pruner) -> None:
        lvlm, inputs = wrapped(), tiny.inputs("llava", (1,))
        with pruner.attach(lvlm):
            message = "SkipFFN was to be attached to a model on which CAPA is attached already"
            with pytest.raises(CapaProbeError, match=message), FFN.attach(lvlm):
                pass
            lvlm.model(**inputs)
        message = (
            "CAPA was to be attached to a model on which an FFN approximation is attached already; leave its"
        )
        with FFN.attach(lvlm):
            with pytest.raises(CapaProbeError, match=message), pruner.attach(lvlm):
                pass
            lvlm.model(**inputs)
        with pruner.attach(lvlm):  # free again
            lvlm.model(**inputs)

    def test_what_needs_every_token_is_refused(self) -> None:
        lvlm, inputs = wrapped(), tiny.inputs("llava", (1,))
        settings: dict[str, Any] = {"layers": (2,), "keep": 0.25}
        with CAPA(**settings).attach(lvlm):
            message = 'was asked for while CAPA takes tokens out of the model; leave .* execution="masked"'
            with pytest.raises(CapaProbeError, match=f"A profile {message}"):
                cp.profile(lvlm, [inputs], progress=False)
            with pytest.raises(CapaProbeError, match=f"A calibration {message}"):
                cp.calibrate_hadamard(lvlm, [inputs], [3], progress=False)
        plain = cp.profile(lvlm, [inputs], progress=False).tokens.set_index(["layer", "position"])[
            "contribution"
        ]
        with CAPA(**settings, execution="masked").attach(lvlm) as trace:
            tokens = cp.profile(lvlm, [inputs], progress=False).tokens.set_index(["layer", "position"])
        found = tokens["contribution"]
        assert (found[1] == plain[1]).all()
        assert ((found[2] > 0) == trace.kept[2][0].numpy()).all()

    def test_to_something_else_is_refused(self) -> None:
        model: Any = wrapped().model
        message = "CAPA was to be attached to a LlavaForConditionalGeneration; give a HookedLVLM"
        with pytest.raises(CapaProbeError, match=message), ONE.attach(model):
            pass

    @FAMILIES
    @pytest.mark.parametrize("pruner", [ONE, Random(layers=(0,)), CAPA(layers=(1,), rescore="every_step")])
    def test_leaves_nothing_behind(self, family: str, pruner: Pruner) -> None:
        model, inputs = built(family), tiny.inputs(family, (1,))
        plain, before = model(**inputs).logits, state(model)
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        lvlm = cp.HookedLVLM(model)
        with pruner.attach(lvlm):
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
            assert state(model) != before
        assert state(model) == before
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), ids)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    def test_nor_after_an_exception(self) -> None:
        @dataclass(frozen=True)
        class Fails(Pruner):
            def score_tokens(self, scoring: Scoring) -> Tensor:
                raise ZeroDivisionError

        model, inputs = built("llava"), tiny.inputs("llava", (1,))
        plain, before = model(**inputs).logits, state(model)
        lvlm = cp.HookedLVLM(model)
        with pytest.raises(ZeroDivisionError), Fails(layers=(2,)).attach(lvlm):
            model(**inputs)
        assert state(model) == before
        assert torch.equal(model(**inputs).logits, plain)
        with ONE.attach(lvlm) as trace:  # free again
            model(**inputs)
        assert 2 in trace.kept

    def test_and_goes_on_after_an_exception_inside(self) -> None:
        lvlm, inputs = wrapped(), tiny.inputs("llava", (1,))
        with ONE.attach(lvlm) as trace:
            first = lvlm.model(**inputs).logits
            with pytest.raises(CapaProbeError, match="pass input_ids"):
                lvlm.model(inputs_embeds=torch.zeros(1, 5, 32))
            again = lvlm.model(**inputs).logits
        assert torch.equal(first.nan_to_num(), again.nan_to_num())
        assert trace.prefills == 2

    def test_a_users_own_hooks_see_the_pruned_model(self) -> None:
        lvlm, inputs, lengths = wrapped(), tiny.inputs("llava", (1,)), []
        name = "blocks.3.hook_resid_post"
        with ONE.attach(lvlm) as trace, lvlm.hooks([(name, lambda x, hook: lengths.append(x.shape[1]))]):
            lvlm.model(**inputs)
        assert lengths == [trace.lengths[3]]

    @pytest.mark.parametrize("shape", ["short", "nan"])
    def test_a_method_that_returns_nonsense_is_named(self, shape: str) -> None:
        @dataclass(frozen=True)
        class Odd(Pruner):
            def score_tokens(self, scoring: Scoring) -> Tensor:
                scores = torch.full(scoring.visual.shape, float("nan"))
                return scores[:, 1:] if shape == "short" else scores

        lvlm, inputs = wrapped(), tiny.inputs("llava", (1,))
        message = "Odd returned scores of shape" if shape == "short" else "row 0 of the batch is NaN"
        with Odd(layers=(2,)).attach(lvlm), pytest.raises(CapaProbeError, match=message):
            lvlm.model(**inputs)

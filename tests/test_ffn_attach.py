"""An attached FFN approximation: in generation, over turns, and beside other hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import capa_probe as cp
from capa_probe.pruning.ffn import HadamardFFN, SkipFFN
from tests import ffn_reference as naive
from tests import processors, tiny
from tests.test_ffn import FAMILIES, factors, wrap


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def edits(ffn: HadamardFFN, image: int = tiny.IMAGE) -> tuple[naive.Hooks, dict[str, Any]]:
    """Hooks on a full forward, and where to say what its input_ids are."""
    current: dict[str, Any] = {}

    def visual(layer: int) -> Tensor | None:
        ids = current["ids"]
        return ids == image if current["pixels"] else None

    return naive.overwriting(ffn.layers, visual, naive.hadamard(ffn.alpha, ffn.x)), current


GENERATE = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled": {"do_sample": True, "temperature": 1.5},
    "in chunks": {"do_sample": False, "prefill_chunk_size": 5},
}


class TestGenerate:
    @FAMILIES
    @pytest.mark.parametrize("mode", GENERATE)
    def test_as_the_edited_forward(self, family: str, mode: str) -> None:
        lvlm, inputs, ffn = wrap(family), tiny.inputs(family), factors()
        options = {
            **GENERATE[mode],
            "max_new_tokens": 5,
            "eos_token_id": None,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        hooks, current = edits(ffn)

        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
            current.update(
                ids=kwargs["input_ids"],
                pixels=kwargs.get("pixel_values") is not None or encoded is not None,
            )

        handle = lvlm.model.register_forward_pre_hook(note, with_kwargs=True)
        torch.manual_seed(1)
        with lvlm.hooks(hooks):
            wanted = lvlm.model.generate(**inputs, **options)
        handle.remove()
        torch.manual_seed(1)
        with ffn.attach(lvlm):
            found = lvlm.model.generate(**inputs, **options)
        assert torch.equal(found.sequences, wanted.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=0, atol=2e-6)
        plain = lvlm.model.generate(**inputs, **options)
        assert not torch.allclose(torch.stack(plain.logits)[0], torch.stack(found.logits)[0], atol=1e-2)

    @FAMILIES
    def test_an_image_in_a_second_turn(self, family: str) -> None:
        """With the cache carried over, the second turn's visual tokens are found among its own input_ids."""
        lvlm, ffn = wrap(family), factors()
        first, second = (tiny.inputs(family, images=(1,), tail=(n,), seed=n) for n in (3, 5))
        whole = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
        images = {
            name: torch.cat([first[name], second[name]])
            for name in ("pixel_values", "image_grid_thw")
            if name in first
        }
        both = {"input_ids": whole, "attention_mask": torch.ones_like(whole), **images}
        if family == "qwen2_5_vl":
            both["mm_token_type_ids"] = (whole == tiny.IMAGE).int()
        positions = {}
        if family == "qwen2_5_vl":  # the model counts them from the whole prompt only
            positions["position_ids"], _ = lvlm.model.model.get_rope_index(
                whole, both["mm_token_type_ids"], image_grid_thw=both["image_grid_thw"]
            )
        with ffn.attach(lvlm):
            wanted = lvlm.model(**both, **positions).logits
            n = first["input_ids"].shape[1]
            at = {name: value[..., :n] for name, value in positions.items()}
            cache = lvlm.model(**first, **at, use_cache=True).past_key_values
            at = {name: value[..., n:] for name, value in positions.items()}
            found = lvlm.model(
                **{**second, "attention_mask": both["attention_mask"]}, **at, past_key_values=cache
            ).logits
        torch.testing.assert_close(found, wanted[:, n:], rtol=0, atol=1e-5)
        assert int((second["input_ids"] == tiny.IMAGE).sum()) > 0

    @FAMILIES
    def test_a_generated_image_token_is_text(self, family: str) -> None:
        """It comes without an image, and the model takes it for a word."""
        lvlm, inputs = wrap(family), tiny.inputs(family, images=(1,))
        tokens = torch.full((1, 1), tiny.IMAGE)
        with pytest.warns(UserWarning, match="no forward"), factors().attach(lvlm):  # noqa: PT031
            found = lvlm.model.model.language_model(tokens).last_hidden_state
            same = lvlm.model(input_ids=tokens).logits
        assert torch.equal(found, lvlm.model.model.language_model(tokens).last_hidden_state)
        assert torch.equal(same, lvlm.model(input_ids=tokens).logits)
        force = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        seen: list[int] = []
        mlp = lvlm.family.layers(lvlm.model)[1].mlp
        handle = mlp.register_forward_pre_hook(lambda module, args: seen.append(len(module._forward_hooks)))
        with factors().attach(lvlm):
            lvlm.model.generate(**inputs, **force, prefix_allowed_tokens_fn=lambda batch, ids: [tiny.IMAGE])
        handle.remove()
        assert seen == [1, 0, 0, 0]

    @FAMILIES
    def test_a_prompt_without_an_image_changes_nothing_and_says_so(self, family: str) -> None:
        lvlm = wrap(family)
        ids = torch.arange(3, 12)[None]
        wanted = lvlm.model(input_ids=ids).logits
        with (
            pytest.warns(UserWarning, match="SkipFFN was attached, but no forward had a visual token"),
            SkipFFN([0]).attach(lvlm),
        ):
            assert torch.equal(lvlm.model(input_ids=ids).logits, wanted)


class TestOtherHooks:
    @FAMILIES
    @pytest.mark.parametrize("first", [True, False])
    def test_hook_points_fire_with_all_positions(self, family: str, first: bool) -> None:
        """Whether they were there before it was attached or not."""
        lvlm, inputs, ffn = wrap(family), tiny.inputs(family), factors()
        visual, plain = lvlm.spans(inputs).visual, {}
        names = ("hook_resid_mid", "mlp.hook_in", "hook_mlp_out", "hook_resid_post")
        points = [f"blocks.1.{name}" for name in names]
        _, plain = lvlm.run_with_cache(**inputs, names_filter=points)
        seen: dict[str, Tensor] = {}
        hooks = lvlm.hooks([(name, lambda x, hook: seen.update({hook.name: x.clone()})) for name in points])
        outer, inner = (hooks, ffn.attach(lvlm)) if first else (ffn.attach(lvlm), hooks)
        with outer, inner:
            lvlm.model(**inputs)
        mid, normed, out, post = (seen[name] for name in points)
        assert torch.equal(mid, plain[points[0]])
        assert torch.equal(normed, plain[points[1]])
        assert torch.equal(out[visual], mid[visual] * (ffn.alpha[1] - 1))
        torch.testing.assert_close(out[~visual], plain[points[2]][~visual], rtol=1e-5, atol=1e-6)
        assert torch.equal(post, mid + out)

    @FAMILIES
    @pytest.mark.parametrize("first", [True, False])
    def test_edits_count(self, family: str, first: bool) -> None:
        lvlm, inputs, ffn = wrap(family), tiny.inputs(family), factors()
        visual = lvlm.spans(inputs).visual
        for name in ("hook_resid_mid", "hook_mlp_out"):
            edit = lambda x, hook: x + 0.5  # noqa: E731
            full = naive.overwriting([1], lambda layer: visual, naive.hadamard(ffn.alpha, ffn.x))
            point = f"blocks.1.{name}"
            ordered = [(point, edit), *full] if name == "hook_resid_mid" else [*full, (point, edit)]
            wanted = lvlm.run_with_hooks(**inputs, fwd_hooks=ordered).logits
            hooks, one = lvlm.hooks([(point, edit)]), ffn.only([1]).attach(lvlm)
            outer, inner = (hooks, one) if first else (one, hooks)
            with outer, inner:
                found = lvlm.model(**inputs).logits
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)

    def test_profile_measures_what_the_model_then_computes(self) -> None:
        lvlm = cp.HookedLVLM(tiny.shared("llava"), processors.shared("llava"))
        samples = [cp.Sample("a", processors.image(16, 16), "what is it")]
        with SkipFFN([2]).attach(lvlm):
            prof = cp.profile(lvlm, samples, progress=False)
        rows = prof.tokens.query("kind == 'visual'").set_index("layer")["ffn_cosine"]
        assert rows[2].to_numpy() == pytest.approx(1.0, abs=1e-6)
        assert (rows[1] < 0.99).all()

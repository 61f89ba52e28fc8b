"""What holds in every way of running a pruned model, where the other files look at one way at a time."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

import capa_probe as cp
from capa_probe.console import quiet_transformers
from capa_probe.errors import CapaProbeError
from capa_probe.pruning import CAPA, Pruner, VisionAttention
from capa_probe.pruning.ffn import SkipFFN
from tests import pruned_reference as reference
from tests import tiny
from tests.test_hooked import state
from tests.test_pruning_generate import MODES, both, generate, wrapped

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
BACKENDS = pytest.mark.parametrize("attn", ["sdpa", "eager"])
SEVERAL = CAPA(layers=(1, 3), keep=(0.5, 0.25))
EXECUTIONS: Any = ("masked", "compact")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    # Padding on the right is logged at every generation.
    with torch.no_grad(), quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Rows .* of the batch hold no image", UserWarning)
        yield


def logits_apart(masked: Any, compact: Any) -> float:
    return float((torch.stack(masked.logits) - torch.stack(compact.logits)).abs().max())


class TestEveryLayerRunsOnce:
    @FAMILIES
    @pytest.mark.parametrize(
        "pruner",
        [
            SEVERAL,
            replace(SEVERAL, layers=(0, 2), score_at="same"),
            VisionAttention(layers=(0, 2)),
            CAPA(layers=(2,), rescore="every_step"),
        ],
        ids=["several", "same", "vision", "every step"],
    )
    def test_in_prefill_and_steps(self, family: str, pruner: Pruner) -> None:
        lvlm, inputs, calls = wrapped(family), tiny.inputs(family), Counter[str]()
        model = lvlm.model
        tower = model.model.visual if family == "qwen2_5_vl" else model.model.vision_tower
        watched = {f"layer {i}": layer for i, layer in enumerate(reference.decoder(model).layers)}
        watched |= {
            f"attention {i}": layer.self_attn for i, layer in enumerate(reference.decoder(model).layers)
        }
        watched |= {
            f"projection {i}": layer.self_attn.o_proj
            for i, layer in enumerate(reference.decoder(model).layers)
        }
        with ExitStack() as stack:
            for name, module in {**watched, "tower": tower}.items():
                note = lambda m, a, name=name: calls.update([name])  # noqa: E731
                stack.callback(module.register_forward_pre_hook(note).remove)
            with pruner.attach(lvlm):
                generate(lvlm, inputs, n=4)
        assert calls.pop("tower") == 1
        assert set(calls) == set(watched)
        assert set(calls.values()) == {4}  # a prefill and three steps


class TestTheInnerModel:
    @FAMILIES
    def test_may_be_run_itself_with_arguments_by_position(self, family: str) -> None:
        lvlm, inputs = wrapped(family), tiny.inputs(family)
        inner = lvlm.model.model
        names = [name for name in signature(inner.forward).parameters if name != "kwargs"]
        last = max(names.index(name) for name in inputs)
        with SEVERAL.attach(lvlm) as trace:
            wanted = lvlm.model(**inputs, output_hidden_states=True).hidden_states[-1]
            kept = dict(trace.kept)
            found = inner(*(inputs.get(name) for name in names[: last + 1])).last_hidden_state
        assert trace.prefills == 2
        assert all(torch.equal(trace.kept[layer], own) for layer, own in kept.items())
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


class TestPaddingOnTheRight:
    """Not how one generates, but transformers lets one; the query is then not the last row."""

    @FAMILIES
    @pytest.mark.parametrize("mode", ["greedy", "sampled", "beams"])
    def test_in_generate(self, family: str, mode: str) -> None:
        lvlm, inputs = wrapped(family), tiny.inputs(family, (1, 2, 0), "right")
        for pruner in (SEVERAL, replace(SEVERAL, positions="compacted")):
            masked, compact, trace = both(pruner, lvlm, inputs, **MODES[mode])
            assert torch.equal(masked.sequences, compact.sequences)
            assert logits_apart(masked, compact) < 1e-5
            copies = len(trace.kept[3]) // 3
            padding = (inputs["attention_mask"] == 0).repeat_interleave(copies, dim=0)
            assert not (trace.kept[3] & padding).any()


class TestTurnsOnBothBackends:
    @FAMILIES
    @BACKENDS
    @pytest.mark.parametrize("mode", ["greedy", "sampled"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_three_turns(self, family: str, attn: str, mode: str, side: str) -> None:
        """The cache is carried over twice; all of it agrees with the masked reference."""
        lvlm, inputs = wrapped(family, attn), tiny.inputs(family, (1, 2, 0), side)
        questions = torch.randint(3, 50, (2, 3, 4), generator=torch.Generator().manual_seed(0))
        found: list[list[Any]] = []
        for execution in EXECUTIONS:
            with replace(SEVERAL, execution=execution).attach(lvlm) as trace:
                outs = [generate(lvlm, inputs, n=3, **MODES[mode])]
                turn: dict[str, Tensor] = dict(inputs)
                for question in questions:
                    new = outs[-1].sequences[:, turn["input_ids"].shape[1] :]
                    turn = reference.longer(turn, torch.cat([new, question], dim=1))
                    for name in ("pixel_values", "image_grid_thw"):
                        turn.pop(name, None)
                    cache = outs[-1].past_key_values
                    outs.append(generate(lvlm, turn, n=3, past_key_values=cache, **MODES[mode]))
                assert trace.prefills == 1
            found.append(outs)
        for masked, compact in zip(*found, strict=True):
            assert torch.equal(masked.sequences, compact.sequences)
            assert logits_apart(masked, compact) < 1e-5
        grown = turn["input_ids"].shape[1] - inputs["input_ids"].shape[1] + 2
        lengths = reference.kv_lengths(found[1][-1].past_key_values)
        assert lengths == [n + grown for n in trace.lengths]
        assert len(set(lengths)) == 3

    @FAMILIES
    def test_an_image_in_a_later_turn_stays_whole(self, family: str) -> None:
        lvlm, inputs, found = wrapped(family), tiny.inputs(family, (1,)), []
        other = tiny.inputs(family, (1,), seed=5)
        for execution in EXECUTIONS:
            with replace(SEVERAL, execution=execution).attach(lvlm) as trace:
                cache = lvlm.model(**inputs).past_key_values
                turn = {k: v for k, v in other.items() if k not in ("attention_mask", "mm_token_type_ids")}
                with pytest.warns(UserWarning, match="An image came in a later turn"):
                    found.append(lvlm.model(**turn, past_key_values=cache).logits)
                assert reference.kv_lengths(cache) == [n + other["input_ids"].shape[1] for n in trace.lengths]
        assert not found[0].isnan().any()
        assert (found[0] - found[1]).abs().max() < 1e-5


class TestNothingIsLeftBehind:
    @FAMILIES
    @BACKENDS
    @pytest.mark.parametrize("mode", ["greedy", "sampled", "beams"])
    def test_bit_for_bit(self, family: str, attn: str, mode: str) -> None:
        model, inputs = tiny.build(family, attn=attn), tiny.inputs(family, (1, 2, 0))
        model(**inputs)  # on its first forward transformers puts hooks of its own on it
        lvlm = cp.HookedLVLM(model)
        before, plain = state(model), generate(lvlm, inputs, **MODES[mode])
        weights = copy.deepcopy(model.state_dict())
        with replace(SEVERAL, ffn=SkipFFN((1, 2))).attach(lvlm):
            generate(lvlm, inputs, **MODES[mode])
        with VisionAttention().attach(lvlm):
            generate(lvlm, inputs, **MODES[mode])
        assert state(model) == before
        again = generate(lvlm, inputs, **MODES[mode])
        assert torch.equal(plain.sequences, again.sequences)
        assert torch.equal(torch.stack(plain.logits), torch.stack(again.logits))
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    @FAMILIES
    def test_nested_attachment_is_refused_in_one_sentence(self, family: str) -> None:
        lvlm, inputs = wrapped(family), tiny.inputs(family, (1,))
        with SEVERAL.attach(lvlm) as trace:
            with pytest.raises(CapaProbeError) as caught, SEVERAL.attach(lvlm):
                pass
            assert str(caught.value) == (
                "CAPA was to be attached to a model on which CAPA is attached already; leave that one's with block "
                "first."
            )
            lvlm.model(**inputs)  # the outer one is as it was
        assert set(trace.kept) == {1, 3}

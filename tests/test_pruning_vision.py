"""Methods that read the vision tower, in every way of running the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from capa_probe.pruning import Pruner, Scoring, VisionAttention
from capa_probe.pruning.methods import METHODS
from tests import pruned_reference as reference
from tests import tiny
from tests.test_hooked import built, state
from tests.test_pruning_generate import MODES, N, both, generate, wrapped
from tests.test_tower_view import SEEN, Seen

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
HALF = VisionAttention(keep=0.5)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    SEEN.clear()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Rows .* of the batch hold no image", UserWarning)
        yield


class TestPruning:
    @FAMILIES
    @pytest.mark.parametrize("images", [(1,), (1, 1), (1, 2, 0), (0, 3, 1)])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_executions_agree(self, family: str, images: tuple[int, ...], side: str) -> None:
        lvlm, inputs = wrapped(family), tiny.inputs(family, images, side)
        for pruner in (HALF, VisionAttention(layers=(0, 2), keep=(0.5, 0.25), budget="image")):
            outs, traces = [], []
            for execution in ("masked", "compact"):
                with replace(pruner, execution=execution).attach(lvlm) as trace:  # type: ignore[arg-type]
                    outs.append(lvlm.model(**inputs).logits)
                traces.append(trace)
            kept = traces[0].kept[max(pruner.layers)]
            assert torch.equal(kept, traces[1].kept[max(pruner.layers)])
            assert (outs[0] - outs[1])[kept].abs().max() < 1e-5
            wanted = reference.edited_logits(lvlm, inputs, traces[0].kept)
            last = [reference.last(lvlm, inputs, logits) for logits in (outs[1], wanted)]
            assert (last[0] - last[1]).abs().max() < 1e-5
            assert traces[1].lengths[0] < inputs["input_ids"].shape[1]

    @FAMILIES
    def test_keeps_what_receives_most(self, family: str) -> None:
        lvlm, inputs = wrapped(family), tiny.inputs(family, (1, 2, 0))
        with Seen(keep=1.0).attach(lvlm):
            lvlm.model(**inputs)
        received = SEEN[0][1].received
        assert received is not None
        with HALF.attach(lvlm) as trace:
            lvlm.model(**inputs)
        scores = received.mean(dim=-1).tolist()
        wanted = reference.best(scores, lvlm.spans(inputs), lambda n: max(1, round(0.5 * n)) if n else 0)
        assert torch.equal(trace.kept[0], wanted)

    @FAMILIES
    @pytest.mark.parametrize("mode", MODES)
    def test_in_generate(self, family: str, mode: str) -> None:
        """Images are encoded before the prefill; with beams, once for all of them."""
        lvlm, inputs = wrapped(family), tiny.inputs(family)
        with HALF.attach(lvlm) as trace:
            lvlm.model(**inputs)
        alone = trace.kept[0]
        masked, compact, trace = both(HALF, lvlm, inputs, **MODES[mode])
        assert torch.equal(masked.sequences, compact.sequences)
        assert (torch.stack(masked.logits) - torch.stack(compact.logits)).abs().max() < 1e-5
        copies = len(trace.kept[0]) // len(alone)
        assert torch.equal(trace.kept[0], alone.repeat_interleave(copies, dim=0))
        if mode == "greedy":
            wanted = reference.edited_generation(lvlm, inputs, trace.kept, N)
            assert torch.equal(compact.sequences[:, -N:], wanted)

    @FAMILIES
    def test_over_several_turns(self, family: str) -> None:
        lvlm, inputs, found = wrapped(family), tiny.inputs(family), []
        question = torch.tensor([[7, 8, 9], [3, 4, 5], [6, 5, 4]])
        for execution in ("masked", "compact"):
            with replace(HALF, execution=execution).attach(lvlm) as trace:  # type: ignore[arg-type]
                first = generate(lvlm, inputs)
                turn = reference.longer(inputs, torch.cat([first.sequences[:, -N:], question], dim=1))
                for name in ("pixel_values", "image_grid_thw"):
                    turn.pop(name, None)
                found.append(generate(lvlm, turn, past_key_values=first.past_key_values))
                assert trace.prefills == 1
        assert torch.equal(found[0].sequences, found[1].sequences)
        wanted = reference.edited_generation(lvlm, {**inputs, **turn}, trace.kept, N)
        assert torch.equal(found[1].sequences[:, -N:], wanted)

    @FAMILIES
    def test_one_prompt_after_the_other(self, family: str) -> None:
        """Nothing of one prompt's images is left for the next."""
        lvlm = wrapped(family)
        several = [
            tiny.inputs(family, images, seed=seed) for images, seed in (((2,), 0), ((1, 1), 1), ((2,), 2))
        ]
        alone = []
        for inputs in several:
            with HALF.attach(lvlm) as trace:
                lvlm.model(**inputs)
            alone.append(trace.kept[0])
        with HALF.attach(lvlm) as trace:
            for number, inputs in enumerate(several):
                if number % 2:
                    generate(lvlm, inputs)
                else:
                    lvlm.model(**inputs)
                assert torch.equal(trace.kept[0], alone[number])

    @FAMILIES
    def test_at_a_later_layer_and_beside_attention(self, family: str) -> None:
        """The view follows the tokens that are left."""

        @dataclass(frozen=True)
        class Mixed(Pruner):
            tower = ("features", "attention")

            def score_tokens(self, scoring: Scoring) -> Tensor:
                assert scoring.tower is not None
                SEEN.append((scoring, scoring.tower))
                return scoring.contribution

        lvlm, inputs = wrapped(family), tiny.inputs(family)
        with Mixed(layers=(1, 2), keep=(0.5, 0.25)).attach(lvlm):
            lvlm.model(**inputs)
        (one, first), (two, second) = SEEN
        for row in range(3):
            at = {int(p): k for k, p in enumerate(one.positions[row])}
            for key in two.visual[row].nonzero().flatten().tolist():
                before = at[int(two.positions[row, key])]
                assert torch.equal(second.features[row, key], first.features[row, before])
                assert first.received is not None
                assert second.received is not None
                assert torch.equal(second.received[row, key], first.received[row, before])
        assert two.visual.sum() < one.visual.sum()


class TestHousekeeping:
    @FAMILIES
    @pytest.mark.parametrize("vision", ["sdpa", "eager"])
    def test_the_towers_own_backend_stays(self, family: str, vision: str) -> None:
        model, inputs = built(family), tiny.inputs(family)
        tower = model.model.visual if family == "qwen2_5_vl" else model.model.vision_tower
        tower.set_attn_implementation(vision)
        before, plain = state(model), model(**inputs, logits_to_keep=1).logits
        lvlm = cp.HookedLVLM(model)
        with VisionAttention(keep=1.0).attach(lvlm):
            assert tower.config._attn_implementation == f"capa_probe_{vision}"
            assert torch.equal(model(**inputs, logits_to_keep=1).logits, plain)  # keeping all changes nothing
        assert tower.config._attn_implementation == vision
        with HALF.attach(lvlm):
            model(**inputs)
        assert state(model) == before
        assert torch.equal(model(**inputs, logits_to_keep=1).logits, plain)

    def test_features_alone_leave_the_backend_alone(self) -> None:
        @dataclass(frozen=True)
        class Norms(Pruner):
            layers: tuple[int, ...] = (0,)
            uses_attention = False
            tower = ("features",)

            def score_tokens(self, scoring: Scoring) -> Tensor:
                assert scoring.tower is not None
                assert scoring.tower.received is None
                return scoring.tower.features.norm(dim=-1).mean(dim=-1)

        lvlm, inputs = wrapped("llava"), tiny.inputs("llava", (1,))
        with Norms(keep=0.5).attach(lvlm) as trace:
            assert lvlm.model.model.vision_tower.config._attn_implementation == "sdpa"
            lvlm.model(**inputs)
        assert trace.visual_tokens[:, 0].tolist() == [8] * 4

    def test_flash_attention_in_the_tower_is_refused(self) -> None:
        model = built("llava")
        model.model.vision_tower.config._attn_implementation = "flash_attention_2"
        lvlm = cp.HookedLVLM(model)
        with pytest.raises(CapaProbeError, match='"flash_attention_2", which'), HALF.attach(lvlm):
            pass
        assert model.config.text_config._attn_implementation == "sdpa"

    @FAMILIES
    def test_ready_made_features_are_refused(self, family: str) -> None:
        lvlm, inputs = wrapped(family), tiny.inputs(family, (1,))
        names = [name for name in ("pixel_values", "image_grid_thw") if name in inputs]
        config = lvlm.model.config
        options = {
            name: getattr(config, name)
            for name in ("vision_feature_layer", "vision_feature_select_strategy")
            if hasattr(config, name)
        }
        features = lvlm.model.model.get_image_features(
            **{n: inputs[n] for n in names}, **options, return_dict=True
        )
        others = {name: value for name, value in inputs.items() if name != "pixel_values"}
        with (
            HALF.attach(lvlm),
            pytest.raises(CapaProbeError, match="VisionAttention reads the vision tower, which did not run"),
        ):
            lvlm.model(**others, mm_encoder_outputs={"image": copy.copy(features)})

    def test_a_family_without_a_tower(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lvlm = wrapped("llava")
        monkeypatch.setattr(type(lvlm.family), "tower", None)
        with pytest.raises(CapaProbeError, match="The vision tower of llava models is not described"):
            HALF.attach(lvlm).__enter__()

    def test_a_feature_layer_that_is_none(self) -> None:
        model = tiny.build("llava")
        model.config.vision_feature_layer = 0
        with pytest.raises(CapaProbeError, match="vision_feature_layer=0"), HALF.attach(cp.HookedLVLM(model)):
            pass

    def test_is_in_the_registry(self) -> None:
        assert METHODS["vision-attention"] is VisionAttention

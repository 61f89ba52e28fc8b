"""What methods are shown of the vision tower: which patch is which visual token, and what it attends to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

import capa_probe as cp
from capa_probe.lvlm.tower_view import TowerView
from capa_probe.pruning import Pruner, Scoring, VisionAttention
from tests import tiny
from tests.test_pruning_generate import wrapped

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
HALF = VisionAttention(keep=0.5)


@dataclass(frozen=True)
class Seen(Pruner):
    """Notes what it is shown, and keeps what has the largest features."""

    layers: tuple[int, ...] = (0,)

    uses_attention = False
    tower = ("features", "attention")

    def score_tokens(self, scoring: Scoring) -> Tensor:
        assert scoring.tower is not None
        SEEN.append((scoring, scoring.tower))
        return scoring.tower.features.norm(dim=-1).mean(dim=-1)


SEEN: list[tuple[Scoring, TowerView]] = []


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    SEEN.clear()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Rows .* of the batch hold no image", UserWarning)
        yield


def projected(model: Any, family: str, features: Tensor) -> Tensor:
    """What the model itself makes of the patches (token, patch, d_vision) of each visual token."""
    if family == "llava":
        return model.model.multi_modal_projector(features[:, 0])
    if family == "qwen2_5_vl":
        return model.model.visual.merger(features.flatten(0, 1))
    normed = model.model.vision_tower.layernorm(features)
    return model.model.multi_modal_projector(normed.flatten(1))


class TestWhichPatchIsWhichToken:
    @FAMILIES
    @pytest.mark.parametrize("images", [(1,), (2,), (1, 2, 0), (0, 3, 1)])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_features_project_to_the_embeddings(
        self, family: str, images: tuple[int, ...], side: str
    ) -> None:
        """The content of every token, out of the model's own projector, window order and pixel shuffle undone."""
        lvlm, inputs = wrapped(family), tiny.inputs(family, images, side)
        with Seen(keep=1.0).attach(lvlm):
            lvlm.model(**inputs)
        ((scoring, tower),) = SEEN
        visual = scoring.visual
        assert torch.equal(visual, lvlm.spans(inputs).visual)
        _, cache = lvlm.run_with_cache(**inputs, names_filter="hook_embed")
        wanted = cache["hook_embed"][visual]
        found = projected(lvlm.model, family, tower.features[visual])
        assert (found - wanted).abs().max() < 1e-6
        assert torch.equal(tower.features[~visual], torch.zeros_like(tower.features[~visual]))
        assert torch.pdist(wanted).min() > 1e-3  # no two tokens could be mistaken for each other

    @pytest.mark.parametrize("window", [8, 16, 24])
    def test_in_grids_that_windows_do_not_divide(self, window: int) -> None:
        model = tiny.build("qwen2_5_vl")
        model.config.vision_config.window_size = model.model.visual.window_size = window
        grids = torch.tensor([[1, 6, 10], [1, 4, 14], [1, 2, 2]])
        counts = (grids.prod(dim=1) // 4).tolist()
        ids = [1]
        for n in counts:
            ids += [tiny.START, *[tiny.IMAGE] * n, tiny.END]
        inputs = {
            "input_ids": torch.tensor([[*ids, 5, 6]]),
            "pixel_values": torch.randn(
                int(grids.prod(dim=1).sum()), 96, generator=torch.Generator().manual_seed(0)
            ),
            "image_grid_thw": grids,
            "mm_token_type_ids": (torch.tensor([[*ids, 5, 6]]) == tiny.IMAGE).int(),
        }
        lvlm = cp.HookedLVLM(model)
        with Seen(keep=1.0).attach(lvlm):
            lvlm.model(**inputs)
        ((scoring, tower),) = SEEN
        _, cache = lvlm.run_with_cache(**inputs, names_filter="hook_embed")
        found = projected(model, "qwen2_5_vl", tower.features[scoring.visual])
        assert (found - cache["hook_embed"][scoring.visual]).abs().max() < 1e-6

    @pytest.mark.parametrize(("layer", "strategy"), [(-2, "default"), (1, "full"), ([-2, -1], "default")])
    def test_llavas_feature_layer(self, layer: Any, strategy: str) -> None:
        model = tiny.build("llava")
        model.config.vision_feature_layer, model.config.vision_feature_select_strategy = layer, strategy
        lvlm = cp.HookedLVLM(model)
        inputs = tiny.inputs("llava", (2,))
        hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        wanted = hidden[layer if isinstance(layer, int) else layer[-1]]
        listener = lvlm.family.tower
        assert listener is not None
        index = listener.patches(model, 2, 17, {})
        flat = wanted.flatten(0, 1)[index[:, 0]]
        assert len(flat) == (34 if strategy == "full" else 32)
        cls = torch.arange(0, 34, 17)
        assert torch.isin(cls, index).all() == (strategy == "full")
        seen = []
        handle = listener.feature_block(model).register_forward_hook(
            lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        model.model.vision_tower(inputs["pixel_values"])
        handle.remove()
        assert torch.equal(seen[0], wanted)

    @FAMILIES
    @pytest.mark.parametrize("attn", ["sdpa", "eager"])
    def test_attention_is_that_of_the_towers_own_matrix(self, family: str, attn: str) -> None:
        lvlm, inputs = wrapped(family, attn), tiny.inputs(family, (1, 2, 0))
        model = lvlm.model
        with Seen(keep=1.0).attach(lvlm):
            model(**inputs)
        ((scoring, tower),) = SEEN
        visual = scoring.visual
        assert tower.received is not None
        assert tower.given is not None
        if family == "qwen2_5_vl":
            received, sent = self.of_qwen(model, inputs)
        else:
            eager = tiny.shared(family, "eager")
            every = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
            attention = every[model.config.vision_feature_layer]
            patches = attention.mean(dim=1)[:, 1:, 1:]
            received, sent = patches.sum(dim=1), patches.sum(dim=2)
            if family == "internvl":
                received, sent = (self.squares(x) for x in (received, sent))
        for found, wanted in ((tower.received, received), (tower.given, sent)):
            assert (found[visual].flatten() - wanted.flatten()).abs().max() < 1e-5
            assert found[~visual].abs().sum() == 0
        assert received.std() > 1e-3

    @staticmethod
    def squares(x: Tensor) -> Tensor:
        """(tile, 16) in reading order as (tile, 4 tokens, 4 patches), each token's patches row by row."""
        grid = x.view(-1, 4, 4)
        tokens = [grid[:, r : r + 2, c : c + 2].flatten(1) for r in (0, 2) for c in (0, 2)]
        return torch.stack(tokens, dim=1)

    @staticmethod
    def of_qwen(model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """The last block attends within each image: q, k and softmax by hand, then back to reading order."""
        tower, caught = model.model.visual, {}
        block = tower.blocks[-1].attn

        def note(module: Any, args: Any, kwargs: Any) -> None:
            caught.update(kwargs, hidden=args[0])

        handle = block.register_forward_pre_hook(note, with_kwargs=True)
        tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        handle.remove()
        hidden = caught["hidden"]
        q, k, _ = block.qkv(hidden).view(len(hidden), 3, 2, 8).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *caught["position_embeddings"])
        received, sent = torch.zeros(len(hidden)), torch.zeros(len(hidden))
        for start, stop in zip(caught["cu_seqlens"][:-1], caught["cu_seqlens"][1:], strict=True):
            scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) / 8**0.5
            pattern = scores.softmax(dim=-1).mean(dim=0)
            received[start:stop], sent[start:stop] = pattern.sum(dim=0), pattern.sum(dim=1)
        # The merger's output says which square went where: it is known in both orders.
        merged = tower.merger(
            tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).last_hidden_state
        )
        order = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        place = torch.cdist(order.double(), merged.double()).argmin(dim=1)
        assert len(place.unique()) == len(place)
        return received.view(-1, 4)[place], sent.view(-1, 4)[place]

    def test_many_patches_are_summed_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lvlm, inputs = wrapped("llava"), tiny.inputs("llava", (2,))
        found = []
        for at_once in (2**24, 2 * 2 * 17 * 3):
            monkeypatch.setattr("capa_probe.lvlm.tower_view._AT_ONCE", at_once)
            SEEN.clear()
            with Seen(keep=1.0).attach(lvlm):
                lvlm.model(**inputs)
            assert SEEN[0][1].received is not None
            found.append(SEEN[0][1].received)
        assert torch.allclose(*found, atol=1e-6)

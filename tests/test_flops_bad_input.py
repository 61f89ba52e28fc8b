"""What the cost counter refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest

from capa_probe.errors import CapaProbeError
from capa_probe.flops import (
    CAPA,
    Convention,
    Cost,
    Shape,
    VisionShape,
    decode_cost,
    prefill_cost,
)
from tests.flops_reference import (
    CLIP_336,
    LLAVA_7B,
    QWEN_7B,
)

MACS = Convention(unit="macs")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"visual": -1}, r"visual = -1 was given to the cost counter; give a whole number, 0 or more\."),
    ({"visual": 0.5}, r"visual = 0\.5 was given"),
    ({"text": True}, r"text = True was given"),
    ({"kept": {32: 5}}, r"Layer 32 was given in kept, but the model has layers 0 to 31"),
    ({"kept": {-1: 5}}, r"a layer of kept = -1 was given"),
    ({"kept": {2: 577}}, r"kept\[2\] = 577 was given where 576 visual tokens are left"),
    ({"kept": {5: 10, 9: 11}}, r"kept\[9\] = 11 was given where 10 visual tokens are left"),
    ({"kept": {5: 0.25}}, r"kept\[5\] = 0\.25 was given"),
    ({"hadamard": (40,)}, r"Layer 40 was given in hadamard"),
    ({"hadamard": (3,), "skip": (3,)}, r"Layer 3 was given both as a Hadamard and as a skipped layer"),
    ({"score": "luck"}, r"score = 'luck' was given to the cost counter; choose one of 'attention', "),
    ({"score": ("attention", "luck")}, r"score = 'luck' was given to the cost counter"),
    ({"visual": 144}, r"144 visual tokens were given, which is no multiple of the 576 of one image"),
    ({"grids": [(24, 12)]}, r"The patch grids \[\(24, 12\)\] make 288 visual tokens but visual = 576"),
    ({"grids": [(24, 0)]}, r"a side of a patch grid = 0 was given"),
]


class TestBadInput:
    @pytest.mark.parametrize(("changes", "message"), BAD)
    def test_prefill(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(CapaProbeError, match=message):
            prefill_cost(LLAVA_7B, **{"visual": 576, "text": 9, **changes})

    def test_decode(self) -> None:
        with pytest.raises(CapaProbeError, match="the tokens that enter it are text"):
            decode_cost(LLAVA_7B, visual=576, text=9, convention=CAPA)
        with pytest.raises(CapaProbeError, match="new = 0 was given"):
            decode_cost(LLAVA_7B, visual=576, text=9, new=0)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"unit": "flop"}, "unit = 'flop' was given to the cost counter; choose one of 'macs', 'flops'."),
            ({"tokens": "text"}, "tokens = 'text'"),
            ({"attention": None}, "attention = None"),
            ({"kv": "mqa"}, "kv = 'mqa'"),
            ({"ffn_matrices": 4}, "ffn_matrices = 4"),
            ({"lm_head": True}, "lm_head = True"),
            ({"scorer": 1}, "scorer = 1"),
        ],
    )
    def test_conventions(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(CapaProbeError, match=message):
            Convention(**changes)

    def test_shapes(self) -> None:
        with pytest.raises(CapaProbeError, match="d_mlp = 0 was given"):
            replace(QWEN_7B, d_mlp=0)
        with pytest.raises(CapaProbeError, match="28 query heads and 3 KV heads"):
            replace(QWEN_7B, n_kv_heads=3)
        with pytest.raises(CapaProbeError, match="merge = 0 was given"):
            replace(CLIP_336, merge=0)
        with pytest.raises(CapaProbeError, match=r"full_layers = \(24,\) was given for a vision tower of 24"):
            replace(CLIP_336, full_layers=(24,))
        with pytest.raises(CapaProbeError, match=r"A str was given .* as a config; give model\.config\."):
            Shape.of("llava-hf/llava-1.5-7b-hf")

    def test_grids(self) -> None:
        free = VisionShape(1, d_model=4, d_mlp=4, d_patch=3, merge=2, projector=((16, 8),))
        shape = replace(QWEN_7B, vision=free)
        with pytest.raises(CapaProbeError, match="in this model every image has its own"):
            prefill_cost(shape, visual=4, text=1)
        with pytest.raises(CapaProbeError, match=r"A grid of 4 x 3 patches .* merges 2 x 2"):
            prefill_cost(shape, visual=4, text=1, grids=[(4, 3)])
        # Where neither part is counted, no grid is needed.
        blind = Convention(vision_tower=False, projector=False)
        assert prefill_cost(shape, visual=4, text=1, convention=blind).vision_tower == 0

    def test_costs_under_two_conventions(self) -> None:
        costs: list[Cost] = []
        units: tuple[Literal["macs", "flops"], ...] = ("macs", "flops")
        for unit in units:
            costs.append(prefill_cost(QWEN_7B, visual=4, text=1, convention=Convention(unit=unit)))  # noqa: PERF401
        with pytest.raises(
            CapaProbeError, match=r"two conventions were compared \(unit='macs' and 'flops'\)"
        ):
            costs[0].ratio(costs[1])

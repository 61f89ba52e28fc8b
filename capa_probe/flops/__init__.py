"""What a forward costs: exact counts of multiplications from a model's sizes, under named conventions.

Pure arithmetic on integers; no tensor and no model is needed. Counted are the matrix products and convolutions of the
vision tower, the projector, the decoder and the output head, the elementwise product that takes an FFN's place, and
what scoring tokens costs. Norms, softmax, activations, rotary embeddings, biases and look-ups are left out, as in every
published count.
"""

from __future__ import annotations

from capa_probe.flops.conventions import CAPA, CONVENTIONS, FASTV, PYRAMIDDROP, Convention
from capa_probe.flops.cost import Cost, LayerCost
from capa_probe.flops.counting import (
    decode_cost,
    kv_cache_values,
    prefill_cost,
    schedule_of,
    scorer_cost,
    visual_per_layer,
)
from capa_probe.flops.shape import Shape
from capa_probe.flops.vision import VisionShape

__all__ = [
    "CAPA",
    "CONVENTIONS",
    "FASTV",
    "PYRAMIDDROP",
    "Convention",
    "Cost",
    "LayerCost",
    "Shape",
    "VisionShape",
    "decode_cost",
    "kv_cache_values",
    "prefill_cost",
    "schedule_of",
    "scorer_cost",
    "visual_per_layer",
]

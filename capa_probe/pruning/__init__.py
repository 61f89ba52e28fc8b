"""Pruned and approximated forwards: context managers that change what a model computes, by hooks alone."""

from capa_probe.pruning.base import Pruner
from capa_probe.pruning.capa import CAPA
from capa_probe.pruning.fastv import FastV
from capa_probe.pruning.random_tokens import Random
from capa_probe.pruning.scoring import Scoring
from capa_probe.pruning.trace import Trace
from capa_probe.pruning.vision_attention import VisionAttention

__all__ = ["CAPA", "FastV", "Pruner", "Random", "Scoring", "Trace", "VisionAttention"]

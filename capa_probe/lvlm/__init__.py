"""The model side: hook points on unmodified transformers models, model families, token spans."""

from capa_probe.lvlm.cache import HookedCache
from capa_probe.lvlm.hooked import HookedLVLM
from capa_probe.lvlm.spans import ImageSpan, TokenSpans
from capa_probe.lvlm.tap import AttentionCall

__all__ = ["AttentionCall", "HookedCache", "HookedLVLM", "ImageSpan", "TokenSpans"]

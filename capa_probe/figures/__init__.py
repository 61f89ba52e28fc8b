"""Figures: one function each, tables in, a matplotlib Figure out."""

from capa_probe.figures.attention_contribution import attention_contribution
from capa_probe.figures.ffn_cosine import ffn_cosine
from capa_probe.figures.norms import norms
from capa_probe.figures.save import save
from capa_probe.figures.sink_counts import sink_counts

__all__ = ["attention_contribution", "ffn_cosine", "norms", "save", "sink_counts"]

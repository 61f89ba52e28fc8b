"""Figures: one function each, tables in, a matplotlib Figure out."""

from capa_probe.figures.attention_contribution import attention_contribution
from capa_probe.figures.ffn_cosine import ffn_cosine, ffn_cosines
from capa_probe.figures.norms import norm_summary, norms, norms_compared
from capa_probe.figures.overlay_tables import overlay_tables
from capa_probe.figures.overlays import overlays
from capa_probe.figures.save import save
from capa_probe.figures.sink_split import sink_split
from capa_probe.figures.split_tables import split_tables
from capa_probe.figures.token_shares import token_shares

__all__ = [
    "attention_contribution",
    "ffn_cosine",
    "ffn_cosines",
    "norm_summary",
    "norms",
    "norms_compared",
    "overlay_tables",
    "overlays",
    "save",
    "sink_split",
    "split_tables",
    "token_shares",
]

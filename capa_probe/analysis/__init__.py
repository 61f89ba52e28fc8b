"""Analyses: from profile tables to tables. None of them runs a model."""

from __future__ import annotations

from capa_probe.analysis.bimodality import sink_bimodality
from capa_probe.analysis.published import PaperAgreement, PublishedLayers, paper_agreement, published_layers
from capa_probe.analysis.redundancy import layer_ranges, redundant_layers
from capa_probe.analysis.sink_dims import measure_sink_dims, model_sink_dims
from capa_probe.analysis.sinks import classify_sinks
from capa_probe.analysis.splits import SPLITS, otsu_threshold
from capa_probe.analysis.stability import role_stability
from capa_probe.analysis.stages import visipruner_stages
from capa_probe.analysis.summary import sink_summary, sink_totals
from capa_probe.analysis.token_shares import layer_shares
from capa_probe.analysis.transitions import transition_layers

__all__ = [
    "SPLITS",
    "PaperAgreement",
    "PublishedLayers",
    "classify_sinks",
    "layer_ranges",
    "layer_shares",
    "measure_sink_dims",
    "model_sink_dims",
    "otsu_threshold",
    "paper_agreement",
    "published_layers",
    "redundant_layers",
    "role_stability",
    "sink_bimodality",
    "sink_summary",
    "sink_totals",
    "transition_layers",
    "visipruner_stages",
]

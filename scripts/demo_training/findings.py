"""What a profile of the trained model shows, in sentences for its model card, whichever way it comes out."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, ProcessorMixin

import capa_probe as cp
from capa_probe.analysis import layer_ranges, sink_summary
from capa_probe.samples import Sample


def findings(model: PreTrainedModel, processor: ProcessorMixin, samples: Sequence[Sample]) -> list[str]:
    """Profile the model and say what the two analyses find."""
    prof = cp.profile(cp.HookedLVLM(model, processor), samples, batch_size=8, progress=False)
    layers = cp.redundant_layers(prof)
    sinks = cp.classify_sinks(prof, tau="relative")
    n = prof.manifest["n_samples"]
    cosines = ", ".join(
        f"{row.layer}: {row.visual_cosine:.3f} / {row.text_cosine:.3f}" for row in layers.itertuples()
    )
    sentences = [
        f"Measured on {n} calibration questions. FFN input-output cosine by layer, visual / text tokens: {cosines}.",
        (
            f"Redundant for visual tokens at eta = 0.96: layers {layer_ranges(layers.layer[layers.redundant])}; "
            f"of these, layers whose FFN still turns text tokens: {layer_ranges(layers.layer[layers.visual_only])}."
        ),
    ]
    if sinks.empty:
        sentences.append(
            "No visual token is an attention sink at the relative threshold (5.0 at this width)."
        )
    else:
        per_layer = ", ".join(
            f"layer {row.layer}: {row.n_dump} dumps and {row.n_anchor} anchors of {row.n_visual} visual tokens"
            for row in sink_summary(sinks).itertuples()
            if row.n_sinks
        )
        sentences.append(f"Attention sinks at the relative threshold (5.0 at this width): {per_layer}.")
    return sentences

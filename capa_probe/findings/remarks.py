"""What a reader must know before believing the tables, one sentence each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from capa_probe.analysis import PaperAgreement, layer_ranges
from capa_probe.tables import describe_skipped

#: Sink dimensions that a smaller share of resamples finds again hang on few samples.
STABLE = 0.95
#: Fewer pairs say little of how stable roles are.
MIN_PAIRS = 20
#: A redundant layer with a smaller share of visual tokens above eta is redundant on average only.
MOST_TOKENS = 0.9
#: Dimensions that a sentence names at most.
_NAMED = 8


def of_data(manifest: Mapping[str, Any]) -> list[str]:
    """Samples that the run left out."""
    skipped = manifest.get("skipped")
    return [describe_skipped(skipped, manifest["n_samples"] + len(skipped))] if skipped else []


def of_dims(dims: pd.DataFrame, model_dims: pd.DataFrame) -> list[str]:
    """Published dimensions that were not found, and dimensions that few samples show."""
    said = []
    published, missing = dims.attrs["published"] or [], dims.attrs["published_not_found"]
    if missing and len(dims):
        said.append(
            f"Of the sink dimensions published for a model of these sizes ({_named(published)}), "
            f"{_named(missing)} exceed{'s' if len(missing) == 1 else ''} tau nowhere."
        )
    weak = model_dims.loc[(model_dims["n_layers"] > 0) & (model_dims["stability"] < STABLE), "dim"].tolist()
    if weak:
        one = len(weak) == 1
        said.append(
            f"Sink dimension{'' if one else 's'} {_named(weak)} hang{'s' if one else ''} on few samples: fewer than "
            f"{STABLE:.0%} of bootstrap resamples find {'it' if one else 'them'} again in any one layer."
        )
    return said


def of_sinks(bimodality: pd.DataFrame, stability: pd.DataFrame) -> list[str]:
    """Whether two kinds of sink are more than a convention, and whether a token stays of one kind."""
    said = []
    whole = bimodality[bimodality["layer"] < 0].iloc[0]
    if whole["verdict"] == "too few":
        said.append(
            f"Too few different tokens are sinks ({whole['n_tokens']}) to tell whether log C has two modes, and "
            "with it whether dumps and anchors are two kinds."
        )
    elif whole["verdict"] != "bimodal":
        said.append(
            f"log C of the sinks is not clearly bimodal, a token counted once ({whole['verdict']}: "
            f"{whole['n_tokens']:,} tokens, dip test p = {whole['dip_p']:.2g}, "
            f"Ashman's D = {whole['ashman_d']:.2g} where {whole['ashman_d_needed']:.2g} is needed), "
            "so dumps and anchors may be the two ends of one kind."
        )
    for over, what in (
        ("layers", "From one layer to the next"),
        ("prompts", "From one question about an image to another"),
    ):
        row = stability[(stability["over"] == over) & (stability["layer"] < 0)].iloc[0]
        if row["n_pairs"] >= MIN_PAIRS:
            said.append(
                f"{what}, {row['same']:.0%} of {row['n_pairs']:,} pairs of sinks keep their role "
                f"({row['same_expected']:.0%} by chance)."
            )
    return said


def of_layers(layers: pd.DataFrame, eta: float, agreement: PaperAgreement | None) -> list[str]:
    """What the redundant layers say, and what not."""
    said = []
    redundant = layers[layers["redundant"]]
    without_text = bool(layers["text_cosine"].isna().any())
    if len(redundant) and without_text:
        said.append(
            "Whether layers are redundant for visual tokens only is not known: there are no text tokens."
        )
    elif len(redundant) and not layers["visual_only"].any():
        said.append(
            f"In every redundant layer the text tokens' cosine is above eta = {eta:g} too, so that these "
            "layers say nothing particular about visual tokens."
        )
    if len(redundant) == len(layers):
        said.append(
            f"Every layer is above eta = {eta:g} for visual tokens: the threshold does not tell layers apart here."
        )
    mixed = redundant[redundant["visual_share_above"] < MOST_TOKENS]
    if len(mixed):
        least = mixed.iloc[int(np.argmin(mixed["visual_share_above"]))]
        said.append(
            f"Redundant on average only: in {_layers(mixed['layer'])}, more than a tenth of the visual tokens are not "
            f"above eta themselves (share above it: {least['visual_share_above']:.0%} in layer {least['layer']})."
        )
    if layers["visual_low"].isna().any():
        which = "" if layers["n_samples"].iloc[0] == 1 else " with visual tokens"
        said.append(f"A single sample{which} gives no intervals.")
    if agreement is not None:
        said.append(str(agreement))
    return said


def _layers(layers: pd.Series[int]) -> str:
    return f"layer{'' if len(layers) == 1 else 's'} {layer_ranges(layers)}"


def _named(dims: list[int]) -> str:
    shown = ", ".join(map(str, dims[:_NAMED]))
    return f"{shown} and {len(dims) - _NAMED} more" if len(dims) > _NAMED else shown

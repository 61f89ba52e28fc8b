"""Tables of what was found in a profile: layers, sinks and their roles, dimensions."""

from __future__ import annotations

import pandas as pd

from capa_probe.report import words
from capa_probe.report.listing import Listing, cosine, count, listing
from capa_probe.report.runs import ShownRun

#: Massive dimensions beyond this many are counted only.
_MOST_DIMS = 12


def layers(run: ShownRun) -> Listing | None:
    """FFN cosines and sinks, layer by layer."""
    if run.findings is None:
        return None
    table = run.findings.summary()
    return listing(
        "layers",
        "The numbers of each layer",
        "Sinks are counted over all samples; shares are of what all visual tokens get together, mean over samples.",
        table if len(table.columns) > 1 else table.iloc[:0],
        {
            "layer": ("layer", str),
            "visual_cosine": ("FFN cosine, visual", cosine),
            "text_cosine": ("FFN cosine, text", cosine),
            "redundant": ("redundant", str),
            "n_sinks": ("sinks", count),
            "n_dump": ("dumps", count),
            "n_anchor": ("anchors", count),
            "n_undetermined": ("undetermined", count),
            "attention_share": ("sinks' share of attention", words.percent),
            "contribution_share": ("sinks' share of contribution", words.percent),
        },
    )


def roles(run: ShownRun) -> Listing | None:
    """Sinks of all layers, by role."""
    table = None if run.findings is None else run.findings.totals
    if table is None:
        return None
    return listing(
        "roles",
        "Sinks by role, all layers",
        "A token that is a sink in several layers is one; asked about again, in another sample, it is another.",
        table[table["n_sinks"] > 0],
        {
            "role": ("role", str),
            "n_sinks": ("sinks", count),
            "n_tokens": ("different tokens", count),
            "share_sinks": ("share of visual tokens", words.percent),
            "attention_share": ("of their attention", words.percent),
            "contribution_share": ("of their contribution", words.percent),
        },
    )


def dims(run: ShownRun) -> Listing | None:
    """Dimensions in which tokens are massive."""
    table = None if run.findings is None else run.findings.model_dims
    if table is None or run.findings is None or run.findings.by_layer is None:
        return None
    if not run.findings.by_layer["n_sinks"].any():
        return None
    rest = table.iloc[_MOST_DIMS:]
    less = int((rest["n_layers"] > 0).sum())
    notes = []
    if less:
        notes.append(f"{less} more exceed{'s' if less == 1 else ''} τ less often.")
    if len(rest) > less:
        absent = len(rest) - less
        notes.append(f"{absent} more {'is' if absent == 1 else 'are'} published, and found in no layer here.")
    known = {True: "yes", False: "no"}
    return listing(
        "dims",
        "Massive dimensions",
        " ".join(notes),
        table.iloc[:_MOST_DIMS].assign(
            published=[known.get(value, "none known") for value in table["published"].iloc[:_MOST_DIMS]]
        ),
        {
            "dim": ("dimension", str),
            "layers": ("layers", str),
            "n_samples": ("samples", count),
            "largest": ("largest sink strength", words.number),
            "stability": ("found again in resamples", words.percent),
            "published": ("published", str),
        },
    )


def bimodality(run: ShownRun) -> Listing | None:
    """Whether the contribution of sinks has two modes."""
    table = None if run.findings is None else run.findings.bimodality
    if table is None or not (table["n"] > 0).any():
        return None
    return listing(
        "bimodality",
        "Whether log C of the sinks has two modes",
        "A token counts once, however many questions are about its image. "
        "Hartigan's dip test: a small p speaks against one mode. Ashman's D: two modes lie apart.",
        _all_last(table[table["n"] > 0], "layer"),
        {
            "layer": ("layer", str),
            "n": ("sinks", count),
            "n_tokens": ("different tokens", count),
            "dip_p": ("dip test, p", words.number),
            "ashman_d": ("Ashman's D", words.number),
            "ashman_d_needed": ("D needed", words.number),
            "verdict": ("verdict", str),
        },
    )


def stability(run: ShownRun) -> Listing | None:
    """Whether a token that is a sink keeps its role."""
    table = None if run.findings is None else run.findings.stability
    if table is None:
        return None
    what = {"layers": "from one layer to the next", "prompts": "from one question to another"}
    own = table[table["n_pairs"] > 0]
    return listing(
        "stability",
        "Whether sinks keep their role",
        "",
        _all_last(own.assign(over=own["over"].map(what)), "layer"),
        {
            "over": ("over", str),
            "layer": ("layer", str),
            "n_pairs": ("pairs", count),
            "same": ("same role", words.percent),
            "same_expected": ("by chance", words.percent),
        },
    )


def _all_last(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Layer -1 stands for all layers."""
    return table.assign(**{column: ["all" if layer < 0 else int(layer) for layer in table[column]]})

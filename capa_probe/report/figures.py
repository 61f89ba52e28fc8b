"""The figures of a report: each with a caption that says what it shows, or a sentence that says why it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from capa_probe.analysis.reading import FIRST_LAYER
from capa_probe.errors import CapaProbeError
from capa_probe.figures import norms, sink_counts, svg
from capa_probe.figures.style import count
from capa_probe.findings import Findings, draw
from capa_probe.tables import LayerProfile


@dataclass(frozen=True)
class DrawnFigure:
    """A figure on the page.

    Attributes:
        name: its id.
        heading: of its section.
        short: the same, for the list of sections.
        drawing: an ``<svg>`` element; None where it could not be drawn.
        caption: what it shows, or why it is missing.
    """

    name: str
    heading: str
    short: str
    drawing: str | None
    caption: str


def figures(prof: LayerProfile, findings: Findings | None, remarks: tuple[str, ...]) -> Iterator[DrawnFigure]:
    """The figures in reading order."""
    drawn = {} if findings is None else draw(prof, findings)
    n = int(prof.manifest["n_samples"])
    n_samples = count(n, "sample")
    no_sinks = _why(remarks, "Sinks")
    yield _figure(
        "ffn_cosine",
        "What the FFN does in each layer",
        "FFN redundancy",
        drawn.get("ffn_cosine"),
        "Cosine between the residual stream that enters the FFN block and the one that leaves it, "
        "cos(x, x + FFN(norm(x))); no unit; mean over all visual (blue) and over all text tokens (orange) of "
        f"{n_samples} at prefill. Near 1, the FFN hardly turns a token. A layer whose visual tokens lie above the "
        "dashed line η counts as redundant; where the text tokens do too, that says nothing particular about "
        "visual tokens. "
        "The axis is logarithmic in 1 − cosine.",
        _why(remarks, "Redundant layers"),
    )
    yield _figure(
        "attention_contribution",
        "Attention against contribution",
        "Attention and contribution",
        drawn.get("attention_contribution"),
        "Each point is a visual token in one layer. Across: attention probability from the last prompt token, mean "
        "over heads. Up: contribution, the L2 norm of what the visual token adds to the attention output of the last "
        f"prompt token, in units of the residual stream. Both axes are logarithmic; {n_samples}. A Probability Dump "
        "takes attention and contributes little; a Structural Anchor contributes as much as an ordinary token, or "
        "more. A token far to the right and low is one that a ranking by attention would overrate.",
        no_sinks,
    )
    by_layer, sinks = (None, None) if findings is None else (findings.by_layer, findings.sinks)
    any_sinks = by_layer is not None and bool(by_layer["n_sinks"].any())
    yield _figure(
        "sink_counts",
        "Sinks per layer and role",
        "Sinks",
        sink_counts(by_layer, findings.tau, n) if findings and by_layer is not None and any_sinks else None,
        f"Above: how many visual tokens of {n_samples} have a sink strength above τ, by role; layers below "
        f"{FIRST_LAYER} (shaded) have no sinks by definition. Below, in per cent: their share of the visual tokens, "
        "and their share of the attention that visual tokens get (mean over samples).",
        no_sinks,
    )
    try:
        figure, why = norms(prof.layers, sinks), ""
    except CapaProbeError as error:
        figure, why = None, str(error)
    yield _figure(
        "norms",
        "Value norms and residual updates",
        "Norms",
        figure,
        "L2 norms on a logarithmic axis, in units of the model's activations: of value vectors (mean over key-value "
        f"heads), and of what attention and FFN add to the residual stream at prefill; {n_samples}. Dotted: the stream "
        "that it is added to, so that an update far below its dotted line changes little. Triangles, where there are "
        "sinks: the median value norm of each role.",
        why,
    )


def _figure(name: str, heading: str, short: str, figure: Any, caption: str, missing: str) -> DrawnFigure:
    if figure is None:
        return DrawnFigure(name, heading, short, None, missing)
    return DrawnFigure(name, heading, short, svg(figure, name.replace("_", "-"), heading), caption)


def _why(remarks: tuple[str, ...], what: str) -> str:
    said = [remark for remark in remarks if remark.startswith((what, f"No {what.lower()}"))]
    return " ".join(said or remarks) or f"{what} were not looked for."

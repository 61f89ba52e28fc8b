"""CAPA: prune visual tokens by attention contribution, and approximate FFNs for those that stay (arXiv 2602.00247)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM
from capa_probe.lvlm.families import FAMILIES, PaperSchedule
from capa_probe.measures import resolve_tau, value_norms
from capa_probe.pruning.base import Pruner, VisualRows
from capa_probe.pruning.ffn import HadamardFFN, SkipFFN
from capa_probe.pruning.random_tokens import random_scores
from capa_probe.pruning.roles import FIRST_SINK_LAYER, anchors, sinks
from capa_probe.pruning.scoring import Scoring
from capa_probe.pruning.trace import Trace
from capa_probe.pruning.visual_ffn import VisualFFN

Score: TypeAlias = Literal["contribution", "attention", "value_norm", "removal_effect", "random"]
SCORES = ("contribution", "attention", "value_norm", "removal_effect", "random")
STAGES = ("early", "transition", "late")


@dataclass(frozen=True)
class CAPA(Pruner):
    """Keeps the visual tokens that contribute most to the current query token's residual stream.

    Attributes:
        layers: pruning layers; the paper's three per model are read as alternatives (see :meth:`paper`).
        keep: share of the original visual tokens (0.25 in the paper), or their number.
        ffn: what takes the FFN's place for visual tokens: a ``HadamardFFN``, a ``SkipFFN``, or None for the model's
            own. It may act alone, with ``layers=()``.
        score: "contribution" (the paper's), or another measure of the same query to compare with: "attention" (mean
            over heads), "value_norm", "removal_effect" (the exact local effect of removing one token), "random".
        rescore: "prefill": tokens are scored by the last prompt token and dropped once. "every_step": nothing is
            dropped; each decode step restricts its attention to the visual tokens that score best for the token just
            generated, in the pruning layers and all later ones. That is the paper's wording; it saves no prefill
            and no memory (``trace.saves_prefill``), and the first token comes from the whole prompt.
        protect_anchors: never drop a Structural Anchor; they count towards the budget.
        only_dumps: drop nothing but Probability Dumps, those of least score first, until the budget is met or none is
            left: the budget then is a lower bound.
        tau: threshold on sink strength for those two; absolute, or "relative".
        sink_dims: dimensions that make a sink; None for any that is massive on at most half of a
            sample's visual tokens.
        seed: of ``score="random"``.

    The other fields are :class:`~capa_probe.pruning.base.Pruner`'s.
    """

    ffn: VisualFFN | None = field(default=None, compare=False)
    score: Score = "contribution"
    rescore: Literal["prefill", "every_step"] = "prefill"
    protect_anchors: bool = False
    only_dumps: bool = False
    tau: float | str = 20.0
    sink_dims: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise CapaProbeError(f"score={self.score!r} was given; give one of {', '.join(SCORES)}.")
        if self.rescore not in ("prefill", "every_step"):
            raise CapaProbeError(f'rescore={self.rescore!r} was given; give "prefill" or "every_step".')
        if self.every_step and (self.uses_residual or self.ffn is not None or self.positions == "compacted"):
            raise CapaProbeError(
                'rescore="every_step" was given with protect_anchors, only_dumps, ffn or positions="compacted", which '
                'need tokens that are dropped once; use rescore="prefill".'
            )
        if self.ffn is not None and not isinstance(self.ffn, VisualFFN):
            raise CapaProbeError(
                f"ffn={self.ffn!r} was given; give a HadamardFFN (calibrate_hadamard makes one), a SkipFFN, or None."
            )

    @classmethod
    def paper(
        cls,
        model: str,
        stage: Literal["early", "transition", "late"] = "early",
        ffn: HadamardFFN | Literal["skip"] | None = None,
        **options: Any,
    ) -> CAPA:
        """The published schedule of a model: one of its three pruning layers, keep 25 %.

        The three are read as alternative operating points: only so does the paper's saving of 78 % come out. For all of
        them one after the other, give ``layers=capa_probe.pruning.capa.schedule(model).prune_layers``.

        Args:
            model: "llava-1.5-7b", "qwen2.5-vl-7b" or "internvl3-8b".
            stage: "early", "transition" or "late".
            ffn: factors for (at least) the model's Hadamard layers, of which those are taken; "skip" to skip the FFN
                there; None for the model's own FFN.
            **options: other fields.

        Raises:
            CapaProbeError: an unknown model or stage, or factors that lack a layer.
        """
        plan = schedule(model)
        if stage not in STAGES:
            raise CapaProbeError(f"stage={stage!r} was given; give one of {', '.join(STAGES)}.")
        stand_in: VisualFFN | None = None
        if ffn == "skip":
            stand_in = SkipFFN(plan.hadamard_layers)
        elif isinstance(ffn, HadamardFFN):
            stand_in = ffn.only(plan.hadamard_layers)
        elif ffn is not None:
            raise CapaProbeError(f'ffn={ffn!r} was given; give a HadamardFFN, "skip", or None.')
        layers = (plan.prune_layers[STAGES.index(stage)],)
        return cls(**{"layers": layers, "keep": 0.25, "ffn": stand_in, **options})

    @property
    def scored_by(self) -> tuple[str, ...]:
        """The chosen measure, and contribution, which tells Anchors from Dumps."""
        return (self.score, "contribution") if self.uses_residual else (self.score,)

    @property
    def every_step(self) -> bool:
        """Whether tokens are ranked anew at every decode step, which saves no prefill."""
        return self.rescore == "every_step"

    @property
    def uses_residual(self) -> bool:
        """Whether it looks for sinks in the residual stream."""
        return self.protect_anchors or self.only_dumps

    def score_tokens(self, scoring: Scoring) -> Tensor:
        """The chosen measure, from the current query token."""
        match self.score:
            case "contribution":
                return scoring.contribution
            case "attention":
                return scoring.row.mean(dim=1)
            case "value_norm":
                return value_norms(scoring.call.value)
            case "removal_effect":
                return scoring.removal_effect
            case "random":
                return random_scores(scoring, self.seed)

    def protected(self, scoring: Scoring) -> Tensor | None:
        """Anchors, or all that is no Dump."""
        if not self.uses_residual:
            return None
        assert scoring.residual is not None
        visual = scoring.visual.to(scoring.residual.device)  # with a device map, layers lie on several
        tau = resolve_tau(self.tau, scoring.residual.shape[-1])
        sink = sinks(scoring.residual, visual, tau, self.sink_dims, scoring.norm_eps)
        sink &= scoring.layer >= FIRST_SINK_LAYER
        anchor = anchors(scoring.contribution, sink, visual)
        return visual & ~(sink & ~anchor) if self.only_dumps else anchor

    def _check(self, lvlm: HookedLVLM) -> None:
        super()._check(lvlm)
        if not self.uses_residual:
            return
        resolve_tau(self.tau, lvlm.d_model)
        dims = self.sink_dims
        if dims is not None and (not dims or any(not 0 <= dim < lvlm.d_model for dim in dims)):
            raise CapaProbeError(
                f"sink_dims={list(dims)} was given; give at least one dimension, each from 0 to {lvlm.d_model - 1}."
            )

    def alongside(
        self, lvlm: HookedLVLM, visual_rows: VisualRows, trace: Trace
    ) -> AbstractContextManager[Any]:
        """The approximated FFN."""
        return nullcontext() if self.ffn is None else self.ffn.attach_rows(lvlm, visual_rows)


def schedule(model: str) -> PaperSchedule:
    """Pruning and Hadamard layers that the paper prescribes.

    Raises:
        CapaProbeError: for another model than its three.
    """
    known = {plan.model: plan for family in FAMILIES.values() if (plan := family.schedule) is not None}
    if model not in known:
        raise CapaProbeError(
            f"The paper has no schedule for {model!r}; give one of {', '.join(known)}, or CAPA's layers."
        )
    return known[model]

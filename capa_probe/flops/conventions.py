"""How to count: published numbers differ by more than the methods do, so each choice has a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from capa_probe.flops.checks import one_of


@dataclass(frozen=True)
class Convention:
    """What is counted, and in which unit. The default is what a forward of ``generate`` computes.

    Attributes:
        unit: "macs", multiply-accumulates (what most papers print as "FLOPs"), or "flops", two for each of them.
        tokens: "all", or "visual": only the visual tokens, as if there were no text.
        attention: "full", every query with every key, or "causal", a query with itself and the keys before it.
            Concerns the decoder; vision towers attend in full.
        kv: "gqa", key and value projections as narrow as they are, or "dense", as wide as the query projection.
        ffn_matrices: weight matrices of a decoder FFN; None for as many as it has (3 if gated), 2 or 3 for a formula
            that assumes them.
        vision_tower: count the vision tower's blocks, and a pooling head where it has one.
        patch_embedding: count the patch embedding, where the tower is counted.
        projector: count what maps the tower's output to visual tokens (Qwen2.5-VL: the merger).
        lm_head: "last", the output head at the last token, as ``generate`` runs it; "all", at every token that is left,
            as a plain forward runs it; "none".
        scorer: count what scoring the visual tokens costs.

    Raises:
        CapaProbeError: a name that does not exist.
    """

    unit: Literal["macs", "flops"] = "flops"
    tokens: Literal["all", "visual"] = "all"
    attention: Literal["full", "causal"] = "full"
    kv: Literal["gqa", "dense"] = "gqa"
    ffn_matrices: Literal[2, 3] | None = None
    vision_tower: bool = True
    patch_embedding: bool = True
    projector: bool = True
    lm_head: Literal["none", "last", "all"] = "last"
    scorer: bool = True

    def __post_init__(self) -> None:
        one_of("unit", self.unit, ("macs", "flops"))
        one_of("tokens", self.tokens, ("all", "visual"))
        one_of("attention", self.attention, ("full", "causal"))
        one_of("kv", self.kv, ("gqa", "dense"))
        one_of("ffn_matrices", self.ffn_matrices, (None, 2, 3))
        one_of("lm_head", self.lm_head, ("none", "last", "all"))
        for name in ("vision_tower", "patch_embedding", "projector", "scorer"):
            one_of(name, getattr(self, name), (True, False))

    @property
    def scale(self) -> int:
        """Units per multiply-accumulate: 1 or 2."""
        return 2 if self.unit == "flops" else 1

    @classmethod
    def decoder(
        cls,
        *,
        tokens: Literal["all", "visual"],
        kv: Literal["gqa", "dense"],
        ffn_matrices: Literal[2, 3] | None,
    ) -> Convention:
        """Multiply-accumulates of the decoder layers alone, attention in full: how the methods' papers count."""
        return cls(
            unit="macs",
            tokens=tokens,
            kv=kv,
            ffn_matrices=ffn_matrices,
            vision_tower=False,
            projector=False,
            lm_head="none",
            scorer=False,
        )


#: ``4nd^2 + 2n^2d + 2ndm`` per layer, text included (FastV, Eq. 5).
FASTV = Convention.decoder(tokens="all", kv="dense", ffn_matrices=2)
#: ``4nd^2 + 2n^2d + 3ndm`` per layer, visual tokens only (PyramidDrop and most tables on LLaVA-1.5).
PYRAMIDDROP = Convention.decoder(tokens="visual", kv="dense", ffn_matrices=3)
#: Visual tokens only, with the matrices that the model has: the count that gives CAPA's 78 %.
CAPA = Convention.decoder(tokens="visual", kv="gqa", ffn_matrices=None)

#: Conventions by name.
CONVENTIONS: dict[str, Convention] = {
    "forward": Convention(),
    "fastv": FASTV,
    "pyramiddrop": PYRAMIDDROP,
    "capa": CAPA,
}

"""The result of a count: per layer, per part, and in total."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from capa_probe.errors import CapaProbeError
from capa_probe.flops.conventions import Convention


@dataclass(frozen=True)
class LayerCost:
    """What one decoder layer costs, in the unit of the convention.

    Attributes:
        layer: index, from 0.
        visual: visual tokens that its attention sees.
        text: text tokens that its attention sees.
        projections: the q, k, v and o projections.
        attention: q·k and the weighted sum of the values.
        ffn: the FFN's matrix products.
        hadamard: the elementwise product that takes the FFN's place, one multiplication per visual token and dimension.
        scorer: scoring the visual tokens on this layer's attention.
    """

    layer: int
    visual: int
    text: int
    projections: int
    attention: int
    ffn: int
    hadamard: int = 0
    scorer: int = 0

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.projections + self.attention + self.ffn + self.hadamard + self.scorer


@dataclass(frozen=True)
class Cost:
    """What one forward of one sample costs, in the unit of the convention.

    Attributes:
        convention: how it was counted.
        layers: the decoder layers.
        patch_embedding: of the vision tower.
        vision_tower: its blocks.
        projector: what maps its output to visual tokens.
        lm_head: the output head.
    """

    convention: Convention
    layers: tuple[LayerCost, ...]
    patch_embedding: int = 0
    vision_tower: int = 0
    projector: int = 0
    lm_head: int = 0

    @property
    def decoder(self) -> int:
        """All decoder layers together, scoring included where it is counted."""
        return sum(layer.total for layer in self.layers)

    @property
    def total(self) -> int:
        """Everything that the convention counts."""
        return self.patch_embedding + self.vision_tower + self.projector + self.decoder + self.lm_head

    @property
    def parts(self) -> dict[str, int]:
        """Numbers that add up to the total, in the order of the forward; layers are summed."""
        return {
            "patch_embedding": self.patch_embedding,
            "vision_tower": self.vision_tower,
            "projector": self.projector,
            "projections": sum(layer.projections for layer in self.layers),
            "attention": sum(layer.attention for layer in self.layers),
            "ffn": sum(layer.ffn for layer in self.layers),
            "hadamard": sum(layer.hadamard for layer in self.layers),
            "scorer": sum(layer.scorer for layer in self.layers),
            "lm_head": self.lm_head,
        }

    def ratio(self, other: Cost) -> float:
        """This total over another one: ``pruned.ratio(vanilla)`` is the share that is left.

        Raises:
            CapaProbeError: the two were counted under different conventions, or the other is zero.
        """
        mine, its = asdict(self.convention), asdict(other.convention)
        if mine != its:
            apart = ", ".join(
                f"{name}={mine[name]!r} and {its[name]!r}" for name in mine if mine[name] != its[name]
            )
            raise CapaProbeError(
                f"Costs counted under two conventions were compared ({apart}); count both under one."
            )
        if other.total == 0:
            raise CapaProbeError(
                "A cost was compared with one of zero; count something, such as tokens, in the latter."
            )
        return self.total / other.total

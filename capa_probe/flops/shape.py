"""Sizes of a vision-language model, as far as its cost depends on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capa_probe.errors import CapaProbeError
from capa_probe.flops.checks import whole
from capa_probe.flops.vision import VisionShape

#: Decoders, by ``model_type``, whose layers are q, k, v, o projections and a gated FFN, every layer the same.
GATED_DECODERS = ("llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen3")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, and of the vision tower before it.

    Attributes:
        n_layers: decoder layers.
        d_model: width of the residual stream.
        n_heads: query heads.
        n_kv_heads: KV heads.
        d_head: width of a head.
        d_mlp: hidden width of the FFN.
        vocab: rows of the output head.
        gated: the FFN has three matrices (SwiGLU) instead of two.
        vision: the vision tower and projector; None for a decoder alone.

    Raises:
        CapaProbeError: a size that is no positive whole number, or heads that do not divide into groups.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocab: int
    gated: bool = True
    vision: VisionShape | None = None

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp", "vocab"):
            whole(name, getattr(self, name), least=1)
        if self.n_heads % self.n_kv_heads:
            raise CapaProbeError(
                f"{self.n_heads} query heads and {self.n_kv_heads} KV heads were given to the cost counter; "
                "the first must be a multiple of the second."
            )

    @property
    def d_query(self) -> int:
        """Width of all query heads together."""
        return self.n_heads * self.d_head

    @property
    def d_kv(self) -> int:
        """Width of all KV heads together."""
        return self.n_kv_heads * self.d_head

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read the sizes from a model's config, by its attributes alone.

        Args:
            config: what ``model.config`` or ``AutoConfig.from_pretrained`` gives, of a LLaVA, Qwen2.5-VL or InternVL
                model, or of a decoder of one of :data:`GATED_DECODERS`.

        Raises:
            CapaProbeError: a model whose layers are of another make.
        """
        text = getattr(config, "text_config", config)
        if not hasattr(text, "model_type"):
            raise CapaProbeError(
                f"A {type(config).__name__} was given to the cost counter as a config; give model.config."
            )
        if text.model_type not in GATED_DECODERS:
            raise CapaProbeError(
                f"A decoder of type {text.model_type} was given to the cost counter, which reads the configs of "
                f"{', '.join(GATED_DECODERS)}; give a Shape with its sizes instead."
            )
        return cls(
            n_layers=text.num_hidden_layers,
            d_model=text.hidden_size,
            n_heads=text.num_attention_heads,
            n_kv_heads=text.num_key_value_heads,
            d_head=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            d_mlp=text.intermediate_size,
            vocab=text.vocab_size,
            vision=VisionShape.of(config) if hasattr(config, "vision_config") else None,
        )

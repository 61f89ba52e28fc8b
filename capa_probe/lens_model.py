"""What TransformerLens's tools ask of a model, answered from an unmodified transformers one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.config import TransformerLensConfig

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM


class LensModel:
    """A HookedLVLM under the names that TransformerLens's analysis code reads: sizes, weights and tokens.

    Weights are views of the model's own, in TransformerLens's axis order; none is changed.

    Args:
        lvlm: the model.

    Raises:
        CapaProbeError: its norms are no RMSNorm, so that dividing by a scale is not all that they do.
    """

    def __init__(self, lvlm: HookedLVLM) -> None:
        self.lvlm = lvlm
        layers = lvlm.family.layers(lvlm.model)
        for norm in (self.ln_final, *(layer.get_submodule("input_layernorm") for layer in layers)):
            if "RMSNorm" not in type(norm).__name__:
                raise CapaProbeError(
                    f"The text tower has a {type(norm).__name__}, whose scale TransformerLens's tools cannot be given; "
                    "give a cache of a model with RMSNorm, such as Llama, Mistral or Qwen."
                )
        #: Where TransformerLens looks for a model that is in training mode.
        self.original_model = lvlm.model
        self.blocks = [LensBlock(layer, self.cfg.n_heads) for layer in layers]

    @cached_property
    def cfg(self) -> TransformerLensConfig:
        """Sizes of the decoder."""
        text = self.lvlm.model.config.get_text_config()
        n_heads = text.num_attention_heads
        return TransformerLensConfig(
            d_model=text.hidden_size,
            d_head=getattr(text, "head_dim", None) or text.hidden_size // n_heads,
            n_layers=self.lvlm.n_layers,
            n_ctx=text.max_position_embeddings,
            n_heads=n_heads,
            d_mlp=text.intermediate_size,
            d_vocab=self.W_U.shape[1],
            device=str(self.lvlm.device),
            positional_embedding_type="rotary",
            n_key_value_heads=text.num_key_value_heads,
            gated_mlp=True,
            uses_rms_norm=True,
            eps=self.lvlm.norm_eps,
            act_fn=text.hidden_act,
            normalization_type="RMS",
            final_rms=True,
            dtype=self.lvlm.model.dtype,
        )

    @property
    def ln_final(self) -> nn.Module:
        """The norm before the output head."""
        return self.lvlm.family.text_model(self.lvlm.model).get_submodule("norm")

    @property
    def unembed(self) -> nn.Module:
        """The output head."""
        return self.lvlm.model.lm_head

    @property
    def W_U(self) -> Tensor:  # noqa: N802
        """(d_model, d_vocab) weight of the output head."""
        return _weight(self.lvlm.model.lm_head).T

    @property
    def b_U(self) -> Tensor:  # noqa: N802
        """(d_vocab,) bias of the output head; zero if it has none."""
        return _bias(self.lvlm.model.lm_head)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Tensor:
        """(d_model,) sum of the output biases that layers before ``layer`` add.

        Args:
            layer: up to which.
            mlp_input: add the attention's of ``layer`` itself.
            include_mlp_biases: add those of the FFNs.
        """
        total = torch.zeros(self.cfg.d_model, device=self.lvlm.device)
        for block in self.blocks[:layer]:
            total = total + block.attn.b_O.to(total.device)
            if include_mlp_biases:
                total = total + block.mlp.b_out.to(total.device)
        return total + self.blocks[layer].attn.b_O.to(total.device) if mlp_input else total

    def to_tokens(self, text: str | Sequence[str], prepend_bos: bool = False, **options: Any) -> Tensor:
        """(batch, position) token ids of text, without special tokens unless ``prepend_bos``."""
        if self.lvlm.processor is None:
            raise CapaProbeError(
                f"The text {text!r} was given for a model without a processor; give token ids, or a processor to "
                "HookedLVLM."
            )
        tokenizer = self.lvlm.processor.tokenizer
        ids: Tensor = tokenizer(text, add_special_tokens=prepend_bos, return_tensors="pt", padding=True)[
            "input_ids"
        ]
        return ids.to(self.lvlm.device)

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token.

        Raises:
            CapaProbeError: it is several.
        """
        ids = self.to_tokens(string).flatten().tolist()
        if len(ids) != 1:
            raise CapaProbeError(f"{string!r} is {len(ids)} tokens ({ids}); give a string that is one token.")
        return int(ids[0])

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """(..., d_model) directions whose product with the normed residual stream is the logit of each token (...).

        The weight of the final norm is in them, as in a ``TransformerBridge`` in compatibility mode: attribution
        divides by the norm's scale alone.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        if isinstance(tokens, Tensor) and tokens.numel() == 1:
            tokens = int(tokens.item())
        return _weight(self.lvlm.model.lm_head)[tokens] * self._final_gain

    @property
    def _final_gain(self) -> Tensor:
        """(d_model,) what the final norm multiplies by: its weight, or in Gemma one more than that."""
        weight = _weight(self.ln_final)
        ones = torch.ones_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        with torch.no_grad():
            return (self.ln_final.forward(ones) * (1 + self.lvlm.norm_eps) ** 0.5).to(weight.dtype)

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`HookedLVLM.run_with_cache`."""
        return self.lvlm.run_with_cache(*args, **kwargs)

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`HookedLVLM.run_with_hooks`."""
        return self.lvlm.run_with_hooks(*args, **kwargs)


class LensBlock:
    """The output weights of one decoder layer."""

    def __init__(self, layer: nn.Module, n_heads: int) -> None:
        self.attn = LensAttention(layer.get_submodule("self_attn.o_proj"), n_heads)
        self.mlp = LensMLP(layer.get_submodule("mlp"))


class LensAttention:
    """The output projection of one layer's attention."""

    def __init__(self, o_proj: nn.Module, n_heads: int) -> None:
        self._o_proj, self._n_heads = o_proj, n_heads

    @property
    def W_O(self) -> Tensor:  # noqa: N802
        """(head, d_head, d_model)."""
        weight = _weight(self._o_proj).T
        return weight.reshape(self._n_heads, -1, weight.shape[1])

    @property
    def b_O(self) -> Tensor:  # noqa: N802
        """(d_model,); zero if there is none."""
        return _bias(self._o_proj)


class LensMLP:
    """The output projection of one layer's FFN; a mixture of experts has none."""

    def __init__(self, mlp: nn.Module) -> None:
        self._mlp = mlp

    @property
    def W_out(self) -> Tensor:  # noqa: N802
        """(d_mlp, d_model)."""
        return _weight(output_projection(self._mlp)).T

    @property
    def b_out(self) -> Tensor:
        """(d_model,), or one zero for all; zero if there is none, as in a mixture of experts."""
        return _bias(output_projection(self._mlp)) if hasattr(self._mlp, "down_proj") else torch.zeros(())


def output_projection(mlp: nn.Module) -> nn.Module:
    """The projection that an FFN's neurons go through.

    Raises:
        CapaProbeError: it has none, as a mixture of experts.
    """
    if not hasattr(mlp, "down_proj"):
        raise CapaProbeError(
            f"The neurons of a {type(mlp).__name__} were asked for, which has no one output projection; leave "
            "neurons=True and single neurons out for this model."
        )
    return mlp.get_submodule("down_proj")


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point or weight.is_meta:
        raise CapaProbeError(
            f"The weight of a {type(module).__name__} cannot be read as a matrix of floats (it is quantized or "
            "offloaded); load the model without quantization and on a device."
        )
    return weight


def _bias(module: nn.Module) -> Tensor:
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        return bias
    weight = _weight(module)
    return weight.new_zeros(weight.shape[0])

"""What a model must be for its hook points to mean what their names say, beyond its attention backend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from capa_probe.errors import CapaProbeError

#: The parts of a decoder layer ``x + attention(norm(x))``, then ``x + FFN(norm(x))``.
LAYER_PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
#: Those of its attention; queries and keys may be normed under any of these names.
ATTENTION_PARTS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"),
)
#: Words in the names of what decoder layers multiply the residual stream or its updates by.
_FACTORS = ("multiplier", "factor", "scale")


def check_layout(layers: Sequence[nn.Module]) -> None:
    """Refuse decoder layers that do not add the bare outputs of attention and FFN to the residual stream.

    Where a norm, a gate or a factor comes before or after the output projection (BitNet, Qwen3-Next, Gemma 2 and 3,
    OLMo 2, GLM-4, Granite), or attention knows more than softmax(q·k) (soft-capping, learned sink logits), attention
    contributions would be numbers without a meaning. Normed queries and keys (Qwen3) and sliding windows (Mistral) are
    fine.

    Raises:
        CapaProbeError: a layer is laid out otherwise; the message names what differs.
    """
    for layer in layers:
        found = [name for name, part in layer.named_children() if any(True for _ in part.parameters())]
        missing = [name for name in LAYER_PARTS if name not in found]
        extra = [name for name in found if name not in LAYER_PARTS]
        extra += [name for name, _ in layer.named_parameters(recurse=False)]
        extra += [
            f"{name}={factor:g}"
            for name, factor in vars(layer).items()
            if type(factor) in (int, float) and factor != 1 and any(word in name for word in _FACTORS)
        ]
        attention = getattr(layer, "self_attn", nn.Module())
        missing += [f"self_attn.{name}" for name in ("v_proj", "o_proj") if not hasattr(attention, name)]
        extra += _extra_in_attention(attention)
        differs = [f"without {name}" for name in missing] + [f"with {name}" for name in extra]
        if differs:
            raise CapaProbeError(
                f"The text tower has a {type(layer).__name__} {', '.join(differs)}, for which attention contributions "
                "and residual updates are not defined here; give a model whose layers add the outputs of self_attn and "
                "mlp to the residual stream as they are, such as Llama, Mistral, Qwen2, Qwen3 or Gemma 1."
            )


def _extra_in_attention(attention: nn.Module) -> list[str]:
    """What an attention has beyond projections, norms of queries and keys, and softmax."""
    extra = []
    if getattr(attention, "attn_logit_softcapping", None) is not None:
        extra.append("soft-capped attention")
    if getattr(attention, "sinks", None) is not None:
        extra.append("learned sink logits in attention")
    extra += [f"self_attn.{name}" for name, _ in attention.named_parameters(recurse=False) if name != "sinks"]
    for name, part in attention.named_children():
        learned = "norm" in name or any(True for _ in part.parameters())
        if learned and name not in ATTENTION_PARTS:
            extra.append(f"self_attn.{name}")
    widths = [
        getattr(getattr(attention, name, None), size, None)
        for name, size in (("q_proj", "out_features"), ("o_proj", "in_features"))
    ]
    if None not in widths and widths[0] != widths[1]:
        extra.append(
            f"self_attn.q_proj of {widths[0]} numbers for {widths[1]} of self_attn.o_proj, a gate among them"
        )
    return extra


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a model of which something is compiled: a compiled graph does not notice hooks that come later.

    Raises:
        CapaProbeError: ``torch.compile`` or ``Module.compile`` was applied to it or to a part of it.
    """
    for name, module in model.named_modules():
        if (
            module._compiled_call_impl is not None
            or hasattr(module, "_orig_mod")
            or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        ):
            what = f"A model whose {name} is" if name else "A model that is"
            raise CapaProbeError(
                f"{what} compiled with torch.compile was given, which would run on without its hooks; give the model "
                "as it was before, and compile afterwards."
            )

"""The attention tap: sees q, k and v of an attention call, on the model's own fast backend.

transformers lets a program register an attention function by name. Two are registered here, once: each calls
the stock function it stands for (SDPA, or the model file's own eager function), so outputs stay bit-identical,
and shows the call to whoever listens for that attention module. With one function per wrapper, a second
wrapper used inside a hook would silently take the first one's hooks away; hence the dispatch on the module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from capa_probe.errors import CapaProbeError
from capa_probe.measures import attention_probabilities

#: What the tap can stand for, and the name under which it is registered.
TAP_NAMES = {"sdpa": "capa_probe_sdpa", "eager": "capa_probe_eager"}
_STOCK_NAMES = {tap: stock for stock, tap in TAP_NAMES.items()}
#: Arguments of attention functions that change its probabilities: soft-capping, learned sink logits, position biases.
_MORE_THAN_SOFTMAX = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of one decoder layer, as the tap sees it. Nothing is copied.

    Attributes:
        layer: index of the decoder layer, from 0.
        query: (batch, head, query, d_head), after rotary embedding.
        key: (batch, kv_head, key, d_head), after rotary embedding, the KV cache included.
        value: (batch, kv_head, key, d_head), the KV cache included.
        mask: what the model passes: None (causal, or everything for a single query), bool or additive.
        scaling: factor on q·k.
        o_proj: the output projection that follows.
        pattern: (batch, head, query, key) that a listener put in the place of the softmax, or None.
        causal: whether, without a mask, a query sees no later key; False in a vision tower.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    o_proj: nn.Module
    pattern: Tensor | None = None
    causal: bool = True

    def probabilities(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Attention probabilities of some query rows.

        Args:
            start: the first row.
            stop: the row behind the last one; None for all that follow. Negative numbers count from the end.

        Returns:
            (batch, head, stop - start, key), float32; 0 where a query may not see a key.
        """
        n = self.query.shape[2]
        start, stop, _ = slice(start, stop).indices(n)
        if self.pattern is not None:
            return self.pattern[:, :, start:stop].float()
        query = self.query[:, :, start:stop]
        if self.mask is None and self.causal and n > 1:  # upper-left aligned, as SDPA's is_causal
            rows = attention_probabilities(query, self.key[:, :, :stop], self.scaling, causal=True)
            return F.pad(rows, (0, self.key.shape[2] - stop)) if stop < self.key.shape[2] else rows
        allowed, bias = self._mask_rows(
            torch.arange(n, device=query.device)[start:stop].expand(len(query), -1)
        )
        return attention_probabilities(query, self.key, self.scaling, allowed, bias)

    def row(self, index: Tensor) -> Tensor:
        """Attention probabilities of one query per sample, at ``index`` (batch,): (batch, head, key), float32."""
        index = index.to(self.query.device)
        if self.pattern is not None:
            chosen = index[:, None, None, None].expand(-1, self.pattern.shape[1], 1, self.pattern.shape[3])
            return self.pattern.gather(2, chosen).squeeze(2).float()
        rows = index[:, None, None, None].expand(-1, self.query.shape[1], 1, self.query.shape[3])
        allowed, bias = self._mask_rows(index[:, None])
        return attention_probabilities(
            self.query.gather(2, rows), self.key, self.scaling, allowed, bias
        ).squeeze(2)

    def project(self, x: Tensor) -> Tensor:
        """The output projection without its bias, of (..., head * d_head), in the model's dtype.

        Runs the module's ``forward`` and not the module, so that hooks on it do not see this side computation.
        """
        weight = self.projection_weight()
        if weight is not None:
            return F.linear(x.to(weight.dtype), weight)
        x, bias = x.to(self.query.dtype), getattr(self.o_proj, "bias", None)
        out: Tensor = self.o_proj.forward(x)
        if bias is None:
            return out
        if bias.device != out.device:  # offloaded
            bias = self.o_proj.forward(x.new_zeros(x.shape[-1]))
        return out - bias

    def projection_weight(self) -> Tensor | None:
        """(d_model, head * d_head) of the output projection; None where it is no plain matrix at hand."""
        weight = self.o_proj.weight
        if not (isinstance(self.o_proj, nn.Linear) and isinstance(weight, Tensor)):
            return None  # quantized
        return weight if weight.device == self.value.device and weight.dtype.is_floating_point else None

    def _mask_rows(self, queries: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """For query indices (batch, query): what each may see (bool) and what is added to its scores."""
        n_queries, n_keys = self.query.shape[2], self.key.shape[2]
        if self.mask is None:
            if n_queries == 1 or not self.causal:
                return None, None
            keys = torch.arange(n_keys, device=self.query.device)
            return (keys <= queries[..., None])[:, None], None  # upper-left aligned, as SDPA's is_causal
        mask = self.mask[..., :n_keys].expand(queries.shape[0], -1, -1, -1)
        index = queries[:, None, :, None].expand(-1, mask.shape[1], -1, n_keys)
        rows = mask.gather(2, index)
        if rows.dtype == torch.bool:
            return rows, None
        # An additive mask marks hidden keys with the dtype's minimum; adding it to finite scores keeps them finite.
        return rows > torch.finfo(rows.dtype).min / 2, rows


class Listener(Protocol):
    """Who listens to one attention module."""

    def on_call(self, call: AttentionCall) -> AttentionCall:
        """Look at a call and hand it on, with its query, key or pattern replaced to change the forward."""
        ...


_LISTENERS: WeakKeyDictionary[nn.Module, list[tuple[int, Listener]]] = WeakKeyDictionary()


def _tapped(stock_of: Callable[[nn.Module], Callable[..., Any]]) -> Callable[..., Any]:
    # transformers passes the mask by position from decoders and by keyword from vision towers, so the
    # parameter must be called attention_mask.
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        stock = stock_of(module)
        listeners = _LISTENERS.get(module)
        if not listeners:
            return stock(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        for name in _MORE_THAN_SOFTMAX:
            if kwargs.get(name) is not None:
                raise CapaProbeError(
                    f"{type(module).__name__} passes {name} to its attention, which the probabilities computed beside "
                    "it would lack; give a model with plain softmax attention."
                )
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        causal = kwargs.get("is_causal")
        if causal is None:
            causal = getattr(module, "is_causal", True)
        call = AttentionCall(
            0, query, key, value, attention_mask, factor, _output_projection(module), causal=bool(causal)
        )
        for layer, listener in tuple(listeners):
            call = listener.on_call(replace(call, layer=layer))
        output, weights = stock(
            module, call.query, call.key, value, attention_mask, scaling=scaling, **kwargs
        )
        if call.pattern is not None:
            output = attend(call.pattern, value).to(output.dtype)
            if weights is not None:  # what output_attentions=True returns
                weights = call.pattern.to(weights.dtype)
        return output, weights

    return attention


def _output_projection(module: nn.Module) -> nn.Module:
    """The output projection of an attention module: decoders call it o_proj, vision towers otherwise."""
    names = dict(module.named_children())
    return next(names[name] for name in ("o_proj", "out_proj", "proj", "projection_layer") if name in names)


def attend(pattern: Tensor, value: Tensor) -> Tensor:
    """Attention output of a given pattern: (batch, query, head, d_head), float32.

    Args:
        pattern: (batch, head, query, key).
        value: (batch, kv_head, key, d_head).
    """
    batch, heads, queries, keys = pattern.shape
    kv_heads = value.shape[1]
    grouped = pattern.float().reshape(batch, kv_heads, -1, keys)
    z = (grouped @ value.float()).reshape(batch, heads, queries, -1)
    return z.transpose(1, 2).contiguous()


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise CapaProbeError(
            f"{type(module).__name__} runs eager attention, but its model file offers no eager_attention_forward; "
            'load the model with attn_implementation="sdpa".'
        )
    return function


AttentionInterface.register(TAP_NAMES["sdpa"], _tapped(lambda module: sdpa_attention_forward))
AttentionInterface.register(TAP_NAMES["eager"], _tapped(_eager_of))
AttentionMaskInterface.register(TAP_NAMES["sdpa"], sdpa_mask)
AttentionMaskInterface.register(TAP_NAMES["eager"], eager_mask)


@dataclass
class _Switch:
    text_model: PreTrainedModel
    stock: str
    users: int = 0


# Models built from one config object share it, and with it the backend's name; so uses are counted per config.
_SWITCHES: dict[int, _Switch] = {}


def backend(text_model: PreTrainedModel) -> str:
    """The attention backend that a text tower runs ("sdpa", "eager", ...), whether tapped or not."""
    name = str(text_model.config._attn_implementation)
    return _STOCK_NAMES.get(name, name)


def check_backend(text_model: PreTrainedModel) -> None:
    """Refuse a backend that cannot be tapped.

    Raises:
        CapaProbeError: the text tower runs neither SDPA nor eager attention.
    """
    if backend(text_model) not in TAP_NAMES:
        raise CapaProbeError(
            f'The model runs attention backend "{backend(text_model)}", which cannot be probed; '
            'load it with attn_implementation="sdpa" (or "eager").'
        )


def listen(text_model: PreTrainedModel, module: nn.Module, layer: int, listener: Listener) -> None:
    """Show ``listener`` every call of one attention module of a text or vision tower.

    On first use the tower is switched to the tap.
    """
    key = id(text_model.config)
    switch = _SWITCHES.get(key)
    if switch is None:
        check_backend(text_model)
        switch = _Switch(text_model, backend(text_model))
        text_model.set_attn_implementation(TAP_NAMES[switch.stock])
        _SWITCHES[key] = switch
    switch.users += 1
    _LISTENERS.setdefault(module, []).append((layer, listener))


def unlisten(text_model: PreTrainedModel, module: nn.Module, listener: Listener) -> None:
    """Undo :func:`listen`; the last one to go gives the text tower its own backend back."""
    listeners = _LISTENERS[module]
    listeners.remove(next(entry for entry in listeners if entry[1] is listener))
    key = id(text_model.config)
    switch = _SWITCHES[key]
    switch.users -= 1
    if switch.users == 0:
        del _SWITCHES[key]
        # A user who chose another backend in the meantime keeps it.
        if text_model.config._attn_implementation == TAP_NAMES[switch.stock]:
            switch.text_model.set_attn_implementation(switch.stock)

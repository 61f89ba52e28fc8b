"""Hook points with TransformerLens names, attached to the model only while somebody listens.

A :class:`LazyHookPoint` is an ordinary ``transformer_lens`` HookPoint that knows how to reach its tensor in a
transformers model. Its first listener puts one module hook there, its last one takes it off again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint, LensHandle
from transformers import PreTrainedModel

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.tap import AttentionCall, listen, unlisten

Detach = Callable[[], None]
Attach = Callable[["LazyHookPoint"], Detach]


class LazyHookPoint(HookPoint):
    """A hook point that is part of the forward only while it has hooks."""

    def __init__(self, attach: Attach) -> None:
        super().__init__()
        self._attach = attach
        self._detach: Detach | None = None
        #: How often a tensor has passed through; tells whether a listener was ever called.
        self.fired = 0

    def add_hook(self, *args: Any, **kwargs: Any) -> LensHandle:
        """Add a hook as TransformerLens does, and attach to the model if it is the first."""
        handle = super().add_hook(*args, **kwargs)
        if self._detach is None:
            try:
                self._detach = self._attach(self)
            except BaseException:
                super().remove_hooks("both", including_permanent=True)
                raise
        return handle

    def remove_hooks(self, *args: Any, **kwargs: Any) -> None:
        """Remove hooks as TransformerLens does, and detach from the model if none is left."""
        super().remove_hooks(*args, **kwargs)
        if self._detach is not None and not self.has_hooks():
            self._detach()
            self._detach = None

    def fire(self, x: Tensor) -> Tensor:
        """Pass a tensor through the hooks; what they return replaces it, in the activation's own dtype.

        Raises:
            CapaProbeError: a hook returned something of another shape.
        """
        self.fired += 1
        out: Tensor = self(x)
        if out.shape != x.shape:
            raise CapaProbeError(
                f"A hook on {self.name} returned a tensor of shape {tuple(out.shape)} for an activation of shape "
                f"{tuple(x.shape)}; return one of the same shape, or None to leave it as it is."
            )
        return out if out.dtype == x.dtype else out.to(x.dtype)


class Block(nn.Module):
    """The hook points of one decoder layer."""

    def __init__(self, text_model: PreTrainedModel, layer: nn.Module, index: int, d_head: int) -> None:
        super().__init__()
        attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        tap = LayerTap(text_model, attention, index)
        self.hook_resid_pre = LazyHookPoint(at_input(layer, "hidden_states"))
        self.hook_attn_out = LazyHookPoint(at_output(attention))
        self.hook_resid_mid = LazyHookPoint(at_residual(layer.get_submodule("post_attention_layernorm")))
        self.hook_mlp_out = LazyHookPoint(at_output(mlp))
        self.hook_resid_post = LazyHookPoint(at_output(layer))
        self.attn = nn.Module()
        self.attn.hook_rot_q = tap.rot_q
        self.attn.hook_rot_k = tap.rot_k
        # Before the KV cache, so that an edit at prefill lasts.
        self.attn.hook_v = LazyHookPoint(at_output(attention.get_submodule("v_proj"), d_head))
        self.attn.hook_pattern = tap.pattern
        self.attn.hook_z = LazyHookPoint(at_input(attention.get_submodule("o_proj"), "input", d_head))
        self.mlp = nn.Module()
        self.mlp.hook_in = LazyHookPoint(at_input(mlp, "hidden_state"))
        self.observe = tap.observe


class LayerTap:
    """What listens to one layer's attention: three hook points and the probes."""

    def __init__(self, text_model: PreTrainedModel, attention: nn.Module, layer: int) -> None:
        self.layer = layer
        self.rot_q = LazyHookPoint(self._attach)
        self.rot_k = LazyHookPoint(self._attach_rot_k)
        self.pattern = LazyHookPoint(self._attach)
        self._text_model, self._attention = text_model, attention
        self._observers: list[Callable[[AttentionCall], None]] = []
        self._users = 0
        self._writes_cache = False

    def observe(self, observer: Callable[[AttentionCall], None]) -> Detach:
        """Show every attention call of this layer to ``observer``, after all edits; returns how to stop."""
        stop = self._attach(None)
        self._observers.append(observer)

        def detach() -> None:
            self._observers.remove(observer)
            stop()

        return detach

    def on_call(self, call: AttentionCall) -> AttentionCall:
        """Called by the tap: fire the hook points, apply what they change, show the result to the observers."""
        if self.rot_q.has_hooks():
            x = call.query.transpose(1, 2)
            edit = _Edit(x)
            new = self.rot_q.fire(x)
            if edit.made(new) or new.requires_grad:
                call = replace(call, query=new.transpose(1, 2))
        if self.rot_k.has_hooks():
            x = call.key.transpose(1, 2)
            edit = _Edit(x)
            new = self.rot_k.fire(x)
            if self._writes_cache and edit.made(new):
                raise CapaProbeError(
                    f"An edit of blocks.{self.layer}.attn.hook_rot_k was made while a KV cache is written, which "
                    "already holds the old keys; run with use_cache=False, or edit hook_rot_q or hook_pattern."
                )
            if edit.made(new) or new.requires_grad:
                call = replace(call, key=new.transpose(1, 2))
        if self.pattern.has_hooks():
            pattern = call.probabilities()
            edit = _Edit(pattern)
            new = self.pattern.fire(pattern)
            if edit.made(new) or new is not pattern:  # a backward hook too needs z to come from this tensor
                call = replace(call, pattern=new)
        for observer in tuple(self._observers):
            observer(call)
        return call

    def _attach(self, point: LazyHookPoint | None) -> Detach:
        if self._users == 0:
            listen(self._text_model, self._attention, self.layer, self)
        self._users += 1

        def detach() -> None:
            self._users -= 1
            if self._users == 0:
                unlisten(self._text_model, self._attention, self)

        return detach

    def _attach_rot_k(self, point: LazyHookPoint) -> Detach:
        def note_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self._writes_cache = kwargs.get("past_key_values") is not None

        detach = self._attach(point)
        handle = self._attention.register_forward_pre_hook(note_cache, with_kwargs=True)

        def detach_both() -> None:
            handle.remove()
            detach()

        return detach_both


class _Edit:
    """Tells whether a hook changed a tensor, by returning another one or in place."""

    def __init__(self, x: Tensor) -> None:
        self._before = x
        # Inference tensors count no versions, so those are compared with a copy.
        self._version = None if x.is_inference() else x._version
        self._copy = x.clone() if x.is_inference() else None

    def made(self, after: Tensor) -> bool:
        if after.data_ptr() != self._before.data_ptr() or after.stride() != self._before.stride():
            return True  # (a backward hook hands on an alias of the same data, which is no edit)
        if self._copy is not None:
            return not after.equal(self._copy)
        return after._version != self._version


def at_input(module: nn.Module, keyword: str, d_head: int | None = None) -> Attach:
    """Reach the first argument of a module; with ``d_head``, split its last axis into heads."""

    def attach(point: LazyHookPoint) -> Detach:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs[keyword]
            new = _fire(point, x, d_head)
            if new is x:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, keyword: new})

        return module.register_forward_pre_hook(hook, with_kwargs=True).remove

    return attach


def at_output(module: nn.Module, d_head: int | None = None) -> Attach:
    """Reach the (first) output of a module; with ``d_head``, split its last axis into heads."""

    def attach(point: LazyHookPoint) -> Detach:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            # Decoder layers return a bare tensor in transformers 5, a tuple before; attention a tuple in both.
            x = output[0] if isinstance(output, tuple) else output
            new = _fire(point, x, d_head)
            if new is x:
                return None
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return module.register_forward_hook(hook).remove

    return attach


def at_residual(norm: nn.Module) -> Attach:
    """Reach the residual stream that enters a norm.

    The layer also keeps that very tensor to add the block's output to, so a replacement is written into it:
    handed to the norm alone, it would change only the normed branch.
    """

    def attach(point: LazyHookPoint) -> Detach:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            # With several hooks, one may keep what another then replaces: they work on a copy.
            x = args[0].clone() if len(point.fwd_hooks) > 1 else args[0]
            new = point.fire(x)
            if new is not args[0]:
                args[0].copy_(new)

        return norm.register_forward_pre_hook(hook).remove

    return attach


def _fire(point: LazyHookPoint, x: Tensor, d_head: int | None) -> Tensor:
    if d_head is None:
        return point.fire(x)
    heads = x.view(*x.shape[:-1], -1, d_head)
    new = point.fire(heads)
    # With gradients the view goes on, so that what a listener keeps is part of the graph.
    return x if new is heads and not x.requires_grad else new.flatten(-2)

"""The engine: module hooks that score visual tokens and drop them, in a forward of an unmodified model.

A pre-hook on every decoder layer hands the layer what is left: hidden states, rotary embeddings, mask and KV cache of
the kept positions (compact), or a mask that hides the others (masked). Scores come from the attention tap while the
scored layer runs; no layer runs twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import AttentionCall, HookedLVLM
from capa_probe.lvlm.tower_view import TowerListener
from capa_probe.pruning import cache as caches
from capa_probe.pruning.arguments import at_continuation, at_prefill
from capa_probe.pruning.dropping import blank, hide, shorten, spread
from capa_probe.pruning.entering import continuation, prefill
from capa_probe.pruning.forward import Forward
from capa_probe.pruning.modes import refuse_modes
from capa_probe.pruning.ranking import choose, score
from capa_probe.pruning.trace import Trace

if TYPE_CHECKING:
    from capa_probe.pruning.base import Pruner


class Engine:
    """Runs one pruner on one model.

    Args:
        pruner: the method.
        lvlm: the model.
    """

    def __init__(self, pruner: Pruner, lvlm: HookedLVLM) -> None:
        self.pruner, self.lvlm = pruner, lvlm
        self.trace = Trace(saves_prefill=not pruner.every_step and bool(pruner.layers))
        self.forward: Forward | None = None
        self.rotary = lvlm.family.text_model(lvlm.model).rotary_emb
        same = pruner.score_at == "same"
        self.tower = (
            TowerListener(lvlm, attention="attention" in pruner.tower)
            if pruner.tower and pruner.layers
            else None
        )
        #: Layer before which tokens go -> the pruning layer, as the user counts them.
        self.drops = {layer + same: layer for layer in pruner.layers}
        #: Scored layer -> the pruning layer.
        self.scored = {layer - (not same): layer for layer in pruner.layers} if pruner.uses_attention else {}

    # -- attaching

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on the model, for a ``with`` block."""
        model, family = self.lvlm.model, self.lvlm.family
        text = family.text_model(model)
        with ExitStack() as stack:

            def hook(handle: Any) -> None:
                stack.callback(handle.remove)

            inner = model.base_model
            self._parameters = tuple(signature(inner.forward).parameters)
            hook(inner.register_forward_pre_hook(self._enter, with_kwargs=True))
            hook(inner.register_forward_hook(self._leave, always_call=True))
            if self.pruner.layers:
                hook(text.rotary_emb.register_forward_pre_hook(self._note_positions, with_kwargs=True))
                for index, layer in enumerate(family.layers(model)):
                    hook(layer.register_forward_pre_hook(self._layer_hook(index), with_kwargs=True))
                hook(text.norm.register_forward_hook(self._spread))
            if self.scored:
                stack.enter_context(self.lvlm.attention_calls(self._on_attention, self.scored))
            if self.tower is not None:
                stack.enter_context(self.tower.listening())
            yield

    def visual_rows(self, layer: int) -> Tensor | None:
        """Visual tokens among the rows of a layer's hidden states: bool (batch, row); None if there are none."""
        forward = self.forward
        if forward is None:
            raise CapaProbeError(
                "Visual tokens were asked for outside of a forward of the model; run lvlm.model itself, not a part."
            )
        if not forward.has_images:
            return None
        # One tensor for all layers of a stage: whoever asks looks up its rows once for it.
        if forward.stage not in forward.visual_rows:
            forward.visual_rows[forward.stage] = forward.image.gather(1, forward.index) >= 0
        return forward.visual_rows[forward.stage]

    # -- around one forward of the model

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        seen = 0 if cache is None else int(cache.get_seq_length())
        if self.pruner.layers:
            if cache is not None:
                caches.check_cache(cache)
            refuse_modes(cache)
        self.forward = self._prefill(given) if seen == 0 else self._continuation(given, seen)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        forward, self.forward = self.forward, None
        if self.tower is not None:
            self.tower.forget()
        if forward is None or not forward.prefill or output is None:
            return
        trace = self.trace
        trace.kept = {layer: kept.cpu() for layer, kept in forward.kept.items()}
        scored = {layer: scores for layer, scores in forward.scores.items() if layer in forward.kept}
        trace.scores = {layer: scores.cpu() for layer, scores in scored.items()}
        whole = (forward.ids.shape[1], ~forward.padding)
        trace.end(forward.layers or [whole] * self.lvlm.n_layers)

    def _prefill(self, given: dict[str, Any]) -> Forward:
        forward = prefill(self.lvlm, given)
        self.trace.begin(forward.image >= 0, forward.padding)
        alone = (forward.image < 0).all(dim=1)
        if self.pruner.layers and bool(alone.any()):
            rows = ", ".join(str(row) for row in alone.nonzero().flatten().tolist())
            which = "The prompt holds" if len(alone) == 1 else f"Rows {rows} of the batch hold"
            warnings.warn(f"{which} no image and run unpruned.", stacklevel=2)
        return forward

    def _continuation(self, given: dict[str, Any], seen: int) -> Forward:
        forward = continuation(self.lvlm, given, seen)
        if self.pruner.layers and self.trace.prefills == 0:
            warnings.warn(
                "A KV cache that was filled before the pruner was attached was given; its visual tokens stay.",
                stacklevel=2,
            )
        if self.pruner.layers and forward.has_images:
            warnings.warn(
                "An image came in a later turn; only those of the first prefill are pruned.", stacklevel=2
            )
        return forward

    def _note_positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.forward is not None:
            ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
            self.forward.rope_ids = ids[None] if ids.ndim == 2 else ids

    # -- in one layer

    def _layer_hook(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            forward = self.forward
            if forward is None:
                raise CapaProbeError(
                    "A part of a model with a pruner on it was run by itself; run lvlm.model, which the pruner follows."
                )
            hidden = args[0] if args else kwargs["hidden_states"]
            cache = kwargs.get("past_key_values")
            if layer == 0:
                forward.cache = cache
                if cache is not None:
                    caches.check_cache(cache)
            if forward.prefill:
                new, changed = self._at_prefill(forward, layer, hidden, kwargs)
            else:
                new, changed = hidden, self._at_continuation(forward, layer, hidden, kwargs)
            if self.pruner.uses_residual and layer in self.scored:
                forward.residuals[layer] = new
            if new is hidden and not changed:
                return None
            kwargs = {**kwargs, **changed}
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return hook

    def _at_prefill(
        self, forward: Forward, layer: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Drop tokens if this is the layer for it; hidden states and changed arguments of the layer."""
        if bool(self.drops) and layer in self.drops:
            hidden = self._drop(forward, self.drops[layer], hidden)
        forward.layers.append((hidden.shape[1], forward.alive))
        watched = self.pruner.every_step and any(at <= layer for at in self.scored)
        if forward.stage == 0 and not watched:
            return hidden, {}
        changed: dict[str, Any] = {}
        if forward.stage:
            if forward.stage not in forward.made:
                closed = self.pruner.positions == "compacted"
                forward.made[forward.stage] = at_prefill(forward, self.rotary, hidden, kwargs, closed)
            changed = forward.made[forward.stage]
        if forward.cache is not None:
            entry = caches.pruned_layer(forward.cache, layer)
            image = forward.image.gather(1, forward.index)
            entry.expect_prompt(forward.index, forward.real, image, forward.ids.shape[1])
            entry.hides, entry.shift, entry.stage = forward.hides, forward.shift, forward.stage
        return hidden, changed

    def _drop(self, forward: Forward, layer: int, hidden: Tensor) -> Tensor:
        """Hidden states without what this pruning layer drops."""
        pruner = self.pruner
        if not forward.has_images or pruner.every_step:
            forward.kept[layer] = forward.alive
            return hidden
        if not pruner.uses_attention:
            settings: dict[str, Any] = {"at": layer, "norm_eps": self.lvlm.norm_eps, "tower": self.tower}
            score(pruner, forward, layer, step=0, residual=hidden, **settings)
        # The query of prefill stays, should an image end the prompt.
        kept = choose(pruner, forward, layer).scatter(1, forward.last[:, None], True)
        forward.alive = forward.kept[layer] = kept & forward.alive
        forward.stage += 1
        if pruner.execution == "compact":
            return shorten(forward, hidden)
        hide(forward)
        return hidden

    def _at_continuation(
        self, forward: Forward, layer: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Changed arguments of a layer at a decode step or in a later turn."""
        entry = caches.at(forward.cache, layer)
        if entry is None:
            return {}
        length = forward.ids.shape[1]
        entry.expect(length)
        if self.pruner.every_step and length == 1 and layer in self.drops:
            self._rerank(forward, self.drops[layer])
        key = entry.stage, len(forward.kept)
        if key not in forward.made:
            forward.made[key] = at_continuation(forward, entry, self.rotary, hidden, kwargs)
        changed: dict[str, Any] = forward.made[key]
        return changed

    def _rerank(self, forward: Forward, layer: int) -> None:
        """With re-scoring: what the rest of this decode step sees."""
        kept = choose(self.pruner, forward, layer)
        forward.alive = forward.now = forward.kept[layer] = kept & forward.alive
        if len(forward.kept) == 1:
            self.trace.steps.append({})
        self.trace.steps[-1][layer] = kept[:, : self.trace.visual.shape[1]].cpu()

    def _on_attention(self, call: AttentionCall) -> None:
        """Score on a layer's attention call, where something is dropped or ranked by it."""
        forward = self.forward
        if forward is None:
            return
        settings: dict[str, Any] = {"at": call.layer, "norm_eps": self.lvlm.norm_eps, "call": call}
        layer = self.scored[call.layer]
        if forward.prefill:
            if not self.pruner.every_step and forward.has_images:
                residual = forward.residuals.pop(call.layer, None)
                score(self.pruner, forward, layer, step=0, residual=residual, tower=self.tower, **settings)
            return
        entry = caches.at(forward.cache, call.layer)
        if not self.pruner.every_step or entry is None or forward.ids.shape[1] > 1:
            return
        # From here on the positions of the step are the cache's entries: nothing was dropped from it.
        if not forward.kept:
            forward.entries, forward.alive = entry.image, entry.visible
        score(self.pruner, forward, layer, step=len(self.trace.steps) + (not forward.kept), **settings)

    # -- at the end of the decoder

    def _spread(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Every position has its row again; NaN at those that were dropped."""
        forward = self.forward
        if forward is None or not forward.prefill or forward.stage == 0:
            return None
        return (spread if self.pruner.execution == "compact" else blank)(forward, output)

"""Knock out visual tokens one at a time, exactly: from a layer on, nobody sees the token.

The prompt and its answer run through the unmodified model once. For each token that is knocked out, only the layers
from the knock-out on run again, and in them only the positions that can see the token: everything before it is as it
was, so that the KV cache of the first run serves as prefix. The copies of the prompt, one token missing from each, form
a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import AttentionCall, HookedLVLM
from capa_probe.lvlm.tap import check_backend
from capa_probe.measures import attention_contribution, hellinger, removal_effect, value_norms
from capa_probe.pruning.masks import entries_mask, take

#: Scores that are read off one attention call, in the order of the tables.
SCORES = ("contribution", "attention", "value_norm", "removal_effect")
#: How far (Hellinger) the layers run by themselves may be from the whole model.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF_TOLERANCE = 5e-2
#: What follows a prompt's own value, for inputs with one entry per position.
_LONGER = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}


@dataclass
class Vanilla:
    """One forward of a prompt and its answer, with what its later layers need to be run again.

    Attributes:
        n_prompt: positions of the prompt.
        visual: (token,) positions of the visual tokens that can be knocked out, ascending. The last prompt token is
            never among them, since the answer is read there.
        answer: (step,) ids of the vanilla answer.
        logits: (step, vocabulary), float32: what is predicted at the last prompt token and at each answer token but
            the last.
        scores: attention layer, then score to (token,), float32: measured from the last prompt token.
    """

    n_prompt: int
    visual: Tensor
    answer: Tensor
    logits: Tensor = field(default_factory=lambda: torch.zeros(0))
    scores: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _residuals: dict[int, Tensor] = field(default_factory=dict)
    _kwargs: dict[int, dict[str, Any]] = field(default_factory=dict)
    _cache: Any = None

    @property
    def length(self) -> int:
        """Positions of the prompt and of all answer tokens but the last, which nothing follows."""
        return self.n_prompt + len(self.answer) - 1


@torch.no_grad()
def run_vanilla(
    lvlm: HookedLVLM, inputs: Mapping[str, Any], answer: Sequence[int] | Tensor, layers: Iterable[int]
) -> Vanilla:
    """Run a prompt and its answer once, and keep what knocking out at some layers needs.

    Args:
        lvlm: the model.
        inputs: one sample without padding, as ``lvlm.prepare`` makes it.
        answer: (step,) ids that the unpruned model answers; at least one.
        layers: decoder layers, from 1, before which tokens will be knocked out.

    Raises:
        CapaProbeError: a batch of several samples or with padding, no answer, no image, or a layer out of range.
    """
    layers = sorted(set(layers))
    spans = lvlm.spans(inputs)
    ids = inputs["input_ids"]
    answered = torch.as_tensor(answer, dtype=torch.long, device=ids.device)
    if len(ids) != 1 or bool(spans.padding.any()):
        raise CapaProbeError(
            f"A batch of {len(ids)} samples{' with padding' if spans.padding.any() else ''} was given; knock out "
            "tokens of one sample at a time, without padding."
        )
    if answered.ndim != 1 or not len(answered):
        raise CapaProbeError("An answer without a token was given; give the ids of the model's own answer.")
    if not layers or layers[0] < 1 or layers[-1] >= lvlm.n_layers:
        raise CapaProbeError(
            f"layers={tuple(layers)} was given for a model of {lvlm.n_layers} layers; give layers from 1 to "
            f"{lvlm.n_layers - 1}."
        )
    check_backend(lvlm.family.text_model(lvlm.model))
    n_prompt = ids.shape[1]
    visual = spans.visual[0, : n_prompt - 1].nonzero().flatten()
    if not len(visual):
        raise CapaProbeError("A prompt without visual tokens was given; give one with an image.")
    vanilla = Vanilla(n_prompt, visual, answered)
    with _watching(lvlm, vanilla, layers):
        out = lvlm.model(
            **_longer(inputs, answered[:-1]),
            use_cache=True,
            logits_to_keep=len(answered),
            past_key_values=None,
        )
    vanilla.logits, vanilla._cache = out.logits[0].float(), out.past_key_values
    return vanilla


@torch.no_grad()
def knock_out(
    lvlm: HookedLVLM, vanilla: Vanilla, layer: int, positions: Tensor | None = None, batch_size: int = 32
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of the model from which one token is gone before a layer, for one token after the other.

    Args:
        lvlm: the model.
        vanilla: what :func:`run_vanilla` returned for this layer.
        layer: decoder layer before which the token goes; this layer and all later ones do not see it.
        positions: (token,) which to knock out; None for all of ``vanilla.visual``.
        batch_size: how many copies of the prompt to run at a time.

    Yields:
        Positions (copy,) and their logits (copy, step, vocabulary), float32.

    Raises:
        CapaProbeError: the layers run by themselves do not give the model's own logits.
    """
    _check_tail(lvlm, vanilla, layer)
    chosen = vanilla.visual if positions is None else positions.to(vanilla.visual.device)
    for chunk in torch.split(chosen.sort().values, batch_size):
        yield chunk, _tail(lvlm, vanilla, layer, chunk)


def effects(vanilla: Vanilla, logits: Tensor) -> dict[str, Tensor]:
    """How much the output changed, in float64 throughout since one token changes little.

    With p the vanilla distribution of the first answer token, q that after the knock-out, and y the vanilla answer:
    ``kl = sum p log(p / q)`` and ``hellinger = sqrt(1/2 sum (sqrt p - sqrt q)^2)``, which know no direction;
    ``first_drop = log p(y_1) - log q(y_1)`` and ``answer_drop``, the same summed over all tokens of y, each given those
    before it, which are negative where the answer becomes more likely.

    Args:
        vanilla: the undisturbed run.
        logits: (copy, step, vocabulary).

    Returns:
        Each effect (copy,), float64; log-probabilities and KL in nats.
    """
    before, after = vanilla.logits.double().log_softmax(dim=-1), logits.double().log_softmax(dim=-1)
    p, q = before[0], after[:, 0]
    answer = vanilla.answer.to(before.device)
    drops = (before - after).gather(2, answer[None, :, None].expand(len(logits), -1, 1)).squeeze(2)
    return {
        "kl": (p.exp() * (p - q)).sum(dim=-1).clamp(min=0),
        "hellinger": (p.exp().sqrt() - q.exp().sqrt()).norm(dim=-1) / 2**0.5,
        "first_drop": drops[:, 0],
        "answer_drop": drops.sum(dim=1),
    }


# -- the first run


@contextmanager
def _watching(lvlm: HookedLVLM, vanilla: Vanilla, layers: Sequence[int]) -> Iterator[None]:
    """Keep the arguments of the layers that will run again, and the scores of the layers around each knock-out."""

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            vanilla._kwargs[layer] = {
                name: value for name, value in kwargs.items() if name != "hidden_states"
            }
            if layer in layers:
                vanilla._residuals[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def score(call: AttentionCall) -> None:
        query = torch.tensor([vanilla.n_prompt - 1], device=call.query.device)
        row, at = call.row(query), vanilla.visual.to(call.query.device)
        found = {
            "contribution": attention_contribution(row[..., at], call.value[:, :, at], call.project),
            "attention": row.mean(dim=1)[:, at],
            "value_norm": value_norms(call.value[:, :, at]),
            # Renormalises over all keys, text among them; what comes after the query has probability 0.
            "removal_effect": removal_effect(row, call.value, call.project)[:, at],
        }
        vanilla.scores[call.layer] = {name: values[0].float().cpu() for name, values in found.items()}

    decoder = lvlm.family.layers(lvlm.model)
    scored = sorted({at for layer in layers for at in (layer - 1, layer)})
    with ExitStack() as stack:
        for layer in range(layers[0], lvlm.n_layers):
            stack.callback(decoder[layer].register_forward_pre_hook(keep(layer), with_kwargs=True).remove)
        stack.enter_context(lvlm.attention_calls(score, scored))
        yield


def _longer(inputs: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
    """Inputs with text tokens added at the end."""
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], ids[None]], dim=1)
    for name, value in _LONGER.items():
        if longer.get(name) is not None:
            longer[name] = torch.nn.functional.pad(longer[name], (0, len(ids)), value=value)
    return longer


# -- the later layers again


def _tail(lvlm: HookedLVLM, vanilla: Vanilla, layer: int, dropped: Tensor | None) -> Tensor:
    """Logits (copy, step, vocabulary) of the layers from ``layer`` on, one token (copy,) gone from each copy.

    With ``dropped`` None nothing is gone, from one copy.

    What stands before the first of the dropped tokens saw none of them: its keys and values are those of the first run.
    From there on each copy runs all positions but its own dropped one, ``query``, and sees the first run's entries
    and its own, ``key``.
    """
    device = vanilla.visual.device
    if dropped is None:
        query, first = torch.arange(vanilla.length, device=device)[None], 0
    else:
        first = int(dropped.min())
        slots = torch.arange(first, vanilla.length - 1, device=device)
        query = slots + (slots >= dropped[:, None])  # the slots before a copy's dropped token, and after it
    copies = len(query)
    key = torch.cat([torch.arange(first, device=device).expand(copies, -1), query], dim=1)
    cache = DynamicCache()
    made: dict[int, Tensor] = {}
    hidden = take(vanilla._residuals[layer], query)
    model, family = lvlm.model, lvlm.family
    decoder = family.layers(model)
    for index in range(layer, lvlm.n_layers):
        kwargs = dict(vanilla._kwargs[index])
        before = vanilla._cache.layers[index]
        prefix = (x[:, :, :first].expand(copies, -1, -1, -1) for x in (before.keys, before.values))
        cache.update(*prefix, index)
        given = kwargs.get("attention_mask")  # layers share a mask, and each mask is cut once
        if id(given) not in made:
            made[id(given)] = entries_mask(given, query, key, torch.ones_like(key, dtype=torch.bool), 0)
        kwargs["attention_mask"] = made[id(given)]
        kwargs["past_key_values"] = cache
        cos_sin = kwargs["position_embeddings"]
        kwargs["position_embeddings"] = tuple(take(x, query, x.ndim - 3) for x in cos_sin)
        if kwargs.get("position_ids") is not None:
            ids = kwargs["position_ids"]
            kwargs["position_ids"] = take(ids[..., None], query, ids.ndim - 2)[..., 0]
        out = decoder[index](hidden, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
    hidden = family.text_model(model).norm(hidden[:, -len(vanilla.answer) :])
    logits: Tensor = model.lm_head(hidden)
    return logits.float()


def _check_tail(lvlm: HookedLVLM, vanilla: Vanilla, layer: int) -> None:
    again = _tail(lvlm, vanilla, layer, None)[0]
    distance = float(hellinger(again.softmax(dim=-1), vanilla.logits.softmax(dim=-1)).max())
    if not distance <= TOLERANCE.get(lvlm.model.dtype, HALF_TOLERANCE):
        raise CapaProbeError(
            f"Layers {layer} to {lvlm.n_layers - 1}, run by themselves, give next-token distributions at a Hellinger "
            f"distance of {distance:.2g} from the model's own; this architecture does more between its layers than "
            "hand on the residual stream, and cannot be knocked out in this way."
        )

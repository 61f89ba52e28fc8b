"""The cost of a prefill, of a decode step, and of scoring tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeAlias

from capa_probe.errors import CapaProbeError
from capa_probe.flops.checks import one_of, whole
from capa_probe.flops.conventions import Convention
from capa_probe.flops.cost import Cost, LayerCost
from capa_probe.flops.shape import Shape
from capa_probe.flops.vision import Grid

#: Scores whose cost is known.
SCORES = ("attention", "value_norm", "contribution", "removal_effect", "random")
#: One of them, or several that are computed from one attention row.
Score: TypeAlias = str | Sequence[str]
FORWARD = Convention()


def prefill_cost(
    shape: Shape,
    *,
    visual: int,
    text: int,
    kept: Mapping[int, int] | None = None,
    hadamard: Iterable[int] = (),
    skip: Iterable[int] = (),
    score: Score | None = None,
    grids: Sequence[Grid] | None = None,
    convention: Convention = FORWARD,
) -> Cost:
    """Cost of one sample's prefill, pruned or not.

    Per layer, with ``n`` tokens (``n_v`` of them visual), ``D = n_heads d_head`` and ``D_kv = n_kv_heads d_head``, in
    multiply-accumulates: ``n d (2 D + 2 D_kv)`` for the projections, ``2 n^2 D`` for attention (causal:
    ``n (n + 1) D``) and ``3 n d d_mlp`` for a gated FFN; in a Hadamard layer ``n_v d`` in place of the visual tokens'
    share of the latter.

    Args:
        shape: sizes of the model.
        visual: visual tokens of the prompt, before pruning.
        text: text tokens of the prompt, and padding if the forward carries it along.
        kept: {layer: visual tokens}: what the attention of that layer and later ones sees. A key 0 is pruning
            before the decoder. None prunes nothing.
        hadamard: layers where visual tokens get an elementwise product instead of the FFN.
        skip: layers where visual tokens get nothing instead of the FFN.
        score: what tokens are scored by ("attention", "value_norm", "contribution", "removal_effect", "random"),
            or several of these: once for each layer in ``kept``, on the attention of the layer before it. None scores
            nothing.
        grids: patches (rows, columns) of each image or tile, before merging; needed only to count the vision tower or
            projector of a model whose images have grids of their own (Qwen2.5-VL).
        convention: what is counted, and in which unit.

    Raises:
        CapaProbeError: token counts, layers or grids that do not fit together.
    """
    counts = visual_per_layer(shape, visual, kept)
    text = whole("text", text)
    linear, none = _layers_in(shape, "hadamard", hadamard), _layers_in(shape, "skip", skip)
    if linear & none:
        raise CapaProbeError(
            f"Layer {min(linear & none)} was given both as a Hadamard and as a skipped layer; "
            "give it as one of them."
        )
    n_text = text if convention.tokens == "all" else 0
    layers = []
    for layer, n_visual in enumerate(counts):
        n = n_visual + n_text
        pairs = n * n if convention.attention == "full" else n * (n + 1) // 2
        full_ffn = n_text if layer in linear | none else n
        products = n_visual * shape.d_model if layer in linear else 0
        layers.append(_layer(shape, convention, layer, (n_visual, n_text), n, pairs, full_ffn, products))
    layers = _scored(shape, convention, layers, kept, score)
    vision = {}
    if shape.vision is not None and (convention.vision_tower or convention.projector):
        grids = shape.vision.grids_of(whole("visual", visual), grids)
        if convention.vision_tower:
            vision["vision_tower"] = sum(map(shape.vision.blocks, grids)) * convention.scale
        if convention.vision_tower and convention.patch_embedding:
            vision["patch_embedding"] = sum(map(shape.vision.patch_embedding, grids)) * convention.scale
        if convention.projector:
            vision["projector"] = sum(map(shape.vision.projection, grids)) * convention.scale
    left = counts[-1] + n_text
    # Counting visual tokens only, the last one, which is text, is none of them.
    last = 1 if left and convention.tokens == "all" else 0
    logits = {"none": 0, "last": last, "all": left}[convention.lm_head]
    head = logits * shape.d_model * shape.vocab * convention.scale
    return Cost(convention, tuple(layers), lm_head=head, **vision)


def decode_cost(
    shape: Shape,
    *,
    visual: int,
    text: int,
    kept: Mapping[int, int] | None = None,
    new: int = 1,
    score: Score | None = None,
    convention: Convention = FORWARD,
) -> Cost:
    """Cost of one sample's decode step: a new token attends to the KV cache and to itself.

    Args:
        shape: sizes of the model.
        visual: visual tokens of the prompt, before pruning.
        text: text tokens in the cache: of the prompt, and generated before this step.
        kept: as in :func:`prefill_cost`; what each layer's attention sees.
        new: tokens that enter at once: 1, or the length of a further prompt without images.
        score: as in :func:`prefill_cost`, where tokens are scored anew at this step.
        convention: what is counted, and in which unit.

    Raises:
        CapaProbeError: token counts or layers that do not fit together, or a convention that counts visual tokens only.
    """
    if convention.tokens == "visual":
        raise CapaProbeError(
            "A decode step was to be counted over visual tokens only, but the tokens that enter it are text; "
            'use a convention with tokens="all".'
        )
    counts = visual_per_layer(shape, visual, kept)
    text, new = whole("text", text), whole("new", new, least=1)
    layers = []
    for layer, n_visual in enumerate(counts):
        past = n_visual + text
        among_new = new * new if convention.attention == "full" else new * (new + 1) // 2
        pairs = new * past + among_new
        layers.append(_layer(shape, convention, layer, (n_visual, text + new), new, pairs, new))
    layers = _scored(shape, convention, layers, kept, score)
    logits = {"none": 0, "last": 1, "all": new}[convention.lm_head]
    head = logits * shape.d_model * shape.vocab * convention.scale
    return Cost(convention, tuple(layers), lm_head=head)


def scorer_cost(
    shape: Shape,
    *,
    visual: int,
    text: int,
    score: Score,
    queries: int = 1,
    convention: Convention = FORWARD,
) -> int:
    """Cost of scoring ``visual`` tokens once, at one layer, beside the forward.

    In multiply-accumulates, with ``n`` keys, ``n_v`` of them visual, and ``D = n_heads d_head``:

    - "attention": ``n D``, the query row of every head.
    - "value_norm": ``n n_kv_heads d_head``, the squares.
    - "contribution": a row, ``n_v D`` for weighting the values, ``n_v D d`` for one output projection of visual tokens.
    - "removal_effect": a row, ``2 n D`` for the attention output and for the mean over the other keys, ``n_v D`` for
      weighting the differences, ``n_v D d`` for one output projection of visual tokens.
    - "random": nothing.

    Args:
        shape: sizes of the model.
        visual: visual tokens that the layer's attention sees.
        text: text tokens that it sees.
        score: one of these names, or several, which share the row.
        queries: query tokens whose attention is averaged.
        convention: gives the unit, and whether text keys count; that it may leave scorers out changes nothing here.

    Raises:
        CapaProbeError: an unknown score, or a number that is no token count.
    """
    names = _names(score)
    n_visual = whole("visual", visual)
    keys = n_visual + (whole("text", text) if convention.tokens == "all" else 0)
    row = whole("queries", queries, least=1) * keys * shape.d_query
    beside_row = {
        "attention": 0,
        "contribution": n_visual * shape.d_query * (1 + shape.d_model),
        "removal_effect": (2 * keys + n_visual * (1 + shape.d_model)) * shape.d_query,
    }
    without_row = {"value_norm": keys * shape.d_kv, "random": 0}
    cost = sum({**beside_row, **without_row}[name] for name in names)
    return (cost + (row if names & beside_row.keys() else 0)) * convention.scale


def kv_cache_values(shape: Shape, *, visual: int, text: int, kept: Mapping[int, int] | None = None) -> int:
    """Numbers in one sample's KV cache, keys and values of all layers; times the bytes of the dtype for its size."""
    counts = visual_per_layer(shape, visual, kept)
    return sum(2 * shape.d_kv * (n_visual + whole("text", text)) for n_visual in counts)


def visual_per_layer(shape: Shape, visual: int, kept: Mapping[int, int] | None = None) -> tuple[int, ...]:
    """Visual tokens that each layer's attention sees, under a kept schedule.

    Args:
        shape: of the model.
        visual: visual tokens of the prompt.
        kept: layer to the visual tokens that it and all later ones see; None for no pruning.

    Raises:
        CapaProbeError: a layer that does not exist, or a count that is above the one before it.
    """
    kept = kept or {}
    pruning = sorted(_layers_in(shape, "kept", kept))
    steps = [
        (0, whole("visual", visual)),
        *((layer, whole(f"kept[{layer}]", kept[layer])) for layer in pruning),
    ]
    for (_, before), (layer, count) in pairwise(steps):
        if count > before:
            raise CapaProbeError(
                f"kept[{layer}] = {count} was given where {before} visual tokens are left; "
                "tokens that are gone stay gone, so give counts that do not grow."
            )
    ends = [*pruning, shape.n_layers]
    return tuple(count for (start, count), end in zip(steps, ends, strict=True) for _ in range(start, end))


def schedule_of(counts: Sequence[int]) -> dict[int, int]:
    """The kept schedule behind the visual tokens of each layer, such as a column of a trace's ``visual_tokens``.

    Layer 0 sees the whole prompt, unless something was dropped before the decoder, which the counts do not tell.

    Raises:
        CapaProbeError: something that is no token count.
    """
    found = [whole(f"the visual tokens of layer {layer}", count) for layer, count in enumerate(counts)]
    return {layer: after for layer, (before, after) in enumerate(pairwise(found), 1) if after != before}


def _names(score: Score) -> set[str]:
    names = {score} if isinstance(score, str) else {*score}
    for name in names:
        one_of("score", name, SCORES)
    return names


def _layers_in(shape: Shape, name: str, layers: Iterable[int]) -> set[int]:
    found = {whole(f"a layer of {name}", layer) for layer in layers}
    if found and max(found) >= shape.n_layers:
        raise CapaProbeError(
            f"Layer {max(found)} was given in {name}, but the model has layers 0 to {shape.n_layers - 1}; "
            "give layers of this model."
        )
    return found


def _layer(
    shape: Shape,
    convention: Convention,
    layer: int,
    seen: tuple[int, int],
    rows: int,
    pairs: int,
    ffn_rows: int,
    products: int = 0,
) -> LayerCost:
    """A layer that takes in ``rows`` tokens, ``ffn_rows`` of them through the FFN; ``pairs`` of query and key."""
    d, d_query = shape.d_model, shape.d_query
    d_kv = shape.d_kv if convention.kv == "gqa" else d_query
    matrices = convention.ffn_matrices or (3 if shape.gated else 2)
    scale = convention.scale
    return LayerCost(
        layer,
        *seen,
        projections=rows * d * (2 * d_query + 2 * d_kv) * scale,
        attention=2 * pairs * d_query * scale,
        ffn=ffn_rows * matrices * d * shape.d_mlp * scale,
        hadamard=products * scale,
    )


def _scored(
    shape: Shape,
    convention: Convention,
    layers: list[LayerCost],
    kept: Mapping[int, int] | None,
    score: Score | None,
) -> list[LayerCost]:
    """The layers, with the cost of scoring added where the next layer prunes."""
    if score is None:
        return layers
    _names(score)
    if not convention.scorer:
        return layers
    scoring = {layer - 1 for layer in kept or ()}
    return [
        replace(
            each,
            scorer=scorer_cost(shape, visual=each.visual, text=each.text, score=score, convention=convention),
        )
        if each.layer in scoring
        else each
        for each in layers
    ]

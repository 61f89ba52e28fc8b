"""The formulas, as pure functions on tensors.

Every function takes and returns tensors, has no state and never sees a model. Statistics (softmax, sums,
norms, cosines) are computed in float32 whatever the dtype of the input; only the output projection runs in
the dtype of its weight, as in the forward itself.

Axis words: ``batch position layer head kv_head d_head d_model query key``. With grouped-query attention
(GQA) ``head`` is a multiple of ``kv_head`` and query head ``h`` is served by KV head ``h // (head / kv_head)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capa_probe.errors import CapaProbeError

#: The paper's threshold on sink strength (CAPA, after "See What You Are Told").
TAU = 20.0
#: The same threshold as a share of its upper bound sqrt(d_model): 20 at the width 4096 of LLaVA-1.5-7B.
RELATIVE_TAU = TAU / math.sqrt(4096)
#: Below this width even Gaussian tokens often pass the relative threshold (4 % of them at 128, 17 % at 96).
NARROWEST_RELATIVE_WIDTH = 256


def attention_probabilities(
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    scaling: float,
    allowed: Bool[Tensor, "batch #head query key"] | None = None,
    bias: Float[Tensor, "batch #head query key"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "batch head query key"]:
    """Softmax attention probabilities of a few query rows, in float32.

    Args:
        query: (batch, head, query, d_head), after rotary embedding.
        key: (batch, kv_head, key, d_head), after rotary embedding; KV heads are not repeated.
        scaling: factor on q·k, usually ``d_head ** -0.5``.
        allowed: True where a query may see a key; None means everywhere.
        bias: added to the scaled scores (an additive mask); None means zero.
        causal: the queries are the tokens of the last keys, and each sees those up to its own.

    Returns:
        (batch, head, query, key), each row summing to 1, or all zero where a query sees no key at all
        (the row of a padding position).
    """
    batch, heads, queries, d_head = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.float().reshape(batch, kv_heads, -1, d_head)
    # The factor goes to the queries, which are few.
    scores = ((grouped * scaling) @ key.float().transpose(-1, -2)).reshape(batch, heads, queries, keys)
    if bias is not None:
        scores = scores + bias.float()
    hidden = None if allowed is None else ~allowed
    if causal:
        later = torch.ones(queries, queries, dtype=torch.bool, device=scores.device).triu(1)
        if hidden is None:  # each query sees a key: no row is empty
            scores[..., keys - queries :].masked_fill_(later, -math.inf)
        else:
            hidden[..., keys - queries :] |= later
    if hidden is None:
        return scores.softmax(dim=-1)
    return scores.masked_fill_(hidden, -math.inf).softmax(dim=-1).masked_fill(hidden, 0.0)


def weighted_values(
    attention: Float[Tensor, "batch head key"],
    values: Float[Tensor, "batch kv_head key d_head"],
) -> Float[Tensor, "batch key head_x_d_head"]:
    """``concat_h(A[h, i] v[g(h), i])`` for every key ``i``: (batch, key, head * d_head), in float32.

    Each row is what key ``i`` adds to the attention output of one query token, before the output projection.
    """
    batch, kv_heads, keys, d_head = values.shape
    # Both in the order of the result, which einsum would copy into it.
    weights = attention.float().transpose(1, 2).contiguous().reshape(batch, keys, kv_heads, -1, 1)
    return (weights * values.float().transpose(1, 2).unsqueeze(3)).reshape(batch, keys, -1)


def attention_contribution(
    attention: Float[Tensor, "batch head key"],
    values: Float[Tensor, "batch kv_head key d_head"],
    project: Callable[[Tensor], Tensor] | Float[Tensor, "d_model head_x_d_head"],
) -> Float[Tensor, "batch key"]:
    """Attention contribution of every key to one query token (CAPA, the paper's central score).

    ``C[i] = || sum_h A[h, i] v[g(h), i] W_O[h] ||_2``

    Args:
        attention: (batch, head, key) attention probabilities of one query token per sample.
        values: (batch, kv_head, key, d_head) value vectors.
        project: the output projection, as its weight (d_model, head * d_head) or as a function that applies it.
            A bias is no token's contribution and must be left out.

    Returns:
        (batch, key) norms in the units of the residual stream, float32.
    """
    return _project(weighted_values(attention, values), project).float().norm(dim=-1)


def removal_effect(
    attention: Float[Tensor, "batch head key"],
    values: Float[Tensor, "batch kv_head key d_head"],
    project: Callable[[Tensor], Tensor] | Float[Tensor, "d_model head_x_d_head"],
    keys: Int[Tensor, "batch chosen"] | None = None,
) -> Float[Tensor, "batch removed"]:
    """Exact change of one query token's attention output when key ``i`` is removed and the rest renormalised.

    Per head, ``o' - o = A[i] / (1 - A[i]) * (o - v[i])``; the norm is taken after the output projection and the
    sum over heads. ``1 - A[i]`` is summed over the other keys and never subtracted: at a logit gap of 20 the
    subtraction gives exactly 0 in float32.

    Args:
        attention: (batch, head, key) attention probabilities of one query token per sample.
        values: (batch, kv_head, key, d_head) value vectors.
        project: as in :func:`attention_contribution`.
        keys: (batch, chosen) which keys to remove, each on its own; None means every one.

    Returns:
        (batch, key), or (batch, chosen), norms, float32; NaN where all other keys of a head have probability 0 (none is
        visible, or float32 has no smaller number), since nothing is left to renormalise.
    """
    batch, heads, n_keys = attention.shape
    kv_heads = values.shape[1]
    a = attention.float().reshape(batch, kv_heads, heads // kv_heads, n_keys)
    v = values.float()
    output = a @ v  # batch kv_head group d_head

    # Keys below one half: the textbook form is stable. At most one key per head is above, and its ratio
    # A / (1 - A) and difference o - v cancel badly, so that key alone gets sums over the others.
    top = a.argmax(dim=-1, keepdim=True)
    is_top = torch.zeros_like(a, dtype=torch.bool).scatter_(-1, top, True)
    others = a.masked_fill(is_top, 0.0)
    mass_of_others = others.sum(dim=-1, keepdim=True)
    others_mean = (others @ v) / mass_of_others  # o' when the top key goes; NaN where it was alone

    if keys is not None:
        of_heads = keys[:, None, None].expand(-1, kv_heads, heads // kv_heads, -1)
        a, is_top = a.gather(-1, of_heads), is_top.gather(-1, of_heads)
        v = v.gather(2, keys[:, None, :, None].expand(-1, kv_heads, -1, v.shape[-1]))

    ratio = a / torch.where(is_top, 1.0, 1.0 - a)
    difference = output.unsqueeze(-2) - v.unsqueeze(2)  # batch kv_head group key d_head
    # For the top key: o' - o = A (o' - v), which needs no division by a small number.
    difference = torch.where(is_top.unsqueeze(-1), others_mean.unsqueeze(-2) - v.unsqueeze(2), difference)
    change = (ratio.unsqueeze(-1) * difference).permute(0, 3, 1, 2, 4).reshape(batch, v.shape[2], -1)
    return _project(change, project).float().norm(dim=-1)


def value_norms(values: Float[Tensor, "batch kv_head key d_head"]) -> Float[Tensor, "batch key"]:
    """L2 norm of each key's value vector, mean over KV heads: (batch, key), float32."""
    # Key by key, as the value projection lays them out.
    return values.float().transpose(1, 2).norm(dim=-1).mean(dim=2)


def sink_strength(
    x: Float[Tensor, "*shape d_model"],
    eps: float = 1e-6,
    dims: Sequence[int] | None = None,
    top: int = 1,
) -> tuple[Float[Tensor, "*shape top"], Int[Tensor, "*shape top"]]:
    """Sink strength phi and the dimensions where it is reached ("See What You Are Told", used by CAPA).

    ``phi(x) = max over d of | x[d] / sqrt(mean(x^2) + eps) |``, on the residual stream that enters a layer,
    without the norm's weight. It never exceeds sqrt(d_model).

    Args:
        x: (..., d_model) residual stream.
        eps: the model's RMSNorm epsilon.
        dims: dimensions to look at; None means all of them.
        top: how many of the largest dimensions to return, in falling order.

    Returns:
        Strengths and dimension indices, each (..., top). Where ``dims`` has fewer than ``top`` entries the rest
        is NaN with index -1.
    """
    x = x.float()
    scale = torch.rsqrt(x.norm(dim=-1, keepdim=True).square() / x.shape[-1] + eps)
    if dims is None:
        largest, index = x.abs().topk(min(top, x.shape[-1]), dim=-1)
    else:
        chosen = torch.as_tensor(sorted(set(dims)), device=x.device, dtype=torch.long)
        largest, index = x[..., chosen].abs().topk(min(top, len(chosen)), dim=-1)
        index = chosen[index]
    strength = largest * scale
    missing = top - strength.shape[-1]
    return F.pad(strength, (0, missing), value=math.nan), F.pad(index, (0, missing), value=-1)


def io_cosine(
    x: Float[Tensor, "*shape d_model"], update: Float[Tensor, "*shape d_model"]
) -> Float[Tensor, "*shape"]:
    """``cos(x, x + update)``: how far a block turns the residual stream (CAPA's FFN redundancy).

    Args:
        x: (..., d_model) residual stream entering the block.
        update: (..., d_model) what the block adds to it.

    Returns:
        (...) cosines in float32; 1 means that the block changes at most the length.
    """
    x = x.float()
    y = x + update.float()
    # As F.cosine_similarity, which makes four tensors of this size: touching new memory takes longer than the sums.
    lengths = x.norm(dim=-1).clamp(min=1e-8) * y.norm(dim=-1).clamp(min=1e-8)
    products = x * y if y.requires_grad else y.mul_(x)
    return products.sum(dim=-1) / lengths


def hadamard_alpha(
    x: Float[Tensor, "token d_model"], y: Float[Tensor, "token d_model"]
) -> Float[Tensor, " d_model"]:
    """Least-squares ``alpha`` of ``y ~ x * alpha``, channel by channel (CAPA's FFN approximation).

    ``alpha = sum_n(x_n y_n) / sum_n(x_n x_n)``, summed in float64; 1 for a channel that is always zero in ``x``.

    Args:
        x: (token, d_model) block input.
        y: (token, d_model) what the block turns it into, ``x + FFN(norm(x))``.
    """
    x, y = x.double(), y.double()
    energy = x.square().sum(dim=0)
    return torch.where(energy > 0, (x * y).sum(dim=0) / energy, 1.0).float()


def hellinger(
    p: Float[Tensor, "*shape outcome"], q: Float[Tensor, "*shape outcome"]
) -> Float[Tensor, "*shape"]:
    """Hellinger distance of two distributions over the last axis, in [0, 1], float32."""
    distance = (p.float().sqrt() - q.float().sqrt()).norm(dim=-1) / math.sqrt(2)
    return distance.clamp(max=1.0)


def kl_divergence(
    logits: Float[Tensor, "*shape outcome"], other: Float[Tensor, "*shape outcome"]
) -> Float[Tensor, "*shape"]:
    """Kullback-Leibler divergence KL(p || q) in nats, p = softmax(logits), q = softmax(other); float32.

    Summed in float64, since the terms of two distributions that are close cancel.
    """
    p, q = logits.double().log_softmax(dim=-1), other.double().log_softmax(dim=-1)
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(dim=-1).clamp(min=0.0).float()


def choose_tau(tau: float | str, d_model: int) -> float | str:
    """``tau`` itself, or for "auto" the paper's 20 where the width leaves room for it, and "relative" where not.

    Raises:
        CapaProbeError: the threshold cannot be used at this width.
    """
    if tau == "auto":
        tau = TAU if math.sqrt(d_model) > TAU else "relative"
    resolve_tau(tau, d_model)
    return tau


def resolve_tau(tau: float | str, d_model: int) -> float:
    """The threshold on sink strength for a residual stream of width ``d_model``.

    Args:
        tau: an absolute threshold, or ``"relative"`` for ``0.3125 * sqrt(d_model)``, which is 20 at width 4096.
        d_model: width of the residual stream.

    Raises:
        CapaProbeError: the absolute threshold is out of reach (phi never exceeds sqrt(d_model)), the width is
            too small for the relative one, or ``tau`` is neither a positive number nor ``"relative"``.
    """
    bound = math.sqrt(d_model)
    if tau == "relative":
        if d_model < NARROWEST_RELATIVE_WIDTH:
            raise CapaProbeError(
                f'tau="relative" was given for a model of width {d_model}, but below width '
                f"{NARROWEST_RELATIVE_WIDTH} ordinary Gaussian tokens pass it too; give an absolute tau instead."
            )
        return RELATIVE_TAU * bound
    if isinstance(tau, (str, bool)) or not tau > 0:
        raise CapaProbeError(f'tau={tau!r} was given; give a positive number or "relative".')
    if tau >= bound:
        raise CapaProbeError(
            f"tau={tau:g} can never be reached by a model of width {d_model}, since sink strength is at most "
            f'sqrt({d_model}) = {bound:.4g}; use tau="relative" ({RELATIVE_TAU:g} * sqrt(d_model) = '
            f"{RELATIVE_TAU * bound:.4g} here) or a smaller number."
        )
    return float(tau)


def _project(x: Tensor, project: Callable[[Tensor], Tensor] | Tensor) -> Tensor:
    if isinstance(project, Tensor):
        return F.linear(x.to(project.dtype), project)
    return project(x)

"""The measures again, one number at a time: plain loops over Python floats (float64), written from the definitions.

They take nested lists (``tensor.tolist()``) and know of no broadcasting, no GQA reshaping and no shortcut.
"""

from __future__ import annotations

import math
from operator import mul
from typing import Any

Nested = Any  # lists of lists of floats


def dot(a: list[float], b: list[float]) -> float:
    if len(a) != len(b):
        raise ValueError(f"vectors of {len(a)} and {len(b)} numbers")
    return math.fsum(map(mul, a, b))


def norm(a: list[float]) -> float:
    return math.sqrt(dot(a, a))


def softmax(scores: dict[int, float]) -> dict[int, float]:
    top = max(scores.values(), default=0.0)
    weights = {j: math.exp(score - top) for j, score in scores.items()}
    return {j: weight / math.fsum(weights.values()) for j, weight in weights.items()}


def attention_probabilities(
    query: Nested, key: Nested, scaling: float, allowed: Nested | None, bias: Nested | None
) -> Nested:
    """(batch, head, query, key) from query (batch, head, query, d) and key (batch, kv_head, key, d)."""
    result: Nested = []
    for b, heads in enumerate(query):
        result.append([])
        for h, rows in enumerate(heads):
            keys = key[b][h * len(key[b]) // len(heads)]
            result[-1].append([])
            for i, q in enumerate(rows):
                scores = {}
                for j, k in enumerate(keys):
                    if allowed is not None and not allowed[b][h % len(allowed[b])][i][j]:
                        continue
                    scores[j] = scaling * dot(q, k)
                    if bias is not None:
                        scores[j] += bias[b][h % len(bias[b])][i][j]
                row = softmax(scores)
                result[-1][-1].append([row.get(j, 0.0) for j in range(len(keys))])
    return result


def through_output(per_head: list[list[float]], w_o: Nested) -> list[float]:
    """``sum_h W_O[h] x_h`` with W_O (d_model, head * d_head)."""
    concatenated = [x for vector in per_head for x in vector]
    return [dot(row, concatenated) for row in w_o]


def weighted_values(attention: Nested, values: Nested) -> Nested:
    """(batch, key, head * d_head) from attention (batch, head, key) and values (batch, kv_head, key, d_head)."""
    result: Nested = []
    for weights, own in zip(attention, values, strict=True):
        result.append([])
        for i in range(len(own[0])):
            row: list[float] = []
            for h, head in enumerate(weights):
                row += [head[i] * x for x in own[h * len(own) // len(weights)][i]]
            result[-1].append(row)
    return result


def attention_contribution(attention: Nested, values: Nested, w_o: Nested) -> Nested:
    return [
        [norm(through_output([row], w_o)) for row in sample] for sample in weighted_values(attention, values)
    ]


def removal_effect(attention: Nested, values: Nested, w_o: Nested) -> Nested:
    """Take key i out, renormalise the others, and look how far the attention output moves."""

    def output(weights: list[float], own: Nested) -> list[float]:
        total = math.fsum(weights)
        return [dot(weights, coordinate) / total for coordinate in zip(*own, strict=True)]

    result: Nested = []
    for sample, own in zip(attention, values, strict=True):
        result.append([])
        for i in range(len(own[0])):
            moved = []
            for h, weights in enumerate(sample):
                v = own[h * len(own) // len(sample)]
                before = output(weights, v)
                after = output(weights[:i] + weights[i + 1 :], v[:i] + v[i + 1 :])
                moved.append([y - x for x, y in zip(before, after, strict=True)])
            result[-1].append(norm(through_output(moved, w_o)))
    return result


def value_norms(values: Nested) -> Nested:
    return [
        [math.fsum(norm(head[i]) for head in heads) / len(heads) for i in range(len(heads[0]))]
        for heads in values
    ]


def sink_strength(x: list[float], eps: float, dims: list[int]) -> list[tuple[float, int]]:
    """Strength and dimension over ``dims``, largest first."""
    rms = math.sqrt(dot(x, x) / len(x) + eps)
    return sorted(((abs(x[d]) / rms, d) for d in dims), key=lambda pair: -pair[0])


def io_cosine(x: list[float], update: list[float]) -> float:
    y = [a + b for a, b in zip(x, update, strict=True)]
    return dot(x, y) / (norm(x) * norm(y))


def hadamard_alpha(x: Nested, y: Nested) -> list[float]:
    """The minimum of ``sum_n (y_n - alpha x_n)^2`` by ternary search, which knows no closed form."""
    found = []
    for d in range(len(x[0])):

        def loss(alpha: float, d: int = d) -> float:
            return math.fsum((b[d] - alpha * a[d]) ** 2 for a, b in zip(x, y, strict=True))

        low, high = -1e4, 1e4
        for _ in range(200):
            a, b = low + (high - low) / 3, high - (high - low) / 3
            low, high = (low, b) if loss(a) < loss(b) else (a, high)
        found.append((low + high) / 2)
    return found


def hellinger(p: list[float], q: list[float]) -> float:
    return math.sqrt(math.fsum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(p, q, strict=True)) / 2)


def kl_divergence(logits: list[float], other: list[float]) -> float:
    log_sums = [math.log(math.fsum(map(math.exp, row))) for row in (logits, other)]
    return math.fsum(
        math.exp(a - log_sums[0]) * ((a - log_sums[0]) - (b - log_sums[1]))
        for a, b in zip(logits, other, strict=True)
        if a > -math.inf
    )

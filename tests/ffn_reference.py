"""The Hadamard approximation again, by loops: a full FFN forward whose output is overwritten row by row afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import capa_probe as cp

Hooks = list[tuple[str, Any]]


def overwriting(
    layers: Sequence[int],
    visual: Callable[[int], Tensor | None],
    update: Callable[[int, Tensor, Tensor], Tensor],
) -> Hooks:
    """Hooks that put ``update(layer, x, normed)`` of one row in the place of the FFN's output there."""
    hooks: Hooks = []
    for layer in layers:
        seen: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any, seen: dict[str, Tensor] = seen) -> None:
            seen[hook.name.split(".")[-1]] = x.clone()

        def put(out: Tensor, hook: Any, layer: int = layer, seen: dict[str, Tensor] = seen) -> Tensor | None:
            mask = visual(layer)
            if mask is None:
                return None
            out = out.clone()
            for b in range(out.shape[0]):
                for p in range(out.shape[1]):
                    if mask[b, p]:
                        out[b, p] = update(layer, seen["hook_resid_mid"][b, p], seen["hook_in"][b, p])
            return out

        names = ("hook_resid_mid", "mlp.hook_in")
        hooks += [(f"blocks.{layer}.{name}", keep) for name in names]
        hooks.append((f"blocks.{layer}.hook_mlp_out", put))
    return hooks


def hadamard(alpha: Mapping[int, Tensor], x: str) -> Callable[[int, Tensor, Tensor], Tensor]:
    """What one row gets: ``x * alpha`` less the residual that the layer adds again."""

    def update(layer: int, residual: Tensor, normed: Tensor) -> Tensor:
        given = residual if x == "residual" else normed
        wanted = [a * b for a, b in zip(given.tolist(), alpha[layer].tolist(), strict=True)]
        return torch.tensor([y - r for y, r in zip(wanted, residual.tolist(), strict=True)])

    return update


def activations(
    lvlm: cp.HookedLVLM, batches: Sequence[Mapping[str, Any]], layer: int, x: str
) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every visual token: each (token, d_model), float64."""
    xs, ys = [], []
    for inputs in batches:
        block = f"blocks.{layer}"
        names = [f"{block}.hook_resid_mid", f"{block}.mlp.hook_in", f"{block}.hook_mlp_out"]
        _, cache = lvlm.run_with_cache(**inputs, names_filter=names)
        mid, normed, out = (cache[name].double().numpy() for name in names)
        for b, p in lvlm.spans(inputs).visual.nonzero().tolist():
            xs.append((mid if x == "residual" else normed)[b, p])
            ys.append(mid[b, p] + out[b, p])
    return np.array(xs), np.array(ys)


def fit(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Factors by numpy's least squares, channel by channel, and R² about the mean over all channels."""
    alpha, error, deviation = [], 0.0, 0.0
    for d in range(x.shape[1]):
        solution = np.linalg.lstsq(x[:, d : d + 1], y[:, d], rcond=None)[0][0] if x[:, d].any() else 1.0
        alpha.append(solution)
        mean = sum(y[:, d]) / len(y)
        for n in range(len(y)):
            error += (y[n, d] - solution * x[n, d]) ** 2
            deviation += (y[n, d] - mean) ** 2
    return np.array(alpha), 1 - error / deviation if deviation else float("nan")

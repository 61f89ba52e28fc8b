"""Taking tokens out of the hidden states of a forward, and putting what is left back in its place at the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from capa_probe.pruning.forward import Forward
from capa_probe.pruning.masks import take


def shorten(forward: Forward, hidden: Tensor) -> Tensor:
    """Let hidden states (batch, slot, d_model) go on without the tokens that are no longer alive."""
    stay = forward.alive.gather(1, forward.index) & forward.real
    slots = stay.clone()
    slots[:, -1] = True  # generation reads the last row, padding or not
    longest = int(slots.sum(dim=1).max())
    order = slots.int().argsort(dim=1, stable=True)[:, -longest:]
    # What fills up shorter rows are dropped tokens, marked as not real. Ascending, so that order is causal.
    order = order.sort(dim=1).values
    forward.index, forward.real = forward.index.gather(1, order), stay.gather(1, order)
    forward.hides = not bool(forward.real.all())
    return take(hidden, order)


def hide(forward: Forward) -> None:
    """Mark the tokens that are no longer alive, without moving any."""
    # Padding stays as the model's own mask has it.
    forward.real = forward.alive.gather(1, forward.index) | forward.padding
    forward.hides = not bool(forward.real.all())


def blank(forward: Forward, output: Tensor) -> Tensor:
    """The decoder's output (batch, position, d_model) with NaN at tokens that were hidden."""
    return output.masked_fill(~forward.real.to(output.device)[..., None], math.nan)


def spread(forward: Forward, output: Tensor) -> Tensor:
    """The decoder's output (batch, slot, d_model) back at its (batch, position, d_model); NaN where there is none."""
    batch, length = forward.ids.shape
    index, real = forward.index.to(output.device), forward.real.to(output.device).clone()
    real[:, -1] = True
    full = output.new_full((batch, length, output.shape[-1]), math.nan)
    rows = torch.arange(batch, device=output.device)[:, None]
    return full.index_put((rows, index), output.masked_fill(~real[..., None], math.nan))

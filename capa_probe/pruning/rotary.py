"""Rotary positions of the tokens that are left: the original ones, or with the gaps closed up."""

from __future__ import annotations

import torch
from torch import Tensor


def compacted(ids: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Close the gaps that dropped tokens leave in the positions.

    A position's new value is the number of smaller values that living tokens of its sample still use, on any axis. With
    one axis these are 0, 1, 2, ...; with the three of M-RoPE, text keeps one number on all of them, the image keeps its
    place between the text before and after it, and rows and columns of its grid that became empty close up.

    Args:
        ids: (axis, batch or 1, position) position ids.
        alive: bool (batch, position), tokens that are left.

    Returns:
        New ids (axis, batch, position); and (batch,) what to add to the ids of tokens that follow.
    """
    ids = ids.expand(-1, alive.shape[0], -1)
    new, shift = torch.empty_like(ids), ids.new_zeros(alive.shape[0])
    for row, living in enumerate(alive.to(ids.device)):
        used = torch.unique(ids[:, row, living])
        new[:, row] = torch.searchsorted(used, ids[:, row].contiguous())
        shift[row] = len(used) - 1 - used[-1]
    return new, shift

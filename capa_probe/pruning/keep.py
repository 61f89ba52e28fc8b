"""How many visual tokens a budget keeps, and which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from capa_probe.errors import CapaProbeError

#: A share of the original visual tokens in (0, 1], or a count.
Keep: TypeAlias = float | int
#: What a budget is counted over: each image on its own, or all images of a sample together.
Budget: TypeAlias = Literal["image", "sample"]


def check_keep(keep: Keep, allow_none: bool = False) -> None:
    """Refuse a budget that can never be meant.

    Raises:
        CapaProbeError: a share outside (0, 1], a negative count, or 0 without ``allow_none``.
    """
    expected = "give a share in (0, 1] or a whole number of tokens above 1"
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise CapaProbeError(f"keep={keep!r} was given; {expected}.")
    if keep == 0:
        if not allow_none:
            raise CapaProbeError(
                "keep=0 was given, which leaves no visual token; say allow_none=True (--allow-none) if that is meant, "
                f"or {expected}."
            )
    elif not 0 < keep <= 1 and not (isinstance(keep, int) and keep > 1):
        raise CapaProbeError(f"keep={keep!r} was given; {expected}.")


def n_kept(keep: Keep, total: int, whose: str = "the prompt") -> int:
    """Number of tokens that a budget keeps of ``total``: ``max(1, round(keep * total))``, or the count itself.

    Args:
        keep: share or count.
        total: visual tokens that it is counted over.
        whose: they are, for the message.

    Raises:
        CapaProbeError: a count above ``total``.
    """
    if keep == 0 or total == 0:
        return 0
    if isinstance(keep, int) and keep > 1:
        if keep > total:
            raise CapaProbeError(
                f"keep={keep} was given, but {whose} has only {total} visual tokens; give a smaller count, or a share "
                "in (0, 1]."
            )
        return keep
    return max(1, round(keep * total))


def groups(image: Tensor, budget: Budget) -> Iterator[tuple[int, Tensor]]:
    """The sets of visual tokens that a budget is counted over.

    Args:
        image: (batch, position) index of the image that a visual token belongs to; -1 for anything else.
        budget: "image" or "sample".

    Yields:
        Row of the batch, and the (token,) positions of the set, in order.
    """
    for row, own in enumerate(image):
        if budget == "sample":
            positions = (own >= 0).nonzero().flatten()
            if len(positions):
                yield row, positions
        else:
            for index in own[own >= 0].unique().tolist():
                yield row, (own == index).nonzero().flatten()


def select(
    scores: Tensor,
    image: Tensor,
    alive: Tensor,
    keep: Keep,
    budget: Budget = "sample",
    protected: Tensor | None = None,
) -> Tensor:
    """Which tokens stay: all that are not visual, and the best visual ones, ties to the lower position.

    Args:
        scores: (batch, position), higher is kept first; read at living visual tokens only.
        image: (batch, position) image index of each *original* visual token, -1 elsewhere; the budget counts these.
        alive: bool (batch, position), tokens that are still there.
        keep: share of the original tokens, or a count.
        budget: whether to count per image or over all images of a sample.
        protected: bool (batch, position), visual tokens that stay in any case; they count towards the budget.

    Returns:
        bool (batch, position), part of ``alive``.

    Raises:
        CapaProbeError: a count above the number of tokens that are there, or a score that is NaN.
    """
    kept = alive & (image < 0)
    if bool((scores.isnan() & alive & (image >= 0)).any()):
        row = int((scores.isnan() & alive & (image >= 0)).any(dim=1).nonzero()[0])
        raise CapaProbeError(
            f"The score of a visual token of row {row} of the batch is NaN, so that tokens cannot be ranked; load the "
            "model in bfloat16 or float32, or choose another score."
        )
    for row, positions in groups(image, budget):
        whose = f"row {row} of the batch" if len(image) > 1 else "the prompt"
        if budget == "image":
            whose = f"image {int(image[row, positions[0]])} of {whose}"
        n = n_kept(keep, len(positions), whose)
        there = positions[alive[row, positions]]
        if n > len(there) and isinstance(keep, int) and keep > 1:
            raise CapaProbeError(
                f"keep={keep} was given, but only {len(there)} of {len(positions)} visual tokens are left at this "
                "layer; give counts that do not rise from layer to layer."
            )
        order = scores[row, there].sort(descending=True, stable=True).indices
        if protected is not None:
            safe = protected[row, there]
            order = order[safe[order].int().sort(descending=True, stable=True).indices]
            n = max(n, int(safe.sum()))
        kept[row, there[order[:n]]] = True
    return kept


def image_index(visual: Tensor, size: int | None = None) -> Tensor:
    """Number the images of a batch by their visual tokens alone.

    Args:
        visual: bool (batch, position).
        size: visual tokens of one image, where images may stand side by side; None where something is always between.

    Returns:
        (batch, position) image index within the sample, -1 outside images.
    """
    before = torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    run = (visual & ~before).cumsum(dim=1) - 1
    if size is None:
        return torch.where(visual, run, -1)
    return torch.where(visual, (visual.cumsum(dim=1) - 1) // size, -1)

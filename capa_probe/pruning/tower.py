"""The vision tower's view of the images, aligned with the keys that a method scores."""

from __future__ import annotations

import torch
from torch import Tensor

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.tower_view import TowerView


def place(view: TowerView | None, image: Tensor, index: Tensor, method: str) -> TowerView:
    """Spread what belongs to visual tokens over the keys of a batch; zeros elsewhere.

    Args:
        view: (visual, patch, ...), over all images of the batch; None if the tower did not run.
        image: (batch, position) image index of the visual tokens, -1 elsewhere. Where ``generate`` repeats prompts
            (beams, several sequences), rows of one prompt lie side by side, and the tower has seen each image once.
        index: (batch, key) position of every key.
        method: name of the method, for the message.

    Returns:
        The same with axes (batch, key, patch, ...).

    Raises:
        CapaProbeError: the tower did not run on this prompt's images.
    """
    visual = image >= 0
    counts = visual.sum(dim=1)
    n, total = 0 if view is None else len(view.features), int(counts.sum())
    copies = total // n if n else 0
    own = counts[:: copies or 1]
    if (
        view is None
        or not copies
        or not torch.equal(own.repeat_interleave(copies), counts)
        or copies * n != total
    ):
        raise CapaProbeError(
            f"{method} reads the vision tower, which did not run on the images of this prompt; give pixel_values, not "
            "features made beforehand."
        )
    first = (own.cumsum(dim=0) - own).repeat_interleave(copies)
    row = torch.where(visual, visual.cumsum(dim=1) - 1 + first[:, None], n)
    at = row.gather(1, index).to(view.features.device)

    def spread(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat([x, x.new_zeros(1, *x.shape[1:])])[at]

    features = spread(view.features)
    assert features is not None
    return TowerView(features, spread(view.received), spread(view.given))

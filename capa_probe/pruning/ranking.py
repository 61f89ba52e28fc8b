"""From a method's scores to the tokens that stay, for the forward that is running."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from capa_probe.lvlm import AttentionCall
from capa_probe.lvlm.tower_view import TowerListener
from capa_probe.pruning.forward import Forward
from capa_probe.pruning.scoring import Scoring
from capa_probe.pruning.tower import place

if TYPE_CHECKING:
    from capa_probe.pruning.base import Pruner


@torch.no_grad()
def score(
    pruner: Pruner,
    forward: Forward,
    layer: int,
    *,
    at: int,
    step: int,
    norm_eps: float,
    call: AttentionCall | None = None,
    residual: Tensor | None = None,
    tower: TowerListener | None = None,
) -> None:
    """Ask the method, and note its scores and what it protects by position.

    Args:
        pruner: the method.
        forward: the running forward.
        layer: pruning layer that the scores are for.
        at: layer that is scored.
        step: 0 at prefill, t when the t-th generated token is the query.
        norm_eps: epsilon of the model's RMSNorm.
        call: attention call of that layer, where the method reads one.
        residual: residual stream that enters that layer, where the method asks for it.
        tower: listener on the vision tower, likewise.
    """
    images, name = forward.images, type(pruner).__name__
    batch, length = images.shape
    if forward.prefill:
        index = forward.index
        query = (index == forward.last[:, None]).int().argmax(dim=1)
    else:
        index = torch.arange(length, device=images.device).expand(batch, -1)
        query = torch.zeros(batch, dtype=torch.long, device=index.device)
    image = torch.where(forward.alive.gather(1, index), images.gather(1, index), -1)
    scoring = Scoring(
        layer=at,
        prune_layer=layer,
        step=step,
        query=query,
        positions=index,
        image=image,
        ids=forward.ids,
        padding=forward.padding,
        norm_eps=norm_eps,
        attention=call,
        residual=residual,
        tower=None if tower is None else place(tower.view(), images, index, name),
    )
    scores = scoring.check(pruner.score_tokens(scoring), name).to(index.device)
    nowhere = torch.full((batch, length), math.nan, device=index.device)
    forward.scores[layer] = nowhere.scatter(1, index, torch.where(image >= 0, scores, math.nan))
    protected = pruner.protected(scoring)
    if protected is not None:
        none = torch.zeros((batch, length), dtype=torch.bool, device=index.device)
        forward.protected[layer] = none.scatter(1, index, protected.to(index.device) & (image >= 0))


def choose(pruner: Pruner, forward: Forward, layer: int) -> Tensor:
    """The tokens that stay at a layer that was scored: bool (batch, position), or (batch, entry) at a decode step."""
    return pruner.choose(
        forward.scores[layer],
        forward.images,
        forward.alive,
        pruner.keeps[layer],
        forward.protected.get(layer),
    )

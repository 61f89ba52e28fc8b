"""Which visual tokens show the parts of an image that a question is about, where the data say which parts these are.

A sample's ``regions`` are boxes in pixels of its images. A visual token stands for a patch of its image: the model's
own processor decides which pixels that are (scaled, cropped, cut into tiles, with a thumbnail or not). What the vision
tower knows of a box it may have spread over other tokens too; that cannot be told from places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM
from capa_probe.lvlm.frames import Box
from capa_probe.lvlm.spans import ImageSpan
from capa_probe.pruning import Pruner, Scoring
from capa_probe.pruning.keep import Keep

#: A token belongs to a box where they share at least this much of the smaller of the two.
OVERLAP = 0.1


def patches(span: ImageSpan, frame: Box) -> Tensor:
    """The pixels that each visual token of an image stands for.

    Args:
        span: of the image.
        frame: the part of the image that the grid covers (:meth:`capa_probe.lvlm.families.Family.frame`).

    Returns:
        float64 (visual, 4): left, top, right and bottom in pixels of the image; NaN for a token without a place.

    Raises:
        CapaProbeError: the grid of the image is not known.
    """
    if span.grid is None or span.tile_grid is None:
        raise CapaProbeError(
            f"The places of the visual tokens of image {span.index} are not known, so that no region can be found in "
            "it; prepare the inputs with lvlm.prepare."
        )
    (rows, cols), (tile_rows, tile_cols) = span.grid, span.tile_grid
    tile, row, col = (values.cpu().double() for values in (span.tile, span.row, span.col))
    thumbnail = tile < 0
    across = torch.where(thumbnail, 1.0, float(tile_cols))
    down = torch.where(thumbnail, 1.0, float(tile_rows))
    at = tile.clamp(min=0)
    x = (at % tile_cols * ~thumbnail * cols + col) / (across * cols)
    y = (at.div(tile_cols, rounding_mode="floor") * ~thumbnail * rows + row) / (down * rows)
    left, top, right, bottom = frame
    width, height = right - left, bottom - top
    edges = (
        left + width * x,
        top + height * y,
        left + width * (x + 1 / (across * cols)),
        top + height * (y + 1 / (down * rows)),
    )
    return torch.stack(edges, dim=1).masked_fill((row < 0)[:, None], torch.nan)


def overlaps(tokens: Tensor, box: Box) -> Tensor:
    """Pixels that a box shares with each token's patch: (visual,) float64, 0 for a token without a place.

    Args:
        tokens: (visual, 4) patches (:func:`patches`).
        box: in pixels of the same image.
    """
    left, top, right, bottom = box
    wide = tokens[:, 2].clamp(max=right) - tokens[:, 0].clamp(min=left)
    high = tokens[:, 3].clamp(max=bottom) - tokens[:, 1].clamp(min=top)
    return (wide.clamp(min=0) * high.clamp(min=0)).nan_to_num(0.0)


def inside(tokens: Tensor, boxes: Sequence[Box]) -> Tensor:
    """Visual tokens that belong to any of some boxes: bool (visual,).

    A token belongs to a box where they share at least a tenth of the smaller of the two; where none does, as with a
    thin line, all that touch it belong to it.
    """
    found = torch.zeros(len(tokens), dtype=torch.bool)
    areas = (tokens[:, 2] - tokens[:, 0]) * (tokens[:, 3] - tokens[:, 1])
    for box in boxes:
        shared = overlaps(tokens, box)
        smaller = areas.clamp(max=(box[2] - box[0]) * (box[3] - box[1]))
        own = (shared >= OVERLAP * smaller) & (shared > 0)
        found |= own if bool(own.any()) else shared > 0
    return found


def region_tokens(
    lvlm: HookedLVLM,
    spans: Sequence[ImageSpan],
    sizes: Sequence[tuple[int, int]],
    regions: Sequence[Sequence[Box]],
) -> list[int]:
    """The visual tokens of one prompt that belong to its regions, counted among its visual tokens from 0.

    Args:
        lvlm: the model, with its processor.
        spans: the images of the prompt, in order.
        sizes: height and width of each image, as ``Sample.open_images`` returns it.
        regions: boxes of each image.

    Raises:
        CapaProbeError: which pixels a visual token stands for is not known.
    """
    found: list[int] = []
    before = 0
    for span, size, boxes in zip(spans, sizes, regions, strict=True):
        own = inside(patches(span, lvlm.family.frame(lvlm.processor, size)), boxes)
        found += [before + number for number in own.nonzero().flatten().tolist()]
        before += len(span)
    return found


def others(tokens: Sequence[int], n_visual: int, rng: np.random.Generator) -> list[int]:
    """As many visual tokens that are not among the given ones, drawn at random; all of them where there are fewer."""
    rest = np.setdiff1d(np.arange(n_visual), np.asarray(tokens, dtype=int))
    return sorted(int(token) for token in rng.permutation(rest)[: len(tokens)])


@dataclass(frozen=True)
class KeepTokens(Pruner):
    """Keeps visual tokens that are named beforehand, and drops all others; ``keep`` does not count.

    Attributes:
        tokens: for each row of the batch, those that stay, counted among its visual tokens from 0.
    """

    tokens: tuple[tuple[int, ...], ...] = ()

    uses_attention = False

    def score_tokens(self, scoring: Scoring) -> Tensor:
        """1 for what stays, 0 for what goes."""
        visual = scoring.visual.cpu()
        if len(visual) != len(self.tokens):
            raise CapaProbeError(
                f"Tokens to keep were given for {len(self.tokens)} prompts, but the batch holds {len(visual)}; give "
                "those of every prompt."
            )
        scores = torch.zeros(visual.shape)
        for row, (own, stay) in enumerate(zip(visual, self.tokens, strict=True)):
            places = own.nonzero().flatten()
            if stay and not 0 <= min(stay) <= max(stay) < len(places):
                raise CapaProbeError(
                    f"Tokens {min(stay)} to {max(stay)} were to be kept of the {len(places)} visual tokens of row "
                    f"{row}; count them from 0."
                )
            scores[row, places[list(stay)]] = 1.0
        return scores.to(scoring.image.device)

    def choose(
        self, scores: Tensor, image: Tensor, alive: Tensor, keep: Keep, protected: Tensor | None
    ) -> Tensor:
        """All text, and the named tokens."""
        return alive & ((image < 0) | (scores > 0))

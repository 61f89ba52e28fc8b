"""Where the visual tokens, the text and the padding lie in a batch of prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from capa_probe.display import Html
from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.pictures import Pictures, describe_spans, spans_html


@dataclass(frozen=True)
class ImageSpan:
    """The visual tokens of one image, as the decoder sees them.

    Attributes:
        sample: row of the batch.
        index: which image of that sample, from 0.
        positions: (visual,) positions in the padded batch row.
        tile: (visual,) tile of each token, from 0 in reading order; -1 for a thumbnail or where unknown.
        row: (visual,) row in the tile's grid; -1 for a token with no place (a CLS token) or where unknown.
        col: (visual,) column, likewise.
        grid: rows and columns of one tile's grid; None where unknown.
        tile_grid: rows and columns of tiles; (1, 1) unless the model tiles, None where unknown.
    """

    sample: int
    index: int
    positions: Tensor
    tile: Tensor
    row: Tensor
    col: Tensor
    grid: tuple[int, int] | None
    tile_grid: tuple[int, int] | None = (1, 1)

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        return (
            f"ImageSpan(sample={self.sample}, index={self.index}, tokens={len(self)}, grid={self.grid}, "
            f"tile_grid={self.tile_grid})"
        )


@dataclass(frozen=True)
class TokenSpans:
    """Kind of every position of a batch, and the images it holds.

    Attributes:
        visual: bool (batch, position), True at visual tokens.
        text: bool (batch, position), True at all other tokens that are not padding.
        padding: bool (batch, position).
        images: the images, sample by sample in the order in which they appear.
        pictures: what the images show, to be looked at; None where tensors were prepared elsewhere.
    """

    visual: Tensor
    text: Tensor
    padding: Tensor
    images: tuple[ImageSpan, ...]
    pictures: Pictures | None = field(default=None, compare=False)

    @property
    def last(self) -> Tensor:
        """(batch,) position of each sample's last token that is not padding: the query of prefill."""
        positions = torch.arange(self.padding.shape[1], device=self.padding.device)
        return torch.where(self.padding, -1, positions).amax(dim=1)

    @property
    def unpadded(self) -> Tensor:
        """(batch, position) position in the sample's own unpadded sequence; -1 at padding."""
        return torch.where(self.padding, -1, (~self.padding).cumsum(dim=1) - 1)

    @property
    def after_images(self) -> Tensor:
        """(batch, position) True at text tokens after the sample's last visual token; nowhere if it has no image."""
        positions = torch.arange(self.visual.shape[1], device=self.visual.device)
        last_visual = torch.where(self.visual, positions, -1).amax(dim=1, keepdim=True)
        return self.text & (positions > last_visual) & (last_visual >= 0)

    def places(self) -> dict[str, Tensor]:
        """Per position (batch, position): ``image``, ``tile``, ``row`` and ``col``; -1 for text and padding."""
        table = {
            name: torch.full(self.visual.shape, -1, dtype=torch.int32)
            for name in ("image", "tile", "row", "col")
        }
        for span in self.images:
            at = span.positions.cpu()
            table["image"][span.sample, at] = span.index
            for name in ("tile", "row", "col"):
                table[name][span.sample, at] = getattr(span, name).cpu().int()
        return table

    def show(self, kept: Tensor | None = None) -> Html:
        """The images under the grids of their visual tokens, for a notebook.

        Args:
            kept: bool (batch, position), such as ``trace.kept[layer]`` of a pruner; visual tokens outside of it are
                covered. None shows all.

        Raises:
            CapaProbeError: ``kept`` has another shape.
        """
        if kept is not None and kept.shape != self.visual.shape:
            raise CapaProbeError(
                f"kept of shape {tuple(kept.shape)} was given for spans of shape {tuple(self.visual.shape)}; give bool "
                "(batch, position) of the same inputs."
            )
        return Html(spans_html(self, kept), repr(self))

    def _repr_html_(self) -> str:
        return self.show().markup

    def __repr__(self) -> str:
        return describe_spans(self)


def square_grid(rows: int, cols: int, leading: int = 0) -> tuple[Tensor, Tensor]:
    """Row and column of each token of a grid in reading order, after ``leading`` tokens without a place (-1)."""
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    nowhere = torch.full((leading,), -1)
    return torch.cat([nowhere, row.flatten()]), torch.cat([nowhere, col.flatten()])


def runs(mask: Tensor) -> list[Tensor]:
    """Positions of each unbroken run of True in a bool (position,), in order."""
    positions = mask.nonzero().flatten()
    if len(positions) == 0:
        return []
    breaks = (positions.diff() != 1).nonzero().flatten() + 1
    return list(positions.tensor_split(breaks.cpu()))

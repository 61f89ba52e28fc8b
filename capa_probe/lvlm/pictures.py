"""How a model, and the tokens of a prompt, show themselves in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capa_probe.display import card, facts, picture, short_path, side_by_side, text
from capa_probe.errors import CapaProbeError

if TYPE_CHECKING:
    from PIL.Image import Image

    from capa_probe.lvlm.families import Family
    from capa_probe.lvlm.hooked import HookedLVLM
    from capa_probe.lvlm.spans import ImageSpan, TokenSpans

#: Pictures that a card shows at most; pages made of notebooks stay small.
MOST_PICTURES = 6
_COLOURS = {"visual": "#0072b2", "text": "#e69f00", "padding": "rgba(128, 128, 128, 0.35)"}


@dataclass(frozen=True)
class Pictures:
    """The images of a batch, sample by sample, kept to be looked at: no model tensor shows them.

    Attributes:
        family: of the model.
        processor: of the model, which says what part of an image its tokens cover.
        images: as they were given to ``prepare``, in RGB.
    """

    family: Family
    processor: Any
    images: tuple[Image, ...]

    def covered(self, number: int) -> Image:
        """The part of an image that its grid of visual tokens covers."""
        return self.family.seen(self.processor, self.images[number])


def spans_html(spans: TokenSpans, kept: Tensor | None = None) -> str:
    """The prompts as strips of their kinds of tokens, and every image under the grid of its visual tokens.

    Args:
        spans: of a batch.
        kept: bool (batch, position); visual tokens outside of it are covered. None covers none.
    """
    strips = [_strip(spans, row) for row in range(min(len(spans.visual), MOST_PICTURES))]
    legend = "&ensp;".join(
        f'<span style="color: {colour}; font-size: 15px;">&#9632;</span> {name}'
        for name, colour in _COLOURS.items()
    )
    shown = [
        _image(spans, number, span, kept)
        for number, span in enumerate(spans.images[:MOST_PICTURES])
        if spans.pictures is not None
    ]
    more = len(spans.images) - MOST_PICTURES if shown else 0
    return card(
        str(spans),
        f'<div style="font-size: 12px;">{legend}</div>',
        *strips,
        side_by_side(shown),
        text(f"{more} more images are not shown.") if more > 0 else "",
    )


def _strip(spans: TokenSpans, row: int) -> str:
    """One prompt from its first to its last position, coloured by kind."""
    kinds = {name: getattr(spans, name)[row].cpu() for name in _COLOURS}
    length = spans.visual.shape[1]
    parts = []
    for name, mask in kinds.items():
        edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff().nonzero().flatten().tolist()
        parts += [
            f'<rect x="{start}" width="{stop - start}" height="1" fill="{_COLOURS[name]}">'
            f"<title>{name}: positions {start} to {stop - 1}</title></rect>"
            for start, stop in zip(edges[::2], edges[1::2], strict=True)
        ]
    counts = ", ".join(f"{int(mask.sum())} {name}" for name, mask in kinds.items())
    return (
        f'<svg role="img" aria-label="sample {row}: {counts}" viewBox="0 0 {length} 1" width="100%" height="10" '
        f'preserveAspectRatio="none" style="display: block; margin: 3px 0;">{"".join(parts)}</svg>'
    )


def _image(spans: TokenSpans, number: int, span: ImageSpan, kept: Tensor | None) -> str:
    assert spans.pictures is not None
    name = f"sample {span.sample}, image {span.index}: {len(span)} visual tokens"
    try:
        covered = spans.pictures.covered(number)
    except (CapaProbeError, OSError, ValueError) as error:
        return text(f"{name}; the image cannot be shown: {error}")
    if span.grid is None or span.tile_grid is None:
        return picture(covered, label=name, caption=f"{name}, their places are not known")
    stays = None if kept is None else kept[span.sample, span.positions.to(kept.device)].cpu()
    if stays is not None:
        name += f", {int(stays.sum())} kept"
    shown = [
        picture(covered, _grid(span, covered.size, span.tile_grid, stays), name, f"{name}, {_layout(span)}")
    ]
    if bool((span.tile < 0).any()):
        caption = "its thumbnail, seen whole"
        shown.append(picture(covered, _grid(span, covered.size, None, stays), f"{name}, thumbnail", caption))
    return "".join(shown)


def _layout(span: ImageSpan) -> str:
    assert span.grid is not None
    assert span.tile_grid is not None
    grid, tiles = (f"{rows} x {cols}" for rows, cols in (span.grid, span.tile_grid))
    return f"grid {grid}" if span.tile_grid == (1, 1) else f"{tiles} tiles of {grid}"


def _grid(
    span: ImageSpan, size: tuple[int, int], tile_grid: tuple[int, int] | None, stays: Tensor | None
) -> str:
    """Lines between tokens, stronger between tiles, and a veil over dropped tokens; None: the thumbnail's grid."""
    assert span.grid is not None
    tile_rows, tile_cols = tile_grid or (1, 1)
    rows, cols = span.grid[0] * tile_rows, span.grid[1] * tile_cols
    width, height = size[0] / cols, size[1] / rows
    unit = max(size) / 384
    parts = []
    if stays is not None:
        own = (span.tile < 0) if tile_grid is None else (span.tile >= 0)
        gone = (own & (span.row >= 0)).cpu() & ~stays
        tile, row, col = (
            values.cpu()[gone].clamp(min=0).tolist() for values in (span.tile, span.row, span.col)
        )
        parts += [
            f'<rect x="{(t % tile_cols * span.grid[1] + c) * width:.2f}" '
            f'y="{(t // tile_cols * span.grid[0] + r) * height:.2f}" width="{width:.2f}" height="{height:.2f}" '
            'fill="#202020" fill-opacity="0.78"/>'
            for t, r, c in zip(tile, row, col, strict=True)
        ]
    for across, step, count, per_tile in (
        (True, width, cols, span.grid[1]),
        (False, height, rows, span.grid[0]),
    ):
        fine: list[str] = []
        strong: list[str] = []
        for number in range(count + 1):
            at = f"{number * step:.2f}"
            line = f"M{at} 0V{size[1]}" if across else f"M0 {at}H{size[0]}"
            (strong if number % per_tile == 0 else fine).append(line)
        for lines, thick, opacity in ((fine, 1.0, 0.55), (strong, 2.5, 0.9)):
            parts += [
                f'<path d="{"".join(lines)}" stroke="{colour}" stroke-opacity="{opacity}" '
                f'stroke-width="{thick * unit * factor:.2f}" fill="none"/>'
                for colour, factor in (("#000000", 1.6), ("#ffffff", 0.8))
                if lines
            ]
    return "".join(parts)


def describe_spans(spans: TokenSpans) -> str:
    """A batch in a line."""
    batch, length = spans.visual.shape
    counts = ", ".join(f"{int(getattr(spans, name).sum())} {name}" for name in _COLOURS)
    images = [f"{len(span)} ({_layout(span)})" if _known(span) else str(len(span)) for span in spans.images]
    shown = ", ".join(images[:MOST_PICTURES]) + (", ..." if len(images) > MOST_PICTURES else "")
    tokens = f"; visual tokens by image: {shown}" if images else "; no image"
    return f"TokenSpans({batch} x {length} positions: {counts}{tokens})"


def _known(span: ImageSpan) -> bool:
    return span.grid is not None and span.tile_grid is not None


def model_html(lvlm: HookedLVLM) -> str:
    """What a wrapped model is, and what can be hooked."""
    text_config = lvlm.model.config.get_text_config()
    parameters = sum(weight.numel() for weight in lvlm.model.parameters())
    name = str(lvlm.model.config.name_or_path)
    known = {
        "model": short_path(name) or None,
        "class": f"{type(lvlm.model).__name__} (family {lvlm.family.name})",
        "parameters": f"{parameters:,}, {str(lvlm.model.dtype).removeprefix('torch.')}, on {lvlm.device}",
        "decoder": f"{lvlm.n_layers} layers, d_model {lvlm.d_model}, {text_config.num_attention_heads} heads over "
        f"{text_config.num_key_value_heads} KV heads, d_mlp {text_config.intermediate_size}",
        "attention": lvlm.attention_backend,
        "processor": "none: only prepared tensors can be given"
        if lvlm.processor is None
        else type(lvlm.processor).__name__,
        "hook points": f"{len(lvlm.hook_dict)}: hook_embed, blocks.0.hook_resid_pre ... "
        f"blocks.{lvlm.n_layers - 1}.hook_resid_post",
    }
    return card("HookedLVLM", facts(known))


def pictures_of(inputs: Any, images: Sequence[object]) -> Pictures | None:
    """The pictures that ``prepare`` kept beside the tensors, if there is one for each image that was found."""
    kept: Pictures | None = getattr(inputs, "pictures", None)
    return kept if kept is not None and len(kept.images) == len(images) else None

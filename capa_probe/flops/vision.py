"""Sizes of a vision tower and its projector, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from capa_probe.errors import CapaProbeError
from capa_probe.flops.checks import whole

#: Rows and columns of patches of one image, or of one tile of it.
Grid = tuple[int, int]


@dataclass(frozen=True)
class VisionShape:
    """A vision transformer and the projector behind it; all counts are multiply-accumulates.

    Attributes:
        n_layers: transformer blocks that run.
        d_model: width.
        d_mlp: hidden width of the blocks' FFN.
        d_patch: numbers in one patch: channels x height x width x frames.
        gated: the FFN has three matrices (SwiGLU) instead of two.
        cls_tokens: tokens beside the patches (a CLS token).
        grid: patches of every image (rows, columns); None where each image has its own.
        pooling_head: an attention-pooling head runs after the blocks (SigLIP), used or not.
        merge: side of the square of patches that becomes one visual token.
        cls_projected: the tokens beside the patches become visual tokens too.
        projector: (in, out) of each linear layer of the projector, per visual token.
        window: side, in patches, of the windows that attention is confined to; 0 for none.
        full_layers: blocks that attend across windows all the same.

    Raises:
        CapaProbeError: a size that is no positive whole number, or a block that does not exist.
    """

    n_layers: int
    d_model: int
    d_mlp: int
    d_patch: int
    gated: bool = False
    cls_tokens: int = 0
    grid: Grid | None = None
    pooling_head: bool = False
    merge: int = 1
    cls_projected: bool = False
    projector: tuple[tuple[int, int], ...] = ()
    window: int = 0
    full_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "d_mlp", "d_patch", "merge"):
            whole(name, getattr(self, name), least=1)
        if any(whole("a layer of full_layers", layer) >= self.n_layers for layer in self.full_layers):
            raise CapaProbeError(
                f"full_layers = {self.full_layers} was given for a vision tower of {self.n_layers} blocks; "
                f"give some of 0 to {self.n_layers - 1}."
            )

    def n_visual(self, grid: Grid) -> int:
        """Visual tokens that one image becomes.

        Raises:
            CapaProbeError: the grid cannot be merged.
        """
        rows, cols = (whole("a side of a patch grid", side, least=1) for side in grid)
        if rows % self.merge or cols % self.merge:
            raise CapaProbeError(
                f"A grid of {rows} x {cols} patches was given to the cost counter, but the model merges "
                f"{self.merge} x {self.merge} of them; give patches before merging, in multiples of {self.merge}."
            )
        return rows * cols // self.merge**2 + self.cls_tokens * self.cls_projected

    def grids_of(self, visual: int, grids: Sequence[Grid] | None) -> tuple[Grid, ...]:
        """The patch grids of a prompt's images: those given, or the model's own as often as its tokens fit.

        Raises:
            CapaProbeError: they do not make ``visual`` tokens, or the model has no grid of its own.
        """
        if grids is None:
            if visual == 0:
                return ()
            if self.grid is None:
                raise CapaProbeError(
                    f"{visual} visual tokens were given without patch grids, but in this model every image has its "
                    "own; give grids=[(rows, columns), ...] in patches, or do not count vision tower and projector."
                )
            per_image = self.n_visual(self.grid)
            if visual % per_image:
                raise CapaProbeError(
                    f"{visual} visual tokens were given, which is no multiple of the {per_image} of one image or tile; "
                    "give the count before pruning, or the patch grids as grids=[(rows, columns), ...]."
                )
            return (self.grid,) * (visual // per_image)
        total = sum(self.n_visual(grid) for grid in grids)
        if total != visual:
            raise CapaProbeError(
                f"The patch grids {list(grids)} make {total} visual tokens but visual = {visual} was given; "
                "give the count before pruning, and grids in patches before merging."
            )
        return tuple(grids)

    def patch_embedding(self, grid: Grid) -> int:
        """Cost of embedding the patches of one image."""
        return grid[0] * grid[1] * self.d_patch * self.d_model

    def blocks(self, grid: Grid) -> int:
        """Cost of the transformer blocks, and of the pooling head, on one image."""
        d, rows, cols = self.d_model, *grid
        n = rows * cols + self.cls_tokens
        per_token = 4 * d * d + (3 if self.gated else 2) * d * self.d_mlp
        windowed = sum(side * side for side in _pieces(rows, self.window)) * sum(
            side * side for side in _pieces(cols, self.window)
        )
        n_full = len(self.full_layers) if self.window else self.n_layers
        pairs = n_full * n * n + (self.n_layers - n_full) * windowed
        total = self.n_layers * n * per_token + 2 * pairs * d
        if self.pooling_head:  # one query token: its own q, o and FFN, keys and values of all, attention
            total += 2 * d * d + 2 * d * self.d_mlp + 2 * n * d * d + 2 * n * d
        return total

    def projection(self, grid: Grid) -> int:
        """Cost of the projector on one image."""
        return self.n_visual(grid) * sum(inside * outside for inside, outside in self.projector)

    @classmethod
    def of(cls, config: Any) -> VisionShape:
        """Read the sizes from a model's config (LLaVA with CLIP or SigLIP, Qwen2.5-VL, InternVL).

        Raises:
            CapaProbeError: another vision tower.
        """
        vision = config.vision_config
        readers = {
            "clip_vision_model": _clip_like,
            "siglip_vision_model": _clip_like,
            "internvl_vision": _internvl,
            "qwen2_5_vl": _qwen,
            "qwen2_5_vl_vision": _qwen,
        }
        if vision.model_type not in readers:
            raise CapaProbeError(
                f"A model with a vision tower of type {vision.model_type} was given to the cost counter, which reads "
                f"the configs of {', '.join(readers)}; give a VisionShape with its sizes instead."
            )
        return readers[vision.model_type](config)


def _pieces(length: int, window: int) -> list[int]:
    """Lengths of the windows along one side."""
    if not window:
        return [length]
    return [window] * (length // window) + [length % window]


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _fixed_grid(vision: Any) -> tuple[Grid, int]:
    """Patches of the one size of image that the tower takes, and the numbers in a patch."""
    (height, width), (patch_h, patch_w) = _pair(vision.image_size), _pair(vision.patch_size)
    return (height // patch_h, width // patch_w), vision.num_channels * patch_h * patch_w


def _clip_like(config: Any) -> VisionShape:
    vision, d_text = config.vision_config, config.text_config.hidden_size
    grid, d_patch = _fixed_grid(vision)
    layers = config.vision_feature_layer
    d_features = vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
    is_clip = vision.model_type == "clip_vision_model"
    return VisionShape(
        n_layers=vision.num_hidden_layers,  # all of them run, whichever one's output is taken
        d_model=vision.hidden_size,
        d_mlp=vision.intermediate_size,
        d_patch=d_patch,
        cls_tokens=int(is_clip),
        grid=grid,
        pooling_head=not is_clip and getattr(vision, "vision_use_head", True),
        cls_projected=config.vision_feature_select_strategy == "full",
        projector=((d_features, d_text), (d_text, d_text)),
    )


def _internvl(config: Any) -> VisionShape:
    vision, d_text = config.vision_config, config.text_config.hidden_size
    grid, d_patch = _fixed_grid(vision)
    merge = round(1 / config.downsample_ratio)
    return VisionShape(
        n_layers=vision.num_hidden_layers,
        d_model=vision.hidden_size,
        d_mlp=vision.intermediate_size,
        d_patch=d_patch,
        cls_tokens=1,
        grid=grid,
        merge=merge,
        projector=((vision.hidden_size * merge**2, d_text), (d_text, d_text)),
    )


def _qwen(config: Any) -> VisionShape:
    vision = config.vision_config
    (patch_h, patch_w), merge = _pair(vision.patch_size), vision.spatial_merge_size
    frames = vision.temporal_patch_size
    merged = vision.hidden_size * merge**2
    return VisionShape(
        n_layers=vision.depth,
        d_model=vision.hidden_size,
        d_mlp=vision.intermediate_size,
        # A still image is repeated to fill the frames of a patch.
        d_patch=vision.in_channels * patch_h * patch_w * (frames if isinstance(frames, int) else frames[0]),
        gated=True,
        merge=merge,
        projector=((merged, merged), (merged, vision.out_hidden_size)),
        window=vision.window_size // merge // patch_h * merge,
        full_layers=tuple(vision.fullatt_block_indexes),
    )

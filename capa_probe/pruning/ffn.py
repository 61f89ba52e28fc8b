"""What stands in for the FFN of visual tokens in redundant layers: a Hadamard product, or nothing (CAPA)."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capa_probe.describing import weights_hash
from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM
from capa_probe.pruning.bypass import BypassedRows, Fill
from capa_probe.pruning.showing import hadamard_html
from capa_probe.pruning.tensor_file import read_tensors, write_tensors
from capa_probe.pruning.visual_ffn import VisualFFN, check_layers

FORMAT_VERSION = 1
_HEADER = "capa_probe.hadamard_ffn"
#: Readings of the paper's x: the residual stream entering the FFN block, or the FFN's normed input.
INPUTS = ("residual", "normed")


class SkipFFN(VisualFFN):
    """Visual tokens pass by the FFN of some layers unchanged: ``x + FFN(norm(x))`` becomes ``x``.

    Args:
        layers: decoder layers, from 0.

    Raises:
        CapaProbeError: no layer, or something that is none.
    """

    def _fill(self) -> Fill:
        return lambda rows: 0.0

    def __repr__(self) -> str:
        return f"SkipFFN(layers={list(self.layers)})"


class HadamardFFN(VisualFFN):
    """The Hadamard approximation of CAPA: for visual tokens, ``x + FFN(norm(x))`` becomes ``x * alpha``.

    :func:`capa_probe.calibrate_hadamard` makes one. The product is taken in float32, whatever the model's dtype; what
    it adds to the residual stream is rounded to that dtype, as the FFN's own output is.

    Args:
        alpha: decoder layer to (d_model,) factors.
        x: what alpha is multiplied with: "residual", the residual stream that enters the FFN block, or "normed", what
            the block's norm makes of it.
        r2: decoder layer to share of explained variance.
        n_samples: samples with visual tokens that alpha was fitted on.
        n_tokens: their visual tokens.
        manifest: what is known of model, data and settings (JSON values). With a ``weights_hash`` among it, attaching
            to other weights is refused.

    Attributes:
        alpha: decoder layer to float32 (d_model,).
        r2: decoder layer to R² of the fit, about each channel's mean and pooled over channels: 1 - squared error /
            squared deviation of ``x + FFN(norm(x))`` from its mean. NaN where that does not vary. It can be below 0, as
            there is no intercept.

    Raises:
        CapaProbeError: factors that are not finite or not of one width, or an unknown ``x``.
    """

    def __init__(
        self,
        alpha: Mapping[int, Tensor],
        x: Literal["residual", "normed"] = "residual",
        r2: Mapping[int, float] | None = None,
        n_samples: int = 0,
        n_tokens: int = 0,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(alpha)
        check_x(x)
        self.alpha = {layer: alpha[layer].detach().cpu().float().clone() for layer in self.layers}
        for layer, factors in self.alpha.items():
            if factors.ndim != 1 or factors.shape != self.alpha[self.layers[0]].shape:
                raise CapaProbeError(
                    f"Factors of shape {tuple(factors.shape)} were given for layer {layer}; give (d_model,) for each."
                )
            if not bool(factors.isfinite().all()):
                raise CapaProbeError(
                    f"The factors of layer {layer} hold NaN or infinity; calibrate them again."
                )
        self.x = x
        self.r2 = {layer: float((r2 or {}).get(layer, math.nan)) for layer in self.layers}
        self.n_samples, self.n_tokens = n_samples, n_tokens
        self.manifest: dict[str, Any] = dict(manifest or {})
        self._checked: Callable[[], PreTrainedModel | None] = lambda: None

    def only(self, layers: Iterable[int]) -> HadamardFFN:
        """The same for some of its layers.

        Raises:
            CapaProbeError: layers that it is not for.
        """
        chosen = check_layers(layers)
        if lacking := sorted({*chosen} - {*self.layers}):
            raise CapaProbeError(
                f"Layers {lacking} were asked of a HadamardFFN for layers {list(self.layers)}; calibrate them too."
            )
        alpha = {layer: self.alpha[layer] for layer in chosen}
        return HadamardFFN(alpha, self.x, self.r2, self.n_samples, self.n_tokens, self.manifest)

    def check(self, lvlm: HookedLVLM) -> None:
        """Refuse a model that it is not for: a layer, the width or a weight differs.

        The same checkpoint in another dtype is another model.

        Raises:
            CapaProbeError: that is so.
        """
        super().check(lvlm)
        width = len(self.alpha[self.layers[0]])
        if width != lvlm.d_model:
            raise CapaProbeError(
                f"HadamardFFN is for a model of width {width}, but this one has {lvlm.d_model}; calibrate on "
                "this model."
            )
        known = self.manifest.get("weights_hash")
        if known is None or self._checked() is lvlm.model:
            return
        if weights_hash(lvlm.model) != known:
            raise CapaProbeError(
                f"HadamardFFN was calibrated on other weights ({self.manifest.get('model')}, "
                f"{self.manifest.get('dtype')}) than those of this model; calibrate on this model, in its dtype."
            )
        self._checked = weakref.ref(lvlm.model)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file: ``alpha.{layer}`` in float32, the rest as JSON in its header.

        The file is there as a whole or not at all.

        Returns:
            The path.
        """
        header = {
            "format_version": FORMAT_VERSION,
            "x": self.x,
            "layers": list(self.layers),
            "r2": {str(layer): None if math.isnan(r2) else r2 for layer, r2 in self.r2.items()},
            "n_samples": self.n_samples,
            "n_tokens": self.n_tokens,
            "manifest": self.manifest,
        }
        tensors = {f"alpha.{layer}": alpha for layer, alpha in self.alpha.items()}
        return write_tensors(Path(path), tensors, _HEADER, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], lvlm: HookedLVLM | None = None) -> HadamardFFN:
        """Read a file that :meth:`save` wrote.

        Args:
            path: the file.
            lvlm: the model that it is for; None leaves that to :meth:`attach`.

        Raises:
            CapaProbeError: there is no such file, it is damaged or not one of these, or is for another model.
        """
        header, tensors = read_tensors(Path(path), _HEADER, "calibrate again, or give another file")
        if header.get("format_version") != FORMAT_VERSION:
            raise CapaProbeError(
                f"{path} has format version {header.get('format_version')}, but this version of capa_probe reads "
                f"{FORMAT_VERSION}; update capa_probe or calibrate again."
            )
        try:
            layers = [int(layer) for layer in header["layers"]]
            found = cls(
                {layer: tensors[f"alpha.{layer}"] for layer in layers},
                header["x"],
                {int(layer): math.nan if r2 is None else r2 for layer, r2 in header["r2"].items()},
                int(header["n_samples"]),
                int(header["n_tokens"]),
                header["manifest"],
            )
        except CapaProbeError as error:
            raise CapaProbeError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CapaProbeError(
                f"{path} is damaged or was not written by capa_probe ({error}); calibrate again."
            ) from error
        if lvlm is not None:
            try:
                found.check(lvlm)
            except CapaProbeError as error:
                raise CapaProbeError(f"{path}: {error}") from None
        return found

    def _fill(self) -> Fill:
        moved: dict[tuple[int, torch.device], Tensor] = {}

        def factors(layer: int, device: torch.device) -> Tensor:
            if (layer, device) not in moved:
                alpha = self.alpha[layer]
                # One less, so that nothing cancels in x + x * (alpha - 1).
                moved[layer, device] = (alpha - 1 if self.x == "residual" else alpha).to(device)
            return moved[layer, device]

        def fill(rows: BypassedRows) -> Tensor:
            residual = rows.residual.float()
            if self.x == "residual":
                return residual * factors(rows.layer, residual.device)
            return rows.normed.float() * factors(rows.layer, residual.device) - residual

        return fill

    def __repr__(self) -> str:
        known = [r2 for r2 in self.r2.values() if not math.isnan(r2)]
        r2 = f"{min(known):.4f} to {max(known):.4f}" if known else "unknown"
        model = f", model={self.manifest['model']!r}" if "model" in self.manifest else ""
        return (
            f"HadamardFFN(layers={list(self.layers)}, x={self.x!r}, n_samples={self.n_samples}, "
            f"n_tokens={self.n_tokens}, r2={r2}{model})"
        )

    def _repr_html_(self) -> str:
        return hadamard_html(self)


def check_x(x: str) -> None:
    """Refuse an unknown reading of x.

    Raises:
        CapaProbeError: it is none of ``INPUTS``.
    """
    if x not in INPUTS:
        raise CapaProbeError(f'x={x!r} was given; give "residual" or "normed".')

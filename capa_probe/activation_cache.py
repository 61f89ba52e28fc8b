"""Our activations as TransformerLens's ``ActivationCache``, so that its tools run on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM

if TYPE_CHECKING:
    from transformer_lens import ActivationCache


def to_activation_cache(
    cache: Mapping[str, Tensor], lvlm: HookedLVLM | None = None, neurons: bool = False
) -> ActivationCache:
    """Make a TransformerLens ``ActivationCache`` of what ``lvlm.run_with_cache`` returned.

    Its tools then run on it, for every model family: ``accumulated_resid``, ``decompose_resid``, ``logit_attrs``,
    ``stack_head_results``, ``get_full_resid_decomposition``, ``logit_lens``, ``stack_activation`` and
    ``direct_logit_attribution(cache.model, cache=cache, ...)``. Each needs the hook points that it reads to be in the
    cache. What TransformerLens records and we do not is worked out from them: the scales of the norms, and with
    ``neurons`` the activations of the FFN's neurons.

    No weight is changed. The directions of tokens hold the weight of the final norm, so that attributions are shares of
    the model's own logits; a ``TransformerBridge`` gives those in compatibility mode only. ``hook_embed`` holds what
    really enters the decoder, image features included, so that ``decompose_resid`` sums to the residual stream at
    visual tokens too, where the bridge's begins with the placeholder's embedding.

    Args:
        cache: from ``lvlm.run_with_cache``. Tensors are shared, not copied.
        lvlm: the model; needed only if ``cache`` is a plain dict and not what ``run_with_cache`` returned.
        neurons: also compute ``mlp.hook_post`` (batch, position, d_mlp) of every layer whose ``mlp.hook_in`` is there,
            by running its FFN again; ``stack_neuron_results`` needs it.

    Returns:
        A ``transformer_lens.ActivationCache``.

    Raises:
        CapaProbeError: not a cache of this package, a plain dict without ``lvlm``, a text tower whose norms are no
            RMSNorm, or ``neurons`` of a mixture of experts.
    """
    from transformer_lens import ActivationCache

    from capa_probe.lens_model import LensModel

    if not isinstance(cache, Mapping) or not cache:
        what = f"{'An empty' if isinstance(cache, Mapping) else 'A'} {type(cache).__name__}"
        raise CapaProbeError(f"{what} was given; give the cache that lvlm.run_with_cache returned.")
    lvlm = getattr(cache, "lvlm", None) if lvlm is None else lvlm
    if lvlm is None:
        raise CapaProbeError(
            f"A {type(cache).__name__} was given, which does not say of which model it is; pass lvlm as well, or the "
            "cache as lvlm.run_with_cache returned it."
        )
    known = {name + suffix for name in lvlm.hook_dict for suffix in ("", "_grad")}
    unknown = [name for name in cache if name not in known]
    if unknown:
        raise CapaProbeError(
            f"The cache holds {unknown[0]}, which is no hook point of this model of {lvlm.n_layers} layers; give the "
            "cache that lvlm.run_with_cache returned, and its own lvlm."
        )
    found = dict(cache)
    found |= _norm_scales(cache, lvlm)
    if neurons:
        found |= _neurons(cache, lvlm)
    return ActivationCache(found, LensModel(lvlm), has_batch_dim=getattr(cache, "has_batch_dim", True))


def _norm_scales(cache: Mapping[str, Tensor], lvlm: HookedLVLM) -> dict[str, Tensor]:
    """What each RMSNorm divides by, (batch, position, 1), in float32 at least."""
    inputs = {"ln_final": f"blocks.{lvlm.n_layers - 1}.hook_resid_post"}
    for layer in range(lvlm.n_layers):
        inputs[f"blocks.{layer}.ln1"] = f"blocks.{layer}.hook_resid_pre"
        inputs[f"blocks.{layer}.ln2"] = f"blocks.{layer}.hook_resid_mid"
    scales = {}
    for norm, name in inputs.items():
        if name in cache:
            x = cache[name].to(torch.promote_types(cache[name].dtype, torch.float32))
            scales[f"{norm}.hook_scale"] = (x.square().mean(dim=-1, keepdim=True) + lvlm.norm_eps).sqrt()
    return scales


def _neurons(cache: Mapping[str, Tensor], lvlm: HookedLVLM) -> dict[str, Tensor]:
    """What enters each FFN's output projection, by running the FFNs again on their cached inputs."""
    from capa_probe.lens_model import output_projection

    found: dict[str, Tensor] = {}
    for index, layer in enumerate(lvlm.family.layers(lvlm.model)):
        x = cache.get(f"blocks.{index}.mlp.hook_in")
        if x is None:
            continue
        mlp, name = layer.get_submodule("mlp"), f"blocks.{index}.mlp.hook_post"

        def keep(_: torch.nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            found[name] = args[0]

        handle = output_projection(mlp).register_forward_pre_hook(keep)
        try:
            mlp.forward(x)  # not the module itself, so that hooks on it do not see this side computation
        finally:
            handle.remove()
    return found

"""HookedLVLM: an unmodified vision-language model of transformers, with TransformerLens hook points on it."""

from __future__ import annotations

import copy
import difflib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.cache import HookedCache
from capa_probe.lvlm.checks import check_layout, refuse_compiled
from capa_probe.lvlm.families import Family, family_of
from capa_probe.lvlm.inputs import LVLMInputs, find_spans, input_device, prepare
from capa_probe.lvlm.loading import load
from capa_probe.lvlm.pictures import model_html
from capa_probe.lvlm.points import Block, LazyHookPoint, at_input
from capa_probe.lvlm.spans import TokenSpans
from capa_probe.lvlm.tap import AttentionCall, backend, check_backend
from capa_probe.lvlm.wrapper import Wrapper

if TYPE_CHECKING:
    from capa_probe.lvlm.inputs import Images

NameFilter: TypeAlias = str | Callable[[str], bool]
Hook: TypeAlias = tuple[NameFilter, Callable[..., Tensor | None]]


class HookedLVLM(Wrapper):
    """A ``transformers`` LVLM with hook points that cost nothing until someone listens.

    Hook points (axes as in TransformerLens; ``{l}`` counts decoder layers from 0):

    - ``hook_embed``, ``blocks.{l}.hook_resid_pre``, ``.hook_attn_out``, ``.hook_resid_mid``, ``.mlp.hook_in`` (the
      normed input), ``.hook_mlp_out``, ``.hook_resid_post``: (batch, position, d_model). ``hook_embed`` is what enters
      the decoder: text embeddings with the projected image features among them.
    - ``blocks.{l}.attn.hook_rot_q``, ``.hook_z``: (batch, position, head, d_head); q after rotary embedding.
    - ``blocks.{l}.attn.hook_v``: (batch, position, kv_head, d_head), before the KV cache.
    - ``blocks.{l}.attn.hook_rot_k``: (batch, key, kv_head, d_head), after rotary embedding, the KV cache included.
    - ``blocks.{l}.attn.hook_pattern``: (batch, head, query, key), float32, computed only for a listener.

    A hook function ``fn(tensor, hook)`` that returns a tensor replaces the activation, in a plain forward and during
    ``lvlm.model.generate`` alike.

    Args:
        model: a ``LlavaForConditionalGeneration``, ``Qwen2_5_VLForConditionalGeneration`` or
            ``InternVLForConditionalGeneration``. It is not changed.
        processor: the model's processor; needed only for :meth:`prepare`.

    Raises:
        CapaProbeError: the model's family, attention backend or layer layout is not supported, or it is compiled.
    """

    def __init__(self, model: PreTrainedModel, processor: Any = None) -> None:
        super().__init__()
        if isinstance(model, nn.Module):
            refuse_compiled(model)
        if not isinstance(model, PreTrainedModel):
            raise CapaProbeError(
                f"An object of type {type(model).__name__} was given; give a transformers model, or a name or path to "
                "HookedLVLM.from_pretrained."
            )
        family = family_of(model.config)
        if not hasattr(model, "lm_head"):
            raise CapaProbeError(
                f"A {type(model).__name__} was given, which has no language-model head; give the "
                f"{family.architecture} around it."
            )
        text_model = family.text_model(model)
        check_backend(text_model)
        check_layout(family.layers(model))
        self.wrap(model)
        self.processor = processor
        self.family: Family = family
        self.hook_embed = LazyHookPoint(at_input(text_model, "inputs_embeds"))
        config = model.config.get_text_config()
        d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.blocks = nn.ModuleList(
            Block(text_model, layer, index, d_head) for index, layer in enumerate(family.layers(model))
        )
        self.setup()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        dtype: Any = "auto",
        device_map: Any = None,
        revision: str | None = None,
        **hf_kwargs: Any,
    ) -> HookedLVLM:
        """Load a checkpoint and its processor, from a folder or by its name on the Hugging Face hub.

        Args:
            name_or_path: such as ``"llava-hf/llava-1.5-7b-hf"``, or a folder.
            dtype: as in transformers; ``"auto"`` takes the checkpoint's.
            device_map: as in transformers, such as ``"auto"`` or ``"cuda"``.
            revision: branch, tag or commit on the hub.
            **hf_kwargs: go to the model's ``from_pretrained``.

        Raises:
            CapaProbeError: no such checkpoint, an unsupported family, or one that needs remote code.
        """
        return cls(*load(name_or_path, dtype, device_map, revision, **hf_kwargs))

    # -- facts about the model

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return input_device(self.model)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def norm_eps(self) -> float:
        """Epsilon of the decoder's RMSNorm."""
        return float(getattr(self.model.config.get_text_config(), "rms_norm_eps", 1e-6))

    @property
    def attention_backend(self) -> str:
        """Attention backend of the decoder: "sdpa" or "eager"."""
        return backend(self.family.text_model(self.model))

    # -- inputs

    def prepare(
        self, images: Images | Sequence[Images], prompts: str | Sequence[str], **processor_options: Any
    ) -> LVLMInputs:
        """Images and questions to the tensors the model takes, as one padded batch on its device.

        Args:
            images: for one prompt an image, a list of images or None; for a list of prompts one such entry each.
            prompts: a question, or a list of them. A plain question gets the model's own prompt template and image
                placeholders; a prompt that already holds the placeholder is taken as it is.
            **processor_options: reach the processor (``max_pixels``, ``padding_side``, ...).

        Raises:
            CapaProbeError: there is no processor, or images and placeholders do not match.
        """
        if self.processor is None:
            raise CapaProbeError(
                "This HookedLVLM has no processor; give one, as HookedLVLM(model, processor), or pass prepared tensors."
            )
        return prepare(self.model, self.processor, self.family, images, prompts, **processor_options)

    def spans(self, inputs: Mapping[str, Any]) -> TokenSpans:
        """Where visual tokens, text and padding lie in ``inputs``, and the place of every visual token in its image.

        Raises:
            CapaProbeError: video input, or visual tokens that do not match the images.
        """
        return find_spans(self.model, self.family, inputs)

    # -- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped model returns, bit for bit."""
        return self.model(*args, **kwargs)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Iterable[Hook] = (),
        bwd_hooks: Iterable[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedLVLM]:
        """Hooks for the length of a ``with`` block, also during ``lvlm.model.generate``.

        Args:
            fwd_hooks: pairs of a hook point's name, or a filter on names, and a function ``fn(tensor, hook)``.
            bwd_hooks: the same for gradients.
            reset_hooks_end: take the hooks off at the end of the block.
            clear_contexts: empty the hook points' ``ctx`` then, too.

        A hook that has not fired by the end of the block is named in a warning. ``run_with_hooks`` is this around one
        forward.

        Raises:
            CapaProbeError: a name that does not exist, a filter that matches none, or a model compiled in the meantime.
        """
        refuse_compiled(self.model)
        fwd, bwd = list(fwd_hooks), list(bwd_hooks)
        for name, _ in bwd:
            self._matching(name)
        points = {point for name, _ in fwd for point in self._matching(name)}
        before = {point: self.hook_dict[point].fired for point in points}
        with super().hooks(fwd, bwd, reset_hooks_end, clear_contexts):
            yield self
        silent = sorted(point for point in points if self.hook_dict[point].fired == before[point])
        if silent:
            warnings.warn(f"Hooks that never fired: {', '.join(silent)}.", stacklevel=3)

    def run_with_cache(
        self, *args: Any, names_filter: NameFilter | Sequence[str] | None = None, **kwargs: Any
    ) -> tuple[Any, HookedCache]:
        """One forward, and the activations of the hook points that ``names_filter`` names (all of them if None).

        With no filter every attention pattern is computed and kept, as in TransformerLens: name what you need.

        Returns:
            The model's output, and a dict from hook name to tensor, of which :func:`cp.to_activation_cache` makes one
            of TransformerLens.

        Raises:
            CapaProbeError: a name that does not exist, or a filter that matches none.
        """
        if names_filter is None or callable(names_filter):
            wanted = names_filter
            if wanted is not None:
                self._matching(wanted)
        else:
            names = {names_filter} if isinstance(names_filter, str) else set(names_filter)
            if not names:
                raise CapaProbeError(
                    "names_filter=[] was given; give at least one name, or None for all hook points."
                )
            for name in names:
                self._matching(name)
            wanted = names.__contains__
        out, cache = super().run_with_cache(*args, names_filter=wanted, **kwargs)
        return out, HookedCache(cache, self, not kwargs.get("remove_batch_dim"))

    def add_hook(
        self, name: NameFilter, hook: Callable[..., Tensor | None], *args: Any, **kwargs: Any
    ) -> None:
        """Add a hook that stays until ``reset_hooks()``; prefer :meth:`hooks`."""
        refuse_compiled(self.model)
        self._matching(name)
        super().add_hook(name, hook, *args, **kwargs)

    @contextmanager
    def attention_calls(
        self, observer: Callable[[AttentionCall], None], layers: Iterable[int] | None = None
    ) -> Iterator[None]:
        """Show every attention call of the given decoder layers (all if None) to ``observer``, for a ``with`` block.

        The call holds q, k, v and the mask as the backend sees them, and computes chosen rows of the attention
        pattern on demand; nothing of size query x key is made.

        Raises:
            CapaProbeError: the model was compiled in the meantime.
        """
        refuse_compiled(self.model)
        with ExitStack() as stack:
            for layer in range(self.n_layers) if layers is None else layers:
                stack.callback(self._block(layer).observe(observer))
            yield

    def __deepcopy__(self, memo: dict[int, Any]) -> HookedLVLM:
        return HookedLVLM(copy.deepcopy(self.model, memo), self.processor)

    def _block(self, layer: int) -> Block:
        block = self.blocks[layer]
        assert isinstance(block, Block)
        return block

    def _matching(self, name: NameFilter) -> list[str]:
        if callable(name):
            found = [known for known in self.hook_dict if name(known)]
            if not found:
                raise CapaProbeError(
                    "A filter on hook names was given that matches none; names look like blocks.0.hook_resid_pre "
                    "(all of them: lvlm.hook_dict)."
                )
            return found
        if name not in self.hook_dict:
            close = difflib.get_close_matches(str(name), self.hook_dict, n=1)
            hint = f"did you mean {close[0]}?" if close else "see lvlm.hook_dict for all names."
            raise CapaProbeError(
                f"There is no hook point {name} in this model of {self.n_layers} layers; {hint}"
            )
        return [name]

    def __repr__(self) -> str:
        return (
            f"HookedLVLM({type(self.model).__name__}, family={self.family.name!r}, layers={self.n_layers}, "
            f"d_model={self.d_model}, attention={self.attention_backend!r}, device={str(self.device)!r})"
        )

    def _repr_html_(self) -> str:
        return model_html(self)

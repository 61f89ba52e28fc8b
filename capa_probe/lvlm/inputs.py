"""From images and questions to a model's own input tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jinja2 import TemplateError
from transformers import BatchFeature, PreTrainedModel

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.families import Family, Tiling
from capa_probe.lvlm.pictures import Pictures, pictures_of
from capa_probe.lvlm.spans import TokenSpans
from capa_probe.samples import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

    #: What may stand for the images of one prompt.
    Images: TypeAlias = Image | Sequence[Image] | None

VIDEO_INPUTS = ("pixel_values_videos", "video_grid_thw")


class LVLMInputs(BatchFeature):
    """The tensors a model takes, as its processor made them; beside them the tile layout, which no tensor holds.

    Behaves like the processor's own output: ``model(**inputs)``, ``inputs["input_ids"]``, ``inputs.to("cuda")``.
    """

    tilings: tuple[Tiling, ...] | None = None
    #: The images themselves, to be shown under their tokens.
    pictures: Pictures | None = None


def prepare(
    model: PreTrainedModel,
    processor: Any,
    family: Family,
    images: Images | Sequence[Images],
    prompts: str | Sequence[str],
    **options: Any,
) -> LVLMInputs:
    """Turn images and prompts into one padded batch on the model's device; see :meth:`HookedLVLM.prepare`."""
    texts, image_lists = _normalise(images, prompts)
    token = processor.image_token
    for number, (text, own) in enumerate(zip(texts, image_lists, strict=True)):
        if token in text and text.count(token) != len(own):
            raise CapaProbeError(
                f"Prompt {number} holds {text.count(token)} image placeholders ({token}) for {len(own)} images; "
                "write one for each image, or none and the model's own template is used."
            )
    texts = [
        text if token in text else apply_template(processor, family, text, len(own))
        for text, own in zip(texts, image_lists, strict=True)
    ]
    flat = [_to_rgb(image) for own in image_lists for image in own]
    bos = getattr(processor.tokenizer, "bos_token", None)
    if bos and all(text.startswith(bos) for text in texts):
        options.setdefault("add_special_tokens", False)  # the template wrote it already
    options = family.processor_options(processor, {"padding": True, **options})
    try:
        batch = processor(images=flat or None, text=texts, return_tensors="pt", **options)
    except (ValueError, TypeError) as error:
        raise CapaProbeError(
            f"{type(processor).__name__} refused the images, prompts or options: {str(error).splitlines()[0]}"
        ) from error
    inputs = LVLMInputs(dict(batch)).to(input_device(model), dtype=model.dtype)
    inputs.tilings = family.tilings(processor, [image.size[::-1] for image in flat], options)
    inputs.pictures = Pictures(family, processor, tuple(flat)) if flat else None
    return inputs


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs go: its own device or, where all weights are offloaded, the one they are brought to."""
    device: torch.device = model.device
    if device.type == "meta":
        for module in model.modules():
            brought_to = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if brought_to is not None:
                return torch.device(brought_to)
    return device


def apply_template(processor: Any, family: Family, question: str, n_images: int) -> str:
    """A question in the model's own prompt template, with one placeholder per image before it."""
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in range(n_images)), {"type": "text", "text": question}]
        try:
            prompt: str = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise CapaProbeError(
                f"The chat template of this model's processor is wrong ({error}); mend it, or write the whole prompt "
                f"with its image placeholders ({processor.image_token})."
            ) from error
        return prompt
    if family.fallback_prompt is None:
        raise CapaProbeError(
            f"The processor of this {family.name} model has no chat template; set processor.chat_template, "
            f"or write the whole prompt with its image placeholders ({processor.image_token})."
        )
    placeholders = "\n".join([processor.image_token] * n_images)
    return family.fallback_prompt.format(images=placeholders, question=question)


def find_spans(model: PreTrainedModel, family: Family, inputs: Mapping[str, Any]) -> TokenSpans:
    """Locate visual tokens, text and padding in model inputs; see :meth:`HookedLVLM.spans`."""
    for name in VIDEO_INPUTS:
        if inputs.get(name) is not None:
            raise CapaProbeError(f"Video input ({name}) was given; only images are supported.")
    ids = inputs.get("input_ids")
    if ids is None:
        raise CapaProbeError(
            "Inputs without input_ids were given; pass input_ids, since image placeholders are found in them."
        )
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise CapaProbeError(
            f"An attention_mask of shape {tuple(mask.shape)} was given with input_ids of shape {tuple(ids.shape)}; "
            "give one of the same shape, 1 at tokens and 0 at padding."
        )
    padding = ids.new_zeros(ids.shape).bool() if mask is None else mask == 0
    if padding.all(dim=1).any():
        raise CapaProbeError("A sample that is all padding was given; every row needs at least one token.")
    visual = (ids == family.image_token_id(model)) & ~padding
    has_pixels = inputs.get("pixel_values") is not None
    if visual.any() and not has_pixels:
        raise CapaProbeError(
            f"The prompts hold {int(visual.sum())} visual tokens but no pixel_values were given; pass the images too."
        )
    images = (
        tuple(family.images(model, visual, inputs, getattr(inputs, "tilings", None))) if has_pixels else ()
    )
    return TokenSpans(
        visual=visual,
        text=~visual & ~padding,
        padding=padding,
        images=images,
        pictures=pictures_of(inputs, images),
    )


def _normalise(
    images: Images | Sequence[Images], prompts: str | Sequence[str]
) -> tuple[list[str], list[list[Image]]]:
    """Prompts as a list, and for each the list of its images."""
    if isinstance(prompts, str):
        texts, per_prompt = [prompts], [images]
    elif hasattr(images, "convert"):
        raise CapaProbeError(
            "One image was given for a list of prompts; give a list with one entry for each prompt."
        )
    else:
        texts = list(prompts)
        per_prompt = [None] * len(texts) if images is None else list(images)  # type: ignore[arg-type]
        if len(per_prompt) != len(texts):
            raise CapaProbeError(
                f"{len(texts)} prompts and {len(per_prompt)} entries of images were given; give one entry for each "
                "prompt: an image, a list of images, or None."
            )
    if not texts:
        raise CapaProbeError("No prompt was given; give at least one.")
    return texts, [_as_list(own) for own in per_prompt]


def _as_list(images: Any) -> list[Image]:
    if images is None:
        return []
    if hasattr(images, "convert"):
        return [images]
    found = list(images) if isinstance(images, Iterable) else [images]
    for image in found:
        if not hasattr(image, "convert"):
            raise CapaProbeError(
                f"An image of type {type(image).__name__} was given; open it first, with PIL.Image.open."
            )
    return found


def _to_rgb(image: Image) -> Image:
    try:
        return to_rgb(image)
    except OSError as error:  # Pillow reads a file only when it is needed
        name = getattr(image, "filename", "") or f"of size {image.size}"
        raise CapaProbeError(f"The image {name} cannot be read ({error}); give one that opens.") from error

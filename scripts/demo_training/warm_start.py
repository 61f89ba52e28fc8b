"""A decoder that starts from the trained one of another demo model.

Llama's decoder and Qwen2's compute the same where the bias on q, k and v is zero, and M-RoPE is RoPE on positions that
are the same in all three directions, as those of text are. So weights carry over as they are, words to their tokens.
Symbols start as what the trained model's projector makes of what they stand for: the looks by content, which are
learned slowest, then find what they look for.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from capa_probe.demo.dataset import split_rng
from capa_probe.demo.drawing import render_with_marks
from capa_probe.demo.scenes import random_scene
from demo_training.architecture import Parts
from demo_training.families import FAMILIES
from demo_training.recipe import RECIPE
from demo_training.sketches import Sketch, field_sizes, sketch_patches
from demo_training.vocabulary import ASSISTANT, USER

_SPACE = "Ġ"
#: Drawn scenes from which symbols are fitted.
_SCENES = 192
#: What plays the same part in both prompt forms.
_ALIKE = {"<|im_end|>": "</s>", "<|im_start|>": "<s>", "Ċ": ASSISTANT, "user": USER}


def start_from(parts: Parts, folder: Path) -> None:
    """Copy the decoder and the output head of a trained LLaVA demo model into one of another family, and fit symbols.

    Args:
        parts: freshly made; changed in place.
        folder: with the trained model.

    Raises:
        SystemExit: its decoder has other sizes or frequencies.
    """
    trained = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inner = trained.model.language_model
    _check(parts, inner, folder)
    own, given = parts.decoder.state_dict(), inner.state_dict()
    for name, value in own.items():
        if name.endswith("bias"):
            value.zero_()
        elif not name.startswith("embed_tokens"):
            value.copy_(given[name])
    table = token_table(parts.family.tokenizer(parts.recipe.world), tokenizer)
    with torch.no_grad():
        for mine, theirs, kind in (
            (parts.decoder.embed_tokens.weight, inner.embed_tokens.weight, 0),
            (parts.lvlm.lm_head.weight, trained.lm_head.weight, 1),
        ):
            mine.copy_(theirs.mean(dim=0).expand_as(mine) if kind else mine)
            for token, sources in table.items():
                mine[token] = theirs[sources].mean(dim=0)
        for table, fitted in zip(parts.symbols.tables, fitted_symbols(trained), strict=True):
            known = min(len(fitted), len(table.weight))
            table.weight[:known] = fitted[:known]
            # Rows and columns that the trained model has not seen.
            table.weight[known:] += fitted.mean(dim=0)


@torch.no_grad()
def fitted_symbols(trained: PreTrainedModel, scenes: int = _SCENES) -> list[Tensor]:
    """One table of symbols for each field, by least squares.

    Args:
        trained: a LLaVA demo model.
        scenes: drawn for it.

    Returns:
        For each field of its world, (value, d_model): what sums to the projected features of a patch that shows these
        values, as nearly as may be.
    """
    family, world = FAMILIES["llava"], RECIPE.world
    sizes, processor = list(field_sizes(world).values()), family.processor(world)
    told, found = [], []
    for number in range(scenes):
        scene = random_scene(split_rng("train", number), world)
        image, marks = render_with_marks(scene)
        sketch: Sketch = sketch_patches(scene, marks, family.layout(scene.image_shape, world))
        fields = torch.tensor(sketch).unbind(dim=1)
        told.append(torch.cat([F.one_hot(at, n) for at, n in zip(fields, sizes, strict=True)], dim=1))
        found.append(family.project(trained, family.features(trained, family.images(processor, [image]))))
    # Of all solutions the smallest, since the values of a field sum to one.
    fitted = torch.linalg.lstsq(torch.cat(told).double(), torch.cat(found).double(), driver="gelsd").solution
    return list(fitted.float().split(sizes))


def token_table(tokenizer: PreTrainedTokenizerBase, trained: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """Token -> the tokens of the trained model that stand for the same: a word in any case, with a space or without.

    A character of a printed text has two there, one for each place in it.
    """
    known, found = trained.get_vocab(), {}
    for token, at in tokenizer.get_vocab().items():
        word = _ALIKE.get(token, token.removeprefix(_SPACE))
        words = {word, word.lower()} if len(word) > 1 else {word, f"##{word}"}
        if sources := sorted(known[w] for w in words if w in known):
            found[at] = sources
    return found


def _check(parts: Parts, inner: PreTrainedModel, folder: Path) -> None:
    given, wanted = inner.config, parts.decoder.config
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    sizes = {name: (getattr(given, name), getattr(wanted, name)) for name in names}
    sizes["rope_theta"] = given.rope_parameters["rope_theta"], wanted.rope_parameters["rope_theta"]
    other = [f"{name} is {have}, not {want}" for name, (have, want) in sizes.items() if have != want]
    if other:
        raise SystemExit(
            f"The decoder in {folder} cannot be started from ({'; '.join(other)}); give a LLaVA demo model of the same "
            "sizes, or leave --start-from out."
        )

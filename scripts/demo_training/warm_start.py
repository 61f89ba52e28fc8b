"""A decoder that starts from the trained one of another demo model.

Llama's decoder and Qwen2's compute the same where the bias on q, k and v is zero, and M-RoPE is RoPE on positions that
are the same in all three directions, as those of text are. So weights carry over as they are, words to their tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo_training.architecture import Parts
from demo_training.vocabulary import ASSISTANT, USER

_SPACE = "Ġ"
#: What plays the same part in both prompt forms.
_ALIKE = {"<|im_end|>": "</s>", "<|im_start|>": "<s>", "Ċ": ASSISTANT, "user": USER}


def start_from(parts: Parts, folder: Path) -> None:
    """Copy the decoder and the output head of a trained LLaVA demo model into one of another family.

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

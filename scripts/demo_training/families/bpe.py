"""A Qwen2 tokenizer whose byte-pair merges make one token of every word of a world."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from capa_probe.demo.phrasings import DESCRIBE
from capa_probe.demo.questions import words
from capa_probe.demo.worlds import World

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
#: What the prompt forms say besides.
_TEMPLATE_WORDS = ("system", "user", "assistant", "You", "are", "a", "helpful")
_SPACE = "Ġ"  # how byte-level tokens write it


def build_bpe(world: World, media: Sequence[str], named: Mapping[str, str]) -> Qwen2Tokenizer:
    """The tokenizer.

    Args:
        world: whose questions and answers it writes, a token for each word; digits and the characters of printed texts
            are tokens of their own, as in Qwen's, and so is the space before them.
        media: the family's special tokens for images and videos.
        named: what its processor calls some of them.
    """
    alphabet = sorted(ByteLevel.alphabet())
    merges = word_merges(word_forms(world))
    vocabulary = [*alphabet, *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=merges,
        unk_token=None,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=dict(named),
        padding_side="left",
        model_max_length=512,
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [START, *media]}, replace_extra_special_tokens=False
    )
    return tokenizer


def word_forms(world: World) -> list[str]:
    """Every word with and without a space before it, and with a capital where it may begin a sentence."""
    phrases = [DESCRIBE, world.suffix, *(phrase for group in world.phrasings.values() for phrase in group)]
    first = {phrase.split()[0].rstrip(".") for phrase in phrases if phrase}
    known = {part for word in words(world) for part in word.split("-") if part.isalpha()}
    known |= {*_TEMPLATE_WORDS, *first, *(word.capitalize() for word in first)}
    return [form for word in sorted(known) for form in (word, _SPACE + word)] + [f"{_SPACE},"]


def word_merges(forms: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that make one token of every form.

    Each form is written with the merges so far, and what is left in pieces is joined from the left by new ones. These
    rank last, so no earlier form, which is whole before they are reached, is written in another way.
    """
    merges: dict[tuple[str, str], int] = {}
    for form in forms:
        pieces = list(form)
        while len(pieces) > 1:
            known = [(merges[pair], at) for at, pair in enumerate(pairwise(pieces)) if pair in merges]
            if known:
                _, at = min(known)
            else:
                at = 0
                merges[pieces[0], pieces[1]] = len(merges)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return list(merges)

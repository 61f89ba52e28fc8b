"""Tokenizer and processor of the demo model: whole words, printed text by character, LLaVA-1.5's prompt form."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from capa_probe.demo.phrasings import DESCRIBE
from capa_probe.demo.questions import words
from capa_probe.demo.worlds import CHARACTERS, RICH, World

#: Patches are as large as it takes for an image of any world to have so many.
PATCHES_PER_SIDE = 12
N_PATCHES = PATCHES_PER_SIDE**2

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNKNOWN, IMAGE = range(len(SPECIAL))
#: How a turn begins and what asks for its answer, as in LLaVA-1.5.
USER, ASSISTANT = "USER:", "ASSISTANT:"
MARKS = ("?", ".", ",")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endif %}"
    "{% else %}ASSISTANT: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}</s>"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary(world: World = RICH) -> list[str]:
    known = words(world)
    characters = sorted(set(CHARACTERS) - set(known))
    # "K4" is read as "K", "##4", so that it also decodes as one word.
    return [*SPECIAL, USER, ASSISTANT, *MARKS, *known, *characters, *(f"##{c}" for c in sorted(CHARACTERS))]


def build_tokenizer(world: World = RICH) -> PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate(vocabulary(world))}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="<unk>", max_input_chars_per_word=40))
    # Sentences may begin with a capital; printed text must keep its own.
    phrases = [DESCRIBE, world.suffix, *(phrase for group in world.phrasings.values() for phrase in group)]
    first_words = sorted({phrase.split()[0] for phrase in phrases if phrase})
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(rf"\b{word.capitalize()}\b"), word) for word in first_words]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?.,]"), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor(world: World = RICH) -> LlavaProcessor:
    size = {"height": world.image_size, "width": world.image_size}
    images = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(world),
        patch_size=world.image_size // PATCHES_PER_SIDE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, dropped again by the strategy
        chat_template=CHAT_TEMPLATE,
    )

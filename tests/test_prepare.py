"""``prepare``: from images and questions to model inputs, with real processors of all three families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import capa_probe as cp
from capa_probe.errors import CapaProbeError
from tests import processors, tiny

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
#: Images by (height, width), and how many visual tokens each becomes.
SIZES = {
    "llava": (((20, 40), 16), ((16, 16), 16), ((50, 20), 16)),
    # Sides to multiples of 8, at most 32 x 32 pixels; an 8 x 8 square is a token.
    "qwen2_5_vl": (((24, 40), 15), ((16, 16), 4), ((8, 32), 4)),
    # Tiles of 16 x 16 closest in shape, 4 tokens each, and a thumbnail beside two or more.
    "internvl": (((20, 40), 12), ((16, 16), 4), ((60, 20), 16)),
}


def wrap(family: str, **changes: Any) -> cp.HookedLVLM:
    return cp.HookedLVLM(tiny.shared(family), changes.get("processor", processors.shared(family)))


def images_of(family: str) -> list[Image.Image]:
    return [processors.image(*size, seed=i) for i, (size, _) in enumerate(SIZES[family])]


def read(lvlm: cp.HookedLVLM, ids: torch.Tensor) -> str:
    """The text of one row, with each image's run of placeholders written once and padding left out."""
    token = lvlm.processor.image_token
    text = lvlm.processor.tokenizer.decode(ids).replace("<pad>", "")
    while token * 2 in text:
        text = text.replace(token * 2, token)
    return text


def one_sentence(error: pytest.ExceptionInfo[CapaProbeError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert 20 < len(text) < 400
    return text


@FAMILIES
def test_a_plain_question_gets_the_template_of_the_checkpoint(family: str) -> None:
    lvlm = wrap(family)
    inputs = lvlm.prepare(images_of(family)[0], "what is it?")
    # Written out, and in lower case as the tokenizer has it.
    wanted = {
        "llava": "<s>user: <image>\nwhat is it? assistant:",
        "qwen2_5_vl": (
            "<|im_start|>system\nyou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|vision_end|>what is it?<|im_end|>\n<|im_start|>assistant\n"
        ),
        "internvl": (
            "<|im_start|>user\n<img><IMG_CONTEXT></img>\nwhat is it?<|im_end|>\n<|im_start|>assistant\n"
        ),
    }
    assert read(lvlm, inputs["input_ids"][0]) == wanted[family]


@FAMILIES
def test_tensors_equal_those_of_the_processor_s_own_chat_call(family: str) -> None:
    lvlm, (first, second, third) = wrap(family), images_of(family)
    inputs = lvlm.prepare([[first, second], None, third], ["which one?", "hello", "and this image?"])
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": image} for image in own),
                    {"type": "text", "text": text},
                ],
            }
        ]
        for own, text in (([first, second], "which one?"), ([], "hello"), ([third], "and this image?"))
    ]
    wanted = lvlm.processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert set(inputs) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(inputs[name], tensor, rtol=0, atol=0)


@FAMILIES
def test_a_prompt_with_its_own_placeholders_is_taken_as_it_is(family: str) -> None:
    lvlm, (first, second, _) = wrap(family), images_of(family)
    token = processors.PLACEHOLDER[family]
    assert token == lvlm.processor.image_token
    around = ("<|vision_start|>", "<|vision_end|>") if family == "qwen2_5_vl" else ("", "")
    prompt = f"a {token.join(around)} b {token.join(around)} c"
    inputs = lvlm.prepare([first, second], prompt)
    start, end = {"internvl": ("<img>", "</img>")}.get(family, around)
    bos = "<s>" if family == "llava" else ""
    assert read(lvlm, inputs["input_ids"][0]) == f"{bos}a {start}{token}{end} b {start}{token}{end} c"
    spans = lvlm.spans(inputs)
    assert [(span.sample, span.index, len(span)) for span in spans.images] == [
        (0, i, SIZES[family][i][1]) for i in range(2)
    ]
    # Both kinds in one batch: each is treated by what it holds.
    both = lvlm.prepare([first, [first, second]], ["what is it?", prompt])
    assert read(lvlm, both["input_ids"][0]) == read(lvlm, lvlm.prepare(first, "what is it?")["input_ids"][0])
    assert read(lvlm, both["input_ids"][1]) == read(lvlm, inputs["input_ids"][0])


def test_a_bos_in_the_prompt_is_not_written_twice() -> None:
    lvlm, image = wrap("llava"), images_of("llava")[0]
    inputs = lvlm.prepare(image, "<s>user: <image>\nwhat is it? assistant:")
    plain = lvlm.prepare(image, "what is it?")
    assert torch.equal(inputs["input_ids"], plain["input_ids"])
    assert (inputs["input_ids"] == tiny.BOS).sum() == 1


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_unequal_prompts_is_padded_and_changes_no_logits(family: str, side: str) -> None:
    lvlm, (first, second, third) = wrap(family), images_of(family)
    given: list[Any] = [[first, third], None, second]
    questions = ["which is darker?", "hi", "what is in this image, and what is not?"]
    inputs = lvlm.prepare(given, questions, padding_side=side)
    spans = lvlm.spans(inputs)
    lengths = inputs["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == 3
    steps = inputs["attention_mask"].diff(dim=1)
    assert bool((steps >= 0).all() if side == "left" else (steps <= 0).all())
    assert torch.equal(spans.padding, inputs["attention_mask"] == 0)
    counts = [tokens for _, tokens in SIZES[family]]
    assert [(span.sample, span.index, len(span)) for span in spans.images] == [
        (0, 0, counts[0]),
        (0, 1, counts[2]),
        (2, 0, counts[1]),
    ]
    assert spans.visual.sum(1).tolist() == [counts[0] + counts[2], 0, counts[1]]
    with torch.no_grad():
        logits = lvlm(**inputs).logits
        for row in range(3):
            alone = lvlm.prepare(given[row], questions[row])
            torch.testing.assert_close(
                inputs["input_ids"][row][~spans.padding[row]], alone["input_ids"][0], rtol=0, atol=0
            )
            at = logits[row][~spans.padding[row]]
            torch.testing.assert_close(at, lvlm(**alone).logits[0], rtol=1e-4, atol=1e-5)


@FAMILIES
def test_token_counts_agree_with_the_processor_s_own_arithmetic(family: str) -> None:
    lvlm = wrap(family)
    sizes = [(17, 33), (64, 8), (31, 30), (100, 60)]
    inputs = lvlm.prepare([[processors.image(*size) for size in sizes]], ["compare"])
    counted = lvlm.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    if family == "internvl":
        counted = [count - 2 for count in counted]  # <img> and </img>
    assert [len(span) for span in lvlm.spans(inputs).images] == counted
    for span in lvlm.spans(inputs).images:
        assert (inputs["input_ids"][0, span.positions] == tiny.IMAGE).all()
    lvlm(**inputs)  # the model itself raises unless features and placeholders agree


@FAMILIES
def test_inputs_are_on_the_model_s_device_and_in_its_dtype(family: str) -> None:
    model = tiny.build(family).to(torch.bfloat16)
    lvlm = cp.HookedLVLM(model, processors.shared(family))
    inputs = lvlm.prepare(images_of(family)[0], "what is it?")
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.long
    assert all(tensor.device == model.device for tensor in inputs.values())
    assert lvlm(**inputs).logits.dtype == torch.bfloat16


def test_max_pixels_reaches_the_processor_of_qwen() -> None:
    lvlm, image = wrap("qwen2_5_vl"), processors.image(64, 128)
    # Each side times sqrt(max_pixels / (64 * 128)), rounded down to squares of 8 pixels.
    for options, grid in (
        ({"max_pixels": 1 << 20}, (8, 16)),
        ({"max_pixels": 2048}, (4, 8)),
        ({"max_pixels": 512}, (2, 4)),
        ({"size": {"shortest_edge": 64, "longest_edge": 512}}, (2, 4)),
        ({}, (2, 5)),
    ):
        inputs = lvlm.prepare(image, "what is it?", **options)
        assert inputs["image_grid_thw"].tolist() == [[1, 2 * grid[0], 2 * grid[1]]]
        (span,) = lvlm.spans(inputs).images
        assert span.grid == grid
        assert len(span) == grid[0] * grid[1]
        assert span.row.tolist() == [r for r in range(grid[0]) for _ in range(grid[1])]
        assert span.col.tolist() == list(range(grid[1])) * grid[0]


def test_min_pixels_reaches_the_processor_of_qwen() -> None:
    lvlm = wrap("qwen2_5_vl")
    inputs = lvlm.prepare(processors.image(16, 8), "what is it?", min_pixels=2048, max_pixels=4096)
    # Each side times sqrt(2048 / (16 * 8)) = 4.
    assert inputs["image_grid_thw"].tolist() == [[1, 16, 8]]
    assert (
        lvlm.processor.image_processor.size["longest_edge"] == 1024
    )  # the processor itself is left as it was


def tile_grid(height: int, width: int, least: int, most: int, tile: int = 16) -> tuple[int, int]:
    """InternVL's choice of rows and columns, from its description: the shape closest in width / height; of those
    that are equally close, the larger, as long as the image fills more than half of its area."""
    best, closest = (1, 1), float("inf")
    for n in range(least, most + 1):
        for cols in range(1, n + 1):
            if n % cols == 0:
                rows = n // cols
                distance = abs(width / height - cols / rows)
                fills = width * height > 0.5 * tile * tile * n
                if distance < closest or (distance == closest and fills):
                    best, closest = (rows, cols), distance
    return best


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_patches": 4},
        {"max_patches": 1},
        {"min_patches": 3, "max_patches": 6},
        {"crop_to_patches": False},
        {"images_kwargs": {"max_patches": 2}},
        {"images_kwargs": {"crop_to_patches": False}},
    ],
)
def test_tiles_of_internvl(options: dict[str, Any]) -> None:
    lvlm = wrap("internvl")
    sizes = [(16, 16), (20, 40), (64, 16), (33, 47), (40, 40), (100, 10)]
    inputs = lvlm.prepare([processors.image(*size) for size in sizes], "compare", **options)
    chosen = {"min_patches": 1, "max_patches": 12, "crop_to_patches": True, **options}
    chosen |= chosen.pop("images_kwargs", {})
    spans, total = lvlm.spans(inputs).images, 0
    assert len(spans) == len(sizes)
    for span, size in zip(spans, sizes, strict=True):
        rows, cols = tile_grid(*size, chosen["min_patches"], chosen["max_patches"])
        if not chosen["crop_to_patches"]:
            rows = cols = 1
        tiles = [*range(rows * cols), *([-1] if rows * cols > 1 else [])]
        assert span.tile_grid == (rows, cols)
        assert span.grid == (2, 2)
        assert span.tile.tolist() == [tile for tile in tiles for _ in range(4)]
        assert span.row.tolist() == [0, 0, 1, 1] * len(tiles)
        assert span.col.tolist() == [0, 1, 0, 1] * len(tiles)
        total += len(tiles)
    assert len(inputs["pixel_values"]) == total


def test_a_tile_of_internvl_lies_where_its_number_says() -> None:
    """One bright tile in a dark image shows up in the pixels of the tile with that number, and in the thumbnail."""
    lvlm, rows, cols = wrap("internvl"), 2, 3
    for place in range(rows * cols):
        pixels = np.zeros((16 * rows, 16 * cols, 3), dtype=np.uint8)
        r, c = divmod(place, cols)
        pixels[16 * r : 16 * (r + 1), 16 * c : 16 * (c + 1)] = 255
        inputs = lvlm.prepare(Image.fromarray(pixels), "where?")
        (span,) = lvlm.spans(inputs).images
        assert span.tile_grid == (rows, cols)
        bright = inputs["pixel_values"].mean(dim=(1, 2, 3))
        assert span.tile[::4].tolist() == [*range(rows * cols), -1]
        assert bright[:-1].argmax() == place
        assert (bright[:-1] > 0).sum() == 1
        assert bright[:-1].min() < bright[-1] < bright[:-1].max()


def test_the_layout_survives_moving_and_is_needed_for_places() -> None:
    lvlm = wrap("internvl")
    inputs = lvlm.prepare(processors.image(20, 40), "what is it?")
    assert inputs.to("cpu").tilings == inputs.tilings
    (bare,) = lvlm.spans(dict(inputs)).images
    assert bare.grid is None
    assert (bare.row == -1).all()
    assert len(bare) == 12


@FAMILIES
def test_images_of_any_mode(family: str) -> None:
    lvlm, image = wrap(family), images_of(family)[0]
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        other = image.convert(mode)
        wanted = lvlm.prepare(other.convert("RGB"), "what is it?")
        torch.testing.assert_close(lvlm.prepare(other, "what is it?")["pixel_values"], wanted["pixel_values"])


def test_a_processor_without_a_template() -> None:
    processor = processors.build("llava")
    processor.chat_template = None
    lvlm = wrap("llava", processor=processor)
    inputs = lvlm.prepare(images_of("llava")[:2], "what is it?")
    assert read(lvlm, inputs["input_ids"][0]) == "<s>user: <image>\n<image>\nwhat is it? assistant:"
    for family in ("qwen2_5_vl", "internvl"):
        processor = processors.build(family)
        processor.chat_template = None
        lvlm, image = wrap(family, processor=processor), images_of(family)[0]
        with pytest.raises(CapaProbeError, match=r"no chat template; set processor\.chat_template") as error:
            lvlm.prepare(image, "what is it?")
        one_sentence(error)
        token = processors.PLACEHOLDER[family]
        assert (lvlm.prepare(image, f"see {token}")["input_ids"] == tiny.IMAGE).any()


@FAMILIES
def test_what_cannot_be_prepared_is_told_in_one_sentence(family: str, tmp_path: Path) -> None:
    lvlm, (image, other, _) = wrap(family), images_of(family)
    token = processors.PLACEHOLDER[family]
    whole = tmp_path / "whole.png"
    image.save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-600])
    cases: list[tuple[Any, Any, str]] = [
        (image, f"{token} and {token}", "Prompt 0 holds 2 image placeholders .* for 1 images; write one"),
        ([image, [image, other]], ["a", f"b {token}"], "Prompt 1 holds 1 image placeholders .* for 2 images"),
        (None, f"a {token}", "Prompt 0 holds 1 image placeholders .* for 0 images"),
        ([image], ["a", "b"], "2 prompts and 1 entries of images were given; give one entry for each"),
        (image, ["a"], "One image was given for a list of prompts; give a list"),
        ([], [], "No prompt was given"),
        ("cat.png", "a", "An image of type str was given; open it first"),
        (Path("cat.png"), "a", "An image of type PosixPath was given; open it first"),
        (np.zeros((16, 16, 3), np.uint8), "a", "An image of type ndarray was given; open it first"),
    ]
    for images, prompts, message in cases:
        with pytest.raises(CapaProbeError, match=message) as error:
            lvlm.prepare(images, prompts)
        one_sentence(error)
    with pytest.raises(
        CapaProbeError, match=r"has no processor; give one, as HookedLVLM\(model, processor\)"
    ):
        wrap(family, processor=None).prepare(image, "a")


def test_what_a_processor_refuses_is_told_in_one_sentence() -> None:
    with pytest.raises(CapaProbeError, match=r"Qwen2_5_VLProcessor refused .* aspect ratio") as error:
        wrap("qwen2_5_vl").prepare(processors.image(4, 1200), "what is it?")
    one_sentence(error)
    with pytest.raises(CapaProbeError, match="LlavaProcessor refused") as error:
        wrap("llava").prepare(processors.image(16, 16), "what is it?", return_tensors="np")
    one_sentence(error)


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "turned"])
def test_an_image_and_a_sample_of_it_give_the_same_pixels(mode: str, tmp_path: Path) -> None:
    file, rng = tmp_path / "image.png", np.random.default_rng(0)
    if mode == "I;16":
        Image.fromarray(rng.integers(0, 2**16, (20, 30), dtype=np.uint16)).save(file)
    elif mode == "RGBA":
        Image.fromarray(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)).save(file)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file, exif=exif)
    lvlm = cp.HookedLVLM(tiny.shared("llava"), processors.shared("llava"))
    with Image.open(file) as image:
        given = lvlm.prepare(image, "what is it?")["pixel_values"]
    sample = lvlm.prepare(cp.Sample("a", file, "what is it?").open_images(), "what is it?")["pixel_values"]
    assert torch.equal(given, sample)

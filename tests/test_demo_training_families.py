"""Demo models of all families: the same stages, each with its own processor, prompt form and visual tokens."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Tokenizer

import capa_probe as cp
from capa_probe.demo.dataset import as_sentences
from capa_probe.demo.drawing import render, render_with_marks
from capa_probe.demo.questions import ask, describe
from capa_probe.demo.scenes import Scene, random_scene
from capa_probe.demo.worlds import CHARACTERS, COLORS, SHAPES, WIDE
from demo_training.architecture import Parts
from demo_training.evaluation import answer
from demo_training.export import export
from demo_training.families import FAMILIES, DemoFamily, Sizes
from demo_training.families.bpe import word_forms, word_merges
from demo_training.loop import Stage, run_stage
from demo_training.recipe import NAMES
from demo_training.recipes import RECIPES, warmed
from demo_training.sketches import NOTHING, field_sizes, sketch_patches, sketch_symbols, token_cells
from demo_training.stages import build_stage, turn_logits
from demo_training.turns import TurnStyle, draw_questions, pack
from demo_training.visual import Seen
from demo_training.warm_start import fitted_symbols, start_from

CPU = torch.device("cpu")
OTHERS = [name for name in FAMILIES if name != "llava"]
SEEDS = st.integers(0, 10_000)


#: The same architectures, small, so that tests are fast.
SMALL = Sizes(d_vision=32, vision_layers=2, d_model=64, d_mlp=64, layers=2, heads=4, kv_heads=2)
SMALL_RECIPES = {name: replace(recipe, sizes=SMALL) for name, recipe in RECIPES.items()}


@cache
def fresh(name: str) -> Parts:
    """Small, untrained, and not to be changed."""
    torch.manual_seed(0)
    return Parts(SMALL_RECIPES[name]).eval()


@cache
def hooked(name: str) -> cp.HookedLVLM:
    return cp.HookedLVLM(fresh(name).lvlm, processor(name))


def scenes(name: str, n: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, RECIPES[name].world) for _ in range(n)]


def prompt(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_logits_are_those_of_the_question_asked_alone(name: str) -> None:
    """Against the model's own forward on what its processor and chat template make of one question."""
    parts, world = fresh(name), RECIPES[name].world
    rng, boards = np.random.default_rng(1), scenes(name, 3)
    style = TurnStyle(dict.fromkeys(world.tasks, 1.0), mark=1.0, per_scene=4)
    questions = [draw_questions(scene, style, rng) for scene in boards]
    processor = parts.family.processor(world)
    turns = pack(questions, style, rng, processor.tokenizer, parts.family)
    layouts = [parts.family.layout(scene.image_shape, world) for scene in boards]
    if name != "llava":
        assert len({layout.n_tokens for layout in layouts}) > 1  # short rows are padded
    compared, gap = 0, " " if name == "llava" else ""  # there, words are told apart by spaces
    with torch.no_grad():
        images = parts.family.images(processor, [render(scene) for scene in boards])
        visual = parts.project(parts.features(images))
        packed = turn_logits(parts, visual, Seen.of(layouts), turns)
        for b, scene in enumerate(boards):
            for t, question in enumerate(questions[b]):
                here = turns.turn[b] == t + 1
                ids = turns.ids[b, here]
                for text in (question.text, as_sentences(question.text)):  # one of both is in the turn
                    asked = prompt(processor, text) + gap
                    alone = processor(
                        images=[render(scene)],
                        text=[f"{asked}{question.answer}{gap}{processor.tokenizer.eos_token}"],
                        return_tensors="pt",
                    )
                    n = len(ids)
                    if torch.equal(alone["input_ids"][0, -n:], ids):
                        logits = parts.lvlm(**alone).logits[0, -n:]
                        torch.testing.assert_close(packed[b, here], logits, rtol=1e-4, atol=1e-5)
                        n_before = len(parts.opening) + layouts[b].n_tokens + len(parts.closing)
                        assert alone["input_ids"].shape[1] == n_before + n
                        compared += 1
                        break
    assert compared == sum(map(len, questions))


@pytest.mark.parametrize("name", OTHERS)
def test_with_other_positions_they_are_not(name: str) -> None:
    """The check above can fail: behind an image that is one position longer, logits change."""
    parts, world = fresh(name), RECIPES[name].world
    rng, boards = np.random.default_rng(1), scenes(name, 1)
    style = TurnStyle(dict.fromkeys(world.tasks, 1.0), per_scene=2)
    processor = parts.family.processor(world)
    turns = pack([draw_questions(boards[0], style, rng)], style, rng, processor.tokenizer, parts.family)
    seen = Seen.of([parts.family.layout(boards[0].image_shape, world)])
    with torch.no_grad():
        visual = torch.randn(seen.there.shape[1], parts.decoder.config.hidden_size)
        right = turn_logits(parts, visual, seen, turns)
        other = turn_logits(parts, visual, replace(seen, length=seen.length + 1), turns)
    assert not torch.allclose(right, other, atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_visual_features_are_the_models_own(name: str) -> None:
    """Projected, they are what the model puts in the place of its image tokens, images of several sizes together."""
    parts, world = fresh(name), RECIPES[name].world
    boards = scenes(name, 4)
    assert len({scene.image_shape for scene in boards}) > 1
    images = parts.family.images(parts.family.processor(world), [render(scene) for scene in boards])
    with torch.no_grad():
        mine = parts.project(parts.features(images))
        found = parts.lvlm.get_image_features(**images).pooler_output
    theirs = torch.cat([each.reshape(-1, each.shape[-1]) for each in found])
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@given(seed=SEEDS)
@settings(max_examples=10)
def test_token_cells_are_where_the_toolkit_finds_the_tokens(name: str, seed: int) -> None:
    """Layouts against the spans that capa_probe reads off the processor's output, tile and thumbnail included."""
    parts, (scene,) = fresh(name), scenes(name, 1, seed)
    lvlm = hooked(name)
    (span,) = lvlm.spans(lvlm.prepare([render(scene)], "what color is the star?")).images
    layout = parts.family.layout(scene.image_shape, scene.world)
    cells = token_cells(scene, layout)
    assert len(span.positions) == layout.n_tokens
    rows, cols = span.grid
    tile_rows, tile_cols = span.tile_grid or (1, 1)
    for token, cell in enumerate(cells):
        tile = int(span.tile[token])
        assert (tile == -1) == (cell == -1)
        if cell >= 0:
            down = (int(span.row[token]) + 0.5) / rows + tile // tile_cols
            across = (int(span.col[token]) + 0.5) / cols + tile % tile_cols
            assert cell == int(down / tile_rows * scene.rows + 1e-9) * scene.cols + int(
                across / tile_cols * scene.cols + 1e-9
            )


@cache
def processor(name: str) -> Any:
    return FAMILIES[name].processor(RECIPES[name].world)


def test_images_have_as_many_visual_tokens_as_promised() -> None:
    shapes = {WIDE.image_shape(board) for board in WIDE.objects}
    counts = {
        name: {FAMILIES[name].layout(shape, WIDE).n_tokens for shape in shapes}
        for name in ("qwen2.5-vl", "internvl")
    }
    assert counts["qwen2.5-vl"] == {64, 72, 108, 144, 192}
    assert counts["internvl"] == {36, 3 * 36, 4 * 36, 5 * 36}  # one to four tiles, and a thumbnail
    for shape in shapes:
        image = Image.new("RGB", shape[::-1])
        grid = processor("qwen2.5-vl").image_processor([image], return_tensors="pt")["image_grid_thw"]
        assert (grid[0, 1:] * 8).tolist() == list(shape)  # not resized
    with pytest.raises(ValueError, match="an image of 96 x 96 pixels was given"):
        FAMILIES["qwen2.5-vl"].layout((96, 96), WIDE)


def shown(scene: Scene) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """What lies where, as sketches write it: (row, column) -> (field, value)."""
    things = {
        cell: {(0, SHAPES.index(shape)), (1, list(COLORS).index(color))}
        for cell, (shape, color) in scene.objects.items()
    } | {
        cell: {(2 + place, CHARACTERS.index(character)) for place, character in enumerate(text)}
        for cell, text in scene.texts.items()
    }
    return {divmod(cell, scene.cols): told for cell, told in things.items()}


@pytest.mark.parametrize("name", OTHERS)
def test_tokens_tell_what_they_show_and_where(name: str) -> None:
    """Nothing that is not there; and all of it, but for a few characters where three tokens lie over two cells."""
    limits = list(field_sizes(WIDE, FAMILIES[name].has_untold).values())
    n_things = n_told = 0
    for scene in scenes(name, 60):
        layout = FAMILIES[name].layout(scene.image_shape, WIDE)
        _, marks = render_with_marks(scene)
        sketch, cells = sketch_patches(scene, marks, layout), token_cells(scene, layout)
        told: dict[tuple[int, int], set[tuple[int, int]]] = {}
        for row, cell in zip(sketch, cells, strict=True):
            assert all(0 <= value < limit for value, limit in zip(row, limits, strict=True))
            here = {(field, value) for field, value in enumerate(row[:4]) if value != NOTHING[field]}
            if cell < 0:
                assert row == [*NOTHING, 9, 9]
            elif here:
                told.setdefault((row[4], row[5]), set()).update(here)
            else:
                assert (row[4], row[5]) == divmod(cell, scene.cols)
        wanted = shown(scene)
        assert set(told) <= set(wanted)
        for place, things in wanted.items():
            assert told[place] <= things
            n_things += len(things)
            n_told += len(told[place])
    assert n_told == n_things if name == "qwen2.5-vl" else n_told > 0.995 * n_things


@pytest.mark.parametrize("name", OTHERS)
@given(seed=SEEDS, n=st.integers(1, 80))
@settings(max_examples=15)
def test_symbols_hold_the_whole_scene_and_its_last_cell(name: str, seed: int, n: int) -> None:
    rng, (scene,) = np.random.default_rng(seed), scenes(name, 1, seed)
    layout = FAMILIES[name].layout(scene.image_shape, WIDE)
    rows, tokens = sketch_symbols(scene, layout, n, rng)
    assert tokens == sorted(set(tokens))
    assert len(rows) == len(tokens) >= min(n, layout.n_tokens)
    cells = token_cells(scene, layout)
    found: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for row, token in zip(rows, tokens, strict=True):
        told = {(field, value) for field, value in enumerate(row[:4]) if value != NOTHING[field]}
        assert (row[4], row[5]) == (divmod(cells[token], scene.cols) if cells[token] >= 0 else (9, 9))
        found.setdefault((row[4], row[5]), set()).update(told)
    assert (scene.rows - 1, scene.cols - 1) in found
    assert {place: told for place, told in found.items() if told} == shown(scene)


@pytest.mark.parametrize("name", OTHERS)
def test_words_are_tokens_and_come_back(name: str, tmp_path: Path) -> None:
    tokenizer = processor(name).tokenizer
    assert type(tokenizer) is Qwen2Tokenizer
    rng = np.random.default_rng(0)
    for scene in scenes(name, 40):
        for task in WIDE.tasks:
            question = ask(scene, task, rng) or describe(scene, texts=True)
            for text in (question.text, as_sentences(question.text), question.answer):
                pieces = tokenizer(text)["input_ids"]
                assert tokenizer.decode(pieces) == text
                # A token for each word, mark, digit, character of a printed text, and space before such a one.
                apart = (
                    sum(c.isdigit() or c.isupper() for c in question.answer) if text == question.answer else 0
                )
                assert len(pieces) <= len(text.split()) + 3 * sum(map(text.count, "?.,0123456789")) + apart
    answer_ids = tokenizer("K4")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(answer_ids) == ["K", "4"]


def test_no_word_is_written_in_another_way_by_later_merges() -> None:
    forms = word_forms(WIDE)
    merges = word_merges(forms)
    assert len(merges) == len(set(merges))
    tokenizer = processor("internvl").tokenizer
    for form in forms:
        assert tokenizer.tokenize(form.replace("Ġ", " ")) == [form]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_recipe_is_whole(name: str) -> None:
    family, cold = FAMILIES[name], RECIPES[name]
    for recipe in (cold,) if name == "llava" else (cold, warmed(cold)):
        assert recipe.family is family
        assert set(recipe.schedules) == set(recipe.scenes) == set(recipe.what) == set(recipe.stages)
        assert set(recipe.stages) == set(NAMES) - ({"shrunk", "polish"} if name != "internvl" else set())
        for stage, phases in recipe.phases.items():
            ends = [phase.until for phase in phases]
            assert ends == sorted(set(ends))
            assert ends[-1] == 1
            for phase in phases:
                if phase.style is not None:
                    assert set(phase.style.weights) == set(recipe.world.tasks)
                assert recipe.phase(stage, phase.until - 1e-6) is phase
                assert set(phase.world(recipe.world).objects) <= set(recipe.world.objects)
            assert set(phases[-1].world(recipe.world).objects) == set(recipe.world.objects)
            assert recipe.phase(stage, 1.0) is phases[-1]
            steps = recipe.schedules[stage].steps
            assert all((end * steps) == pytest.approx(round(end * steps)) for end in ends)
    parts = Parts(cold)
    assert (
        4 * sum(p.numel() for p in parts.lvlm.parameters()) < 22e6
    )  # besides the tokenizer and the card, 24 MB
    text = parts.decoder.config
    assert text.num_hidden_layers >= 8
    assert text.num_key_value_heads < text.num_attention_heads
    assert (parts.decoder.layers[0].self_attn.q_proj.bias is not None) == (name != "llava")


def weights(stage: Stage) -> dict[str, Tensor]:
    return {f"{n}.{k}": v.clone() for n, m in stage.trained.items() for k, v in m.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "stage_name"), [(name, stage) for name, recipe in RECIPES.items() for stage in recipe.stages]
)
def test_an_interrupted_stage_ends_at_the_same_weights(name: str, stage_name: str, tmp_path: Path) -> None:
    start = fresh(name).state_dict()

    def stage_of(parts: Parts) -> Stage:
        return build_stage(stage_name, parts, 0, CPU, steps=2, scenes=2)

    def trained(folder: Path, *stops: int | None) -> tuple[dict[str, Tensor], Parts]:
        for stop in stops:
            # As in a new process: what was learned comes from the checkpoint alone.
            parts = Parts(SMALL_RECIPES[name])
            parts.load_state_dict(start)
            stage = stage_of(parts)
            run_stage(stage, folder, lambda _: None, stop_at=stop)
        return weights(stage), parts

    straight, parts = trained(tmp_path / "a", None)
    resumed, _ = trained(tmp_path / "b", 1, None)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    before = weights(stage_of(fresh(name)))
    changed = {key.split(".")[0] for key in straight if not torch.equal(straight[key], before[key])}
    assert changed == set(stage_of(parts).trained)
    # What the stage does not name stays as it was.
    names = {id(p) for module in stage_of(parts).trained.values() for p in module.parameters()}
    for key, value in parts.named_parameters():
        assert id(value) in names or torch.equal(value, start[key]), key
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


@pytest.mark.parametrize("name", OTHERS)
def test_batches_can_be_drawn_by_other_processes(name: str) -> None:
    """What they are sent, and send back, is whole."""
    batch = build_stage("joint", fresh(name), 0, CPU, steps=2, scenes=2).batch
    images, seen, turns = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(batch))(1)))
    wanted, seen_here, turns_here = batch(1)
    assert all(torch.equal(images[key], wanted[key]) for key in wanted)
    assert torch.equal(seen.steps, seen_here.steps)
    assert torch.equal(turns.ids, turns_here.ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_saved_model_loads_offline_and_is_the_same(name: str, tmp_path: Path) -> None:
    parts, recipe = fresh(name), SMALL_RECIPES[name]
    made = processor(name)
    log = [
        {"stage": stage, "step": 1, "seconds": 60.0, "loss": 0.7, "accuracy": {"color": 0.5}}
        for stage in recipe.stages
    ]
    result = {"n": 10, "accuracy": 0.9, "low": 0.6, "high": 0.98, "blank": 0.125, "majority": 0.25}
    facts = {
        "accuracy": dict.fromkeys(recipe.world.tasks, result),
        "seed": 7,
        "machine": "a CPU",
        "n_parameters": sum(p.numel() for p in parts.lvlm.parameters()),
        "start_from": None if name == "llava" else "data/demo-lvlm",
        "profile": ["No sinks."],
    }
    folder = tmp_path / recipe.family.folder
    export(parts.lvlm, made, folder, log, facts, recipe)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 24e6
    logged = pd.read_parquet(folder / "training.parquet")
    assert logged[["stage", "step", "task"]].to_numpy().tolist() == [
        [stage, 1, "color"] for stage in recipe.stages
    ]
    assert all(v.dtype == torch.float32 for v in load_file(folder / "model.safetensors").values())
    model, loaded = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model) is recipe.family.model_class
    assert type(loaded) is type(made)
    assert type(loaded.tokenizer) is type(made.tokenizer)
    assert type(loaded.image_processor) is type(made.image_processor)
    boards = scenes(name, 2)
    question = prompt(made, "What color is the star? Answer briefly.")
    assert question == prompt(loaded, "What color is the star? Answer briefly.")
    one, other = (
        p(images=[render(s) for s in boards], text=[question] * 2, padding=True, return_tensors="pt")
        for p in (made, loaded)
    )
    assert set(one) == set(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
    with torch.no_grad():
        assert torch.equal(parts.lvlm(**one).logits, model.eval()(**other).logits)
    ids = [model.generation_config.eos_token_id, model.generation_config.pad_token_id]
    assert ids == [made.tokenizer.eos_token_id, made.tokenizer.pad_token_id]
    asked = ["what color is the star?", "How many stars are there? Answer briefly."]
    together = answer(model, loaded, [render(s) for s in boards], asked)
    assert together == answer(model, loaded, [render(s) for s in boards], asked, batch_size=1)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"`{recipe.family.model_class.__name__}`" in card
    assert ("trained LLaVA demo model (`data/demo-lvlm`)" in card) == (name != "llava")
    assert "## What it took" in card
    assert ("A board is described first" in card) == (name == "llava")  # each tells of its own training
    assert ("`polish` brought them" in card) == (name == "internvl")
    assert ("off by one" in card) == (name == "llava")  # so does this
    assert "\n\n## What a profile shows\n\n- " in card
    assert "{" not in card


@pytest.mark.parametrize("name", OTHERS)
def test_a_warm_start_computes_what_the_trained_decoder_does(name: str, tmp_path: Path) -> None:
    """On text, word for word."""
    llava = fresh("llava")
    llava.lvlm.save_pretrained(tmp_path)
    llava_tokenizer = FAMILIES["llava"].tokenizer(RECIPES["llava"].world)
    llava_tokenizer.save_pretrained(tmp_path)
    parts = Parts(SMALL_RECIPES[name]).eval()
    start_from(parts, tmp_path)
    text = "what color is the red circle?"
    mine = processor(name).tokenizer(text, return_tensors="pt")["input_ids"]
    theirs = llava_tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert mine.shape == theirs.shape
    with torch.no_grad():
        one = parts.decoder(input_ids=mine).last_hidden_state
        other = llava.decoder(input_ids=theirs).last_hidden_state
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        red = processor(name).tokenizer("red")["input_ids"], llava_tokenizer("red")["input_ids"][1:]
        torch.testing.assert_close(
            parts.lvlm.lm_head(one)[..., red[0]], llava.lvlm.lm_head(other)[..., red[1]], rtol=1e-4, atol=1e-5
        )


def test_a_warm_start_from_other_sizes_is_refused(tmp_path: Path) -> None:
    recipe = replace(RECIPES["llava"], sizes=replace(SMALL, d_mlp=512))
    Parts(recipe).lvlm.save_pretrained(tmp_path)
    FAMILIES["llava"].tokenizer(recipe.world).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="intermediate_size is 512, not 64"):
        start_from(Parts(SMALL_RECIPES["internvl"]), tmp_path)


def test_every_family_has_a_line() -> None:
    assert set(RECIPES) == set(FAMILIES) == {"llava", "qwen2.5-vl", "internvl"}
    assert len({family.folder for family in FAMILIES.values()}) == 3
    assert all(isinstance(family, DemoFamily) for family in FAMILIES.values())


def test_symbols_start_as_what_the_trained_projector_makes_of_what_they_stand_for() -> None:
    """On other scenes, of an untrained model, whose tower tells where a patch lies and how bright it is."""
    llava = fresh("llava")
    tables = fitted_symbols(llava.lvlm, 24)
    assert [len(table) for table in tables] == list(field_sizes(RECIPES["llava"].world).values())
    world = RECIPES["llava"].world
    errors, spread = [], []
    for scene in scenes("llava", 4, seed=1):
        image, marks = render_with_marks(scene)
        sketch = sketch_patches(scene, marks, llava.family.layout(scene.image_shape, world))
        images = llava.family.images(processor("llava"), [image])
        with torch.no_grad():
            wanted = llava.project(llava.features(images))
        told = torch.tensor(sketch)
        found = torch.stack([table[told[:, i]] for i, table in enumerate(tables)]).sum(dim=0)
        errors.append((wanted - found).var())
        spread.append(wanted.var())
    assert sum(errors) < 0.7 * sum(spread)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_projectors_loss(name: str) -> None:
    """Mean squared error over the target's variance; in InternVL's, tokens that show characters weigh ten times."""
    parts = fresh(name)
    stage = build_stage("projector", parts, 0, CPU, steps=2, scenes=2)
    images, sketches = stage.batch(0)
    loss = stage.loss((images, sketches))[0].item()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = parts.features(images)
        wanted, found = parts.symbols(sketches).float(), parts.project(features).float()
    total = weights = 0.0
    for row, target, mapped in zip(sketches.tolist(), wanted, found, strict=True):
        shows_text = row[2] != NOTHING[2] or row[3] != NOTHING[3]
        weight = 10 if shows_text and name == "internvl" else 1
        total += weight * float(((mapped - target) ** 2).mean())
        weights += weight
    assert weights > len(sketches) or name != "internvl"
    assert loss == pytest.approx(total / weights / float(wanted.var()), rel=1e-4)

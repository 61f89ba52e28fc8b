"""What a profile costs is measured as the docs say, and nothing of size tokens x tokens is allocated for it."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import itertools
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.profiler import ProfilerActivity

import capa_probe as cp
from capa_probe.probes.recorder import STEPS_TO_REMEMBER
from tests import tiny

ROOT = Path(__file__).parents[1]
PATTERN = "blocks.0.attn.hook_pattern"
SMALL = ["--layers", "2", "--width", "64", "--heads", "4", "--kv-heads", "4", "--threads", "1"]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of benchmarks/ or scripts/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def run(script: str, *options: str) -> None:
    """A benchmark in this process, since every import of torch takes seconds."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setattr(sys, "argv", [script, *options])
        importlib.import_module(script).main()
    torch.set_num_threads(threads)


# -- allocations


class Memory(NamedTuple):
    """Bytes that the CPU allocator handed out during some work, inside operators too."""

    largest: int  # block
    peak: int  # sum of blocks in use at once


def allocated(work: Callable[[], object]) -> Memory:
    gc.collect()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    # Blocks that are given back count negative.
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return Memory(max(sizes), max(itertools.accumulate(sizes)))


def long_prompt(tokens: int) -> dict[str, torch.Tensor]:
    """An image at the start, so that nearly all text tokens are queries of ``attention_text``."""
    inputs = tiny.inputs("llava", images=(1,), tail=(tokens - 20,))
    assert inputs["input_ids"].shape[1] == tokens
    return inputs


@pytest.fixture(scope="module")
def memory() -> dict[tuple[str, int], Memory]:
    """What was allocated, by what ran and tokens."""
    model = tiny.build("llava", max_position_embeddings=8224, num_hidden_layers=1)
    model.generation_config.eos_token_id = None
    lvlm = cp.HookedLVLM(model)
    found = {}
    with torch.no_grad():
        for tokens in (4096, 8192):
            inputs = long_prompt(tokens)
            works: dict[str, Callable[[], object]] = {
                "plain": lambda inputs=inputs: model(**inputs, use_cache=False, logits_to_keep=1),
                "profile": lambda inputs=inputs: cp.profile(lvlm, [inputs], probes="all", progress=False),
                "decode": lambda inputs=inputs: cp.profile(
                    lvlm, [inputs], steps=STEPS_TO_REMEMBER, progress=False
                ),
            }
            if tokens == 4096:
                works["pattern"] = lambda inputs=inputs: lvlm.run_with_cache(**inputs, names_filter=PATTERN)
            for name, work in works.items():
                found[name, tokens] = allocated(work)
    return found


@pytest.mark.parametrize("work", ["profile", "decode"])
@pytest.mark.parametrize("tokens", [4096, 8192])
def test_nothing_of_size_tokens_x_tokens_is_allocated(
    memory: dict[tuple[str, int], Memory], work: str, tokens: int
) -> None:
    # One byte for each pair of tokens would be the least, for a mask.
    assert memory[work, tokens].largest < tokens**2
    assert memory["plain", tokens].largest < tokens**2


@pytest.mark.parametrize("work", ["profile", "decode"])
def test_what_is_allocated_is_linear_in_tokens(memory: dict[tuple[str, int], Memory], work: str) -> None:
    """Each block, and all that are in use at once: rows of a pattern kept one by one would be the whole pattern."""
    for short, long in zip(memory[work, 4096], memory[work, 8192], strict=True):
        assert 0 < long <= 2.1 * short


def test_a_pattern_that_is_asked_for_would_be_seen(memory: dict[tuple[str, int], Memory]) -> None:
    assert memory["pattern", 4096].peak >= memory["pattern", 4096].largest >= 4 * 4 * 4096**2


# -- the scripts


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of every benchmark at small sizes."""
    out = tmp_path_factory.mktemp("results")
    lengths = ["--tokens", "608"]
    where = {name: ["--out", str(out / f"{name}.json")] for name in BENCHMARKS}
    few = ["plain", "profile", "profile_all", "eager", "transformerlens_filtered"]
    rounds = ["--rounds", "2", "--rounds-of-others", "1"]
    run("probe_overhead", *SMALL, *lengths, *rounds, "--variants", *few, *where["probe_overhead"])
    pair = ["--variants", "profile", "eager", "--limit-gb", "0.02"]
    run("probe_memory", *SMALL, "--tokens", "2048", "--rounds", "1", *pair, *where["probe_memory"])
    run("probe_decode", *SMALL, *lengths, "--rounds", "2", "--steps", "2", *where["probe_decode"])
    run("probe_7b", "--quick", "--layers", "1", "--rounds", "1", "--threads", "1", *where["probe_7b"])
    run("probe_throughput", "--samples", "8", "--threads", "1", *where["probe_throughput"])
    return out


BENCHMARKS = ("probe_overhead", "probe_memory", "probe_decode", "probe_7b", "probe_throughput")


def entries(results: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["entries"]


def test_times_are_of_every_variant_in_every_round(results: Path) -> None:
    ours, others = entries(results, "probe_overhead")
    assert list(ours["rounds"]) == ["plain", "profile", "profile_all"]
    assert list(others["rounds"]) == ["plain", "eager", "transformerlens_filtered"]
    for entry, n_rounds in ((ours, 2), (others, 1)):
        assert list(entry["rounds"]) == entry["settings"]["variants"]
        assert (entry["settings"]["tokens"], entry["settings"]["samples"]) == (608, 4)
        for seconds in entry["rounds"].values():
            assert len(seconds) == n_rounds
            assert all(each["wall"] > 0 and each["cpu"] > 0 for each in seconds)


def test_eager_attention_takes_more_memory_than_it_is_given_and_a_profile_does_not(results: Path) -> None:
    found = {
        (entry["settings"]["variant"], entry["settings"]["tokens"]): entry["rounds"]
        for entry in entries(results, "probe_memory")
    }
    (profile,) = found["profile", 2048]["profile"]
    (eager,) = found["eager", 2048]["eager"]
    assert profile["failed"] is None
    assert profile["extra"] < 20e6
    assert eager["failed"] == "more than 0.02 GB"


def test_decode_steps_and_the_7b_shape_are_measured(results: Path) -> None:
    for name in ("probe_decode", "probe_7b"):
        (entry,) = entries(results, name)
        assert list(entry["rounds"]) == ["plain", "profile", "profile_all"]
    assert all(each["peak"] > 1e8 for each in entry["rounds"]["profile"])


def test_the_throughput_of_every_sample_is_noted(results: Path) -> None:
    (entry,) = entries(results, "probe_throughput")
    (found,) = entry["rounds"]["profile"]
    assert [len(values) for values in found.values()] == [8, 8, 8]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_machine_is_described_and_not_named(results: Path, name: str) -> None:
    text = (results / f"{name}.json").read_text(encoding="utf-8")
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert str(ROOT) not in text
    assert entries(results, name)[0]["settings"]["machine"]["threads"] == 1


def test_rounds_add_up_and_other_settings_stand_apart(load: Any, tmp_path: Path) -> None:
    made = load("_overhead_rounds").Results(tmp_path / "r.json")
    made.add({"tokens": 1}, {"plain": {"wall": 2.0}, "profile": {"wall": 3.0}})
    made = load("_overhead_rounds").Results(tmp_path / "r.json")
    made.add({"tokens": 1}, {"plain": {"wall": 4.0}, "profile": {"wall": 4.0}})
    made.add({"tokens": 2}, {"plain": {"wall": 1.0}})
    assert [made.rounds({"tokens": n}) for n in (1, 2, 3)] == [2, 1, 0]
    assert load("_overhead_rounds").ratios(made.entries[0], "profile", "wall") == [1.5, 1.0]
    assert load("_overhead_rounds").spread([1.5, 1.0, 1.0]) == "1.00 (1.00-1.25)"
    assert load("_overhead_rounds").in_turn(["a", "b"], 3) == ["b", "a"]


@pytest.mark.parametrize("tokens", [600, 608, 2048])
def test_variants_run_the_same_weights(load: Any, tokens: int) -> None:
    models = load("_overhead_models")
    model = models.build(2, 64, 4, 2)
    other = models.twin(model, "eager")
    inputs = models.prompt(tokens, model=model)
    assert inputs["input_ids"].shape == (1, tokens)
    assert other.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert model.config.text_config._attn_implementation == "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


# -- the docs


def script() -> Any:
    """scripts/write_overhead.py."""
    spec = importlib.util.spec_from_file_location("write_overhead", ROOT / "scripts" / "write_overhead.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_written_from_the_results(results: Path, tmp_path: Path) -> None:
    page, image = tmp_path / "page.md", tmp_path / "figure.png"
    page.write_text("Above.\n\n<!-- results: start --><!-- results: end -->\n\nBelow.\n")
    command = ["--results", str(results), "--page", str(page), "--figure", str(image)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["write_overhead.py", *command])
        script().main()
    text = page.read_text()
    assert text.startswith("Above.\n\n")
    assert text.endswith("\n\nBelow.\n")
    for heading in ("Time", "Memory", "Decode steps", "A whole 7B model", "A long run"):
        assert f"### {heading}\n" in text
    assert "more than 0.02 GB" in text
    assert image.stat().st_size > 10_000


def test_the_docs_show_the_results(load: Any) -> None:
    write = script()
    page = (ROOT / "docs" / "overhead.md").read_text(encoding="utf-8")
    assert write.results(write.load(ROOT / "benchmarks" / "results")) in page

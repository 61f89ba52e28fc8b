"""The numbers for 7B models in the docs: the script prints them, and what it assumes is measured on small ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import estimate_cost
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging

import capa_probe as cp
from capa_probe.demo import demo_data_path, demo_model_path
from capa_probe.lvlm import HookedLVLM
from capa_probe.probes import Recorder, choose_probes

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "seven-billion.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def estimate() -> Iterator[Any]:
    verbosity = logging.get_verbosity()
    yield estimate_cost
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def cases(estimate: Any) -> dict[str, Any]:
    return {case.name: case for case in estimate.cases()}


class PeakMemory(TorchDispatchMode):
    """Counts the bytes that operations allocate, and the largest sum alive at once, without what was given."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, storage: int, n_bytes: int) -> None:
        self._known.discard(storage)
        self.alive -= n_bytes


class TestCostOf7B:
    def test_the_page_shows_what_the_script_prints(
        self, estimate: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.argv", ["scripts/estimate_cost.py"])
        estimate.main()
        printed = capsys.readouterr().out
        section = PAGE.split("\n## What a 7B model needs\n")[1].split("\n## ")[0]
        shown = [line for line in section.splitlines() if line.startswith("|")]
        assert shown == [line for line in printed.splitlines() if line]
        assert "Computed, not measured" in section
        assert "one question per image" in " ".join(section.split())
        assert "python scripts/estimate_cost.py" in section

    def test_the_readme_has_them_in_a_sentence(self, estimate: Any) -> None:
        def column(table: str, name: str) -> list[float]:
            heads, _, *rows = ([cell.strip(" *") for cell in line.split("|")] for line in table.splitlines())
            return [float(row[heads.index(name)].split()[0]) for row in rows]

        memory = column(estimate.memory_table(), "together")
        times, disk = (column(estimate.time_table(), name) for name in ("GPU, 1000 prompts", "disk"))
        sentence = (
            f"{min(memory):.0f} to {max(memory):.0f} GB of GPU memory, and for 1,000 prompts {min(times):.1f} to "
            f"{max(times):.1f} minutes on an A100 and {min(disk):.1f} to {max(disk):.1f} GB of tables"
        )
        assert sentence in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def test_parameters_are_those_of_the_checkpoints(self, estimate: Any, cases: dict[str, Any]) -> None:
        found = {name: estimate.parameters(case.model) for name, case in cases.items()}
        # As the checkpoints are advertised, and LLaVA counted by hand.
        assert {name: round(n / 1e9, 2) for name, n in found.items()} == {
            "LLaVA-1.5-7B": 7.06,
            "Qwen2.5-VL-7B": 8.29,
            "InternVL3-8B": 7.94,
        }
        d, mlp, v, v_mlp = 4096, 11008, 1024, 4096
        decoder = 32 * (4 * d * d + 3 * d * mlp + 2 * d) + d + 2 * 32064 * d
        block = 4 * (v * v + v) + (v * v_mlp + v_mlp) + (v_mlp * v + v) + 4 * v
        tower = 24 * block + 14 * 14 * 3 * v + v + 577 * v + 4 * v
        assert found["LLaVA-1.5-7B"] == decoder + tower + (v * d + d) + (d * d + d)

    def test_flops_reproduce_published_counts(self, estimate: Any, cases: dict[str, Any]) -> None:
        """8.706 T for LLaVA-1.5-7B on 625 tokens, 0.406 of them for tower and projector; 3.8172 T MACs for 576."""
        llava = cases["LLaVA-1.5-7B"]
        cost = estimate.prompt_cost(llava, 625)
        assert (cost.total - cost.decoder) / 1e12 == pytest.approx(0.4061, abs=5e-5)
        assert cost.total / 1e12 == pytest.approx(8.7059, abs=5e-5)
        assert estimate.prompt_cost(llava, 576).decoder / 2e12 == pytest.approx(3.8172, abs=5e-5)

    @pytest.mark.parametrize("name", ["LLaVA-1.5-7B", "Qwen2.5-VL-7B", "InternVL3-8B"])
    def test_prompts_cache_and_tower(self, name: str, estimate: Any, cases: dict[str, Any]) -> None:
        case = cases[name]
        text, prompt = case.text, case.prompt
        head = text.hidden_size // text.num_attention_heads
        cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head * prompt.tokens * 2
        assert estimate.cache_bytes(case) == cache
        # A prefill keeps none, so that it is no part of the sum.
        columns, shown = (
            [cell.strip(" *") for cell in line.split("|")]
            for line in estimate.memory_table().splitlines()
            if line.startswith(("| model", f"| {name}"))
        )
        gb = {
            column: float(cell.split()[0])
            for column, cell in zip(columns, shown, strict=True)
            if cell.endswith("GB")
        }
        assert gb["together"] == pytest.approx(gb["weights"] + gb["forward"] + gb["probes"], abs=0.07)
        # 640 x 480: 336 x 336 resized; multiples of 28 (23 x 17); 4 x 3 tiles and a thumbnail.
        wanted = {"LLaVA-1.5-7B": 24 * 24, "Qwen2.5-VL-7B": 23 * 17, "InternVL3-8B": 13 * 16 * 16}
        assert prompt.visual == wanted[name]
        merged = 1 if name == "LLaVA-1.5-7B" else 4
        assert prompt.patches == prompt.visual * merged
        # At least the products of the tower's blocks, and not half as much again.
        tower = getattr(case.model.model, "vision_tower", None) or case.model.model.visual
        least = 2 * estimate.parameters(tower) * prompt.patches
        cost = estimate.prompt_cost(case)
        assert 0.9 * least < cost.total - cost.decoder < 1.5 * least

    def test_a_row_takes_as_many_bytes_as_assumed(self, estimate: Any, tmp_path: Path) -> None:
        lvlm = cp.HookedLVLM.from_pretrained(demo_model_path())
        # One question per image: visual tokens before a second one are the same again, and compress away.
        samples = list(
            {sample.images[0]: sample for sample in cp.load_samples(demo_data_path(), limit=144)}.values()
        )
        sizes, rows = [], []
        for n in (8, len(samples)):  # between the two, what a file takes whatever it holds does not count
            prof = cp.profile(lvlm, samples[:n], out=tmp_path / str(n), batch_size=8, progress=False)
            parts = list((tmp_path / str(n) / "tokens").iterdir())
            sizes.append(
                [
                    sum(f.stat().st_size for f in found)
                    for found in (parts, [tmp_path / str(n) / "layers.parquet"])
                ]
            )
            rows.append([prof.manifest["n_token_rows"], prof.manifest["n_layer_rows"]])
        token, layer = np.diff(sizes, axis=0)[0] / np.diff(rows, axis=0)[0]
        assert len(samples) == 24
        assert token == pytest.approx(estimate.BYTES_PER_ROW, rel=0.05)
        assert layer == pytest.approx(estimate.BYTES_PER_LAYER_ROW, rel=0.1)

    @pytest.mark.parametrize(("d_model", "ratio"), [(256, 2.6875), (512, 2.6875), (256, 5.286)])
    def test_memory_inside_a_layer_is_as_assumed(self, estimate: Any, d_model: int, ratio: float) -> None:
        """Every allocation of a small model's forward, counted, as a prefill is run: without a cache."""
        n_layers, heads, d_mlp, tokens = 3, d_model // 128, int(ratio * d_model), 1024 + 32
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=128,
            patch_size=4,
        )
        text = LlamaConfig(
            vocab_size=64,
            hidden_size=d_model,
            intermediate_size=d_mlp,
            num_hidden_layers=n_layers,
            num_attention_heads=heads,
        )
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=60)
        model = LlavaForConditionalGeneration(config).eval().to(torch.bfloat16)
        ids = torch.tensor([[1, *[60] * 1024, *range(2, 33)]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["pixel_values"] = torch.randn(1, 3, 128, 128, dtype=torch.bfloat16)
        lvlm = HookedLVLM(model)
        given = [*model.parameters(), *model.buffers(), *inputs.values()]
        with torch.no_grad(), PeakMemory(given) as plain:
            model(**inputs, use_cache=False, logits_to_keep=1)
        recorder = Recorder(lvlm, choose_probes("default"), lvlm.spans(inputs))
        with torch.no_grad(), PeakMemory(given) as probed, recorder.attached():
            model(**inputs, use_cache=False, logits_to_keep=1)
        assert estimate.forward_bytes(d_model, d_mlp, tokens) == pytest.approx(plain.peak, rel=0.1)
        added = estimate.probe_bytes(d_model, n_layers, tokens)
        assert 0.95 * (probed.peak - plain.peak) < added  # an upper bound ...
        if ratio < 3:
            assert added < 1.25 * (probed.peak - plain.peak)  # ... and no wild one

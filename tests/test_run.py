"""One prompt with and without pruning: answers, tokens, cost and divergence are those of the runs themselves."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.special import rel_entr
from torch.utils.flop_counter import FlopCounterMode

import capa_probe as cp
from capa_probe.benchmark.one_prompt import OnePrompt, ranges, run_one_prompt
from capa_probe.benchmark.timing import time_interleaved
from capa_probe.demo import demo_data_path, demo_model_path
from capa_probe.describing import weights_hash
from capa_probe.pruning import CAPA, FastV, Pruner, Random
from capa_probe.pruning.ffn import HadamardFFN, SkipFFN
from capa_probe.samples import Fingerprint
from tests import processors, tiny
from tests import pruned_reference as reference
from tests.test_cli import invoke

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
N = 4
PRUNERS: dict[str, Pruner] = {
    "capa": CAPA(layers=(1, 3), keep=(0.5, 0.25)),
    "fastv": FastV(layers=(2,), keep=0.25),
    "random": Random(layers=(0,), keep=0.5),
    "same layer": CAPA(layers=(1,), keep=0.25, score_at="same"),
    "hadamard": CAPA(layers=(2,), keep=0.25, ffn=HadamardFFN({1: torch.full((32,), 0.9)})),
    "skip alone": CAPA(layers=(), ffn=SkipFFN((0, 2))),
    "masked": CAPA(layers=(2,), keep=0.25, execution="masked"),
}


def run(family: str, pruner: Pruner, repeats: int = 0, **options: Any) -> tuple[Any, Any, OnePrompt]:
    lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), tiny.inputs(family, (2,))
    return lvlm, inputs, run_one_prompt(lvlm, inputs, pruner, max_new_tokens=N, repeats=repeats, **options)


@torch.no_grad()
def answer(lvlm: cp.HookedLVLM, inputs: Any) -> Any:
    return lvlm.model.generate(
        **inputs, max_new_tokens=N, do_sample=False, return_dict_in_generate=True, output_logits=True
    )


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


class TestNumbers:
    @FAMILIES
    @pytest.mark.parametrize("name", PRUNERS)
    def test_are_those_of_the_runs_themselves(self, family: str, name: str) -> None:
        pruner = PRUNERS[name]
        lvlm, inputs, found = run(family, pruner)
        length = inputs["input_ids"].shape[1]
        plain = answer(lvlm, inputs)
        with pruner.attach(lvlm) as trace:
            pruned = answer(lvlm, inputs)
        assert found.pruned is not None
        for side, out in ((found.vanilla, plain), (found.pruned, pruned)):
            ids = out.sequences[0, length:].tolist()
            assert side.ids == tuple(ids)
            lengths = [n - (len(ids) - 1) for n in reference.kv_lengths(out.past_key_values)]
            assert side.kv_entries == tuple(lengths)
            assert side.kv_bytes == sum(lengths) * 2 * 2 * 8 * 4  # keys and values, KV heads, width, float32
        assert found.vanilla.visual_tokens == (found.n_visual,) * 4
        assert found.pruned.visual_tokens == tuple(trace.visual_tokens[:, 0].tolist())
        assert found.pruned.kv_entries == trace.lengths
        assert found.n_visual + found.n_text == length
        p, q = (out.logits[0][0].double().softmax(-1) for out in (plain, pruned))
        assert found.kl == pytest.approx(rel_entr(p.numpy(), q.numpy()).sum(), rel=1e-3, abs=1e-7)
        assert found.kl > 1e-6
        assert found.hellinger == pytest.approx(
            ((p.sqrt() - q.sqrt()).square().sum() / 2).sqrt().item(), rel=1e-3
        )
        assert found.compared_token == 1

    @FAMILIES
    @pytest.mark.parametrize("name", PRUNERS)
    def test_flops_are_those_that_torch_counts(self, family: str, name: str) -> None:
        pruner = PRUNERS[name]
        lvlm, inputs, found = run(family, pruner)
        counted = []
        for way in (nullcontext, lambda: pruner.attach(lvlm)):
            with torch.no_grad(), way(), FlopCounterMode(display=False) as prefill:
                out = lvlm.model(**inputs, logits_to_keep=1)
            with torch.no_grad(), way(), FlopCounterMode(display=False) as both:
                out = lvlm.model(**inputs, logits_to_keep=1)
                lvlm.model(input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values)
            counted.append((prefill.get_total_flops(), both.get_total_flops() - prefill.get_total_flops()))
        assert found.pruned is not None
        assert counted[0] == (found.vanilla.prefill.total, found.vanilla.step.total)
        # Torch does not count what is multiplied elementwise.
        parts, width = found.pruned.prefill.parts, 32
        scored = [layer for layer in found.pruned.prefill.layers if layer.scorer]
        weighting = sum(2 * layer.visual * width for layer in scored) if isinstance(pruner, CAPA) else 0
        assert counted[1] == (
            found.pruned.prefill.total - weighting - parts["hadamard"],
            found.pruned.step.total,
        )
        saves = found.pruned.prefill.total < found.vanilla.prefill.total
        assert saves == (name != "masked")
        assert (found.pruned.prefill_capa.total < found.vanilla.prefill_capa.total) == saves

    @FAMILIES
    def test_ranking_at_every_step(self, family: str) -> None:
        pruner = CAPA(layers=(2,), keep=0.25, rescore="every_step")
        lvlm, inputs, found = run(family, pruner)
        assert found.pruned is not None
        kept = round(0.25 * found.n_visual)
        assert found.kept_per_step == (found.n_visual, found.n_visual, kept, kept)
        assert found.pruned.visual_tokens == found.vanilla.visual_tokens
        assert found.pruned.kv_bytes == found.vanilla.kv_bytes
        assert found.pruned.prefill.total == found.vanilla.prefill.total
        assert found.pruned.step.total > found.vanilla.step.total  # it scores
        assert found.compared_token == 2
        plain = answer(lvlm, inputs)
        with pruner.attach(lvlm):
            other = answer(lvlm, inputs)
        assert torch.equal(plain.logits[0], other.logits[0])
        p, q = (out.logits[1][0].double().softmax(-1) for out in (plain, other))
        assert found.kl == pytest.approx(rel_entr(p.numpy(), q.numpy()).sum(), rel=1e-3)
        assert found.kl > 1e-6

    @FAMILIES
    def test_without_an_image(self, family: str) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared(family)), tiny.inputs(family, (0,))
        found = run_one_prompt(lvlm, inputs, CAPA(layers=(2,)), max_new_tokens=N, repeats=1)
        assert found.pruned is None
        assert found.vanilla.ids == tuple(answer(lvlm, inputs).sequences[0, found.n_text :].tolist())
        assert math.isnan(found.kl)
        assert found.speedups("prefill") == []
        content = json.loads(json.dumps(found.as_json(), allow_nan=False))
        assert (content["pruned"], content["kl_nats"], content["n_visual"]) == (None, None, 0)

    def test_as_json(self) -> None:
        _, _, found = run("llava", PRUNERS["capa"], repeats=2)
        content = json.loads(json.dumps(found.as_json(), allow_nan=False))
        assert found.pruned is not None
        assert content["pruned"]["visual_tokens"] == [32, 16, 16, 8]
        assert content["pruned"]["prefill_flops"]["total"] == found.pruned.prefill.total
        assert len(content["vanilla"]["step_seconds"]) == len(content["prefill_speedups"]) == 2
        one, two = content["vanilla"]["step_seconds"][1], content["pruned"]["step_seconds"][1]
        assert content["step_speedups"][1] == pytest.approx(one / two)
        kept = content["kept"]
        assert {layer: len(positions) for layer, positions in kept.items()} == {"1": 16, "3": 8}
        assert set(kept["3"]) < set(kept["1"])

    def test_ranges(self) -> None:
        assert ranges([9, 9, 4, 4, 4, 1]) == [("0-1", 9), ("2-4", 4), ("5", 1)]
        assert ranges([]) == []

    def test_it_leaves_nothing_behind(self) -> None:
        lvlm, inputs, _ = run("llava", PRUNERS["capa"], repeats=1)
        with CAPA(layers=(1,)).attach(lvlm), torch.no_grad():  # free again
            lvlm.model(**inputs)


class TestTiming:
    def test_all_ways_take_turns(self) -> None:
        lvlm, inputs, entered = cp.HookedLVLM(tiny.shared("llava")), tiny.inputs("llava", (1,)), []

        def way(name: str) -> Any:
            @contextmanager
            def inside() -> Any:
                entered.append(name)
                yield

            return inside

        found = time_interleaved(lvlm, inputs, [way("a"), way("b")], steps=2, repeats=3)
        assert "".join(entered) == "ab" + "ba" + "ab" + "ba"  # the first pair is not timed
        for times in found:
            assert len(times.prefill) == len(times.step) == 3
            assert min(times.prefill + times.step) > 0

    def test_steps_run_on_the_cache_of_each_way(self) -> None:
        lvlm, inputs, lengths = cp.HookedLVLM(tiny.shared("llava")), tiny.inputs("llava", (1,)), []
        note = [("blocks.3.attn.hook_pattern", lambda x, hook: lengths.append(tuple(x.shape[2:])))]
        with lvlm.hooks(note):
            time_interleaved(
                lvlm, inputs, [nullcontext, lambda: CAPA(layers=(2,)).attach(lvlm)], steps=2, repeats=0
            )
        assert lengths == [(23, 23), (1, 24), (1, 25), (11, 11), (1, 12), (1, 13)]

    def test_the_prefill_alone(self) -> None:
        lvlm, inputs = cp.HookedLVLM(tiny.shared("llava")), tiny.inputs("llava", (1,))
        (found,) = time_interleaved(lvlm, inputs, [nullcontext], steps=0, repeats=2)
        assert len(found.prefill) == 2
        assert found.step == ()


class TestCommand:
    SAMPLE = cp.load_samples(demo_data_path("test"), limit=1)[0]
    IMAGE = SAMPLE.images[0]
    ASKED = (
        "run",
        demo_model_path(),
        "--prompt",
        SAMPLE.question,
        "--max-new-tokens",
        "4",
        "--repeats",
        "0",
    )

    def test_on_the_demo_model(self, tmp_path: Path) -> None:
        file = tmp_path / "run.json"
        done = invoke(*self.ASKED, "--image", self.IMAGE, "--layers", "3", "--json", file, "--repeats", "1")
        assert done.exit_code == 0, done.output
        lines, (answer,) = table(done.stdout), self.SAMPLE.answers
        # <s>, USER:, ASSISTANT:, the words, and their two marks
        n_text = 3 + len(self.SAMPLE.question.split()) + 2
        assert done.stdout.startswith(f"144 visual and {n_text} text tokens in the prompt.\n")
        assert "capa: keep 0.25, before layer 3 (as given), compact." in done.stdout
        assert ["vanilla", answer] in lines
        assert ["pruned", answer] in lines
        assert ["visual", "tokens,", "layers", "0-2", "144", "144", "0.0%"] in lines
        assert ["visual", "tokens,", "layers", "3-7", "144", "36", "75.0%"] in lines
        whole, cut = 8 * (144 + n_text), 3 * (144 + n_text) + 5 * (36 + n_text)
        assert f"KV cache, entries {whole:,} {cut:,} {1 - cut / whole:.1%}".split() in lines
        assert "Time: median of 1 repeat of a prefill and 3 decode steps" in done.stdout
        content = json.loads(file.read_text())
        assert "Both answers are the same.\n" in done.stdout
        assert content["pruner"] == {
            "method": "capa",
            "layers": [3],
            "keep": 0.25,
            "execution": "compact",
            "score_at": "previous",
            "budget": "sample",
            "positions": "original",
            "allow_none": False,
            "ffn": None,
            "score": "contribution",
            "rescore": "prefill",
            "protect_anchors": False,
            "only_dumps": False,
            "tau": 20.0,
            "sink_dims": None,
            "seed": 0,
            "layers_from": "as given",
        }
        assert content["pruned"]["visual_tokens"] == [144] * 3 + [36] * 5
        assert content["pruned"]["answer"] == answer
        assert len(content["kept"]["3"]) == 36
        assert content["images_key"] == Fingerprint().add(self.SAMPLE)
        assert content["weights_hash"] == weights_hash(cp.HookedLVLM.from_pretrained(demo_model_path()).model)
        assert done.stderr.strip() == ""

    def test_several_images(self) -> None:
        done = invoke(
            *self.ASKED, "--image", self.IMAGE, "--image", self.IMAGE, "--keep", "36", "--budget", "image"
        )
        assert done.exit_code == 0, done.output
        assert "288 visual" in done.stdout
        assert ["visual", "tokens,", "layers", "1-7", "288", "72", "75.0%"] in table(done.stdout)

    def test_layers_that_were_not_given(self, tmp_path: Path) -> None:
        model = processors.save("qwen2_5_vl", tmp_path / "tiny")
        processors.image(16, 16).save(tmp_path / "a.png")
        asked = (
            "run",
            model,
            "--image",
            tmp_path / "a.png",
            "--prompt",
            "what is it",
            "--max-new-tokens",
            "3",
        )
        done = invoke(*asked, "--repeats", "0")
        assert done.exit_code == 0, done.output
        assert "before layer 1 (that of qwen2.5-vl-7b, early, scaled to this depth)" in done.stdout
        assert " ms " not in done.stdout  # nothing was timed
        done = invoke(*asked, "--paper-stage", "late", "--repeats", "0")
        assert "before layer 3 (that of qwen2.5-vl-7b, late, scaled to this depth)" in done.stdout
        done = invoke(*asked, "--method", "fastv", "--repeats", "0")
        assert "fastv: keep 0.25, before layer 2 (the method's own)" in done.stdout

    def test_published_layers(self) -> None:
        sizes = {
            "num_hidden_layers": 28,
            "hidden_size": 3584,
            "intermediate_size": 8,
            "num_attention_heads": 28,
        }
        from capa_probe.one_run import Wanted

        with torch.device("meta"):
            model = tiny.build("internvl", **sizes)
        pruner, why = Wanted("capa", {"keep": 0.25}).pruner(cp.HookedLVLM(model))
        assert (pruner.layers, why) == ((3,), "published for internvl3-8b, early")
        pruner, why = Wanted("random", {"keep": 0.25}, stage="late").pruner(cp.HookedLVLM(model))
        assert (pruner.layers, why) == ((21,), "published for internvl3-8b, late")

    def test_with_factors(self, tmp_path: Path) -> None:
        lvlm = cp.HookedLVLM.from_pretrained(demo_model_path())
        samples = cp.load_samples(demo_data_path("test"), limit=2)
        file, written = tmp_path / "alpha.safetensors", tmp_path / "run.json"
        cp.calibrate_hadamard(lvlm, samples, [5, 6, 7], progress=False).save(file)
        done = invoke(
            *self.ASKED,
            "--image",
            self.IMAGE,
            "--ffn",
            file,
            "--ffn-layers",
            "6-7",
            "--layers",
            "none",
            "--json",
            written,
        )
        assert done.exit_code == 0, done.output
        assert (
            f"capa: no tokens are dropped (as given); FFN of visual tokens x * alpha of {file} in layers 6-7.\n"
            in done.stdout
        )
        assert ["visual", "tokens,", "layers", "0-7", "144", "144", "0.0%"] in table(done.stdout)
        of = json.loads(written.read_text())["pruner"]["ffn"]
        fitted = HadamardFFN.load(file)
        assert (of["kind"], of["layers"], of["n_samples"]) == ("hadamard", [6, 7], 2)
        assert of["weights_hash"] == fitted.manifest["weights_hash"]
        skip = invoke(*self.ASKED, "--image", self.IMAGE, "--ffn", "skip", "--ffn-layers", "2,5-7")
        assert skip.exit_code == 0, skip.output
        assert "compact; FFN of visual tokens skipped in layers 2, 5-7.\n" in skip.stdout

    def test_options_of_capa(self) -> None:
        options = ("--score", "random", "--seed", "4", "--protect-anchors", "--execution", "masked")
        done = invoke(*self.ASKED, "--image", self.IMAGE, *options, "--keep", "0.5,0.25", "--layers", "2,5")
        assert done.exit_code == 0, done.output
        assert (
            "capa: keep 0.5 and 0.25, before layers 2, 5 (as given), masked; score random; seed 4; Structural Anchors "
            "stay; tau 5 (relative).\n"
        ) in done.stdout
        assert "Masked execution hides tokens and saves nothing." in done.stdout
        done = invoke(
            *self.ASKED, "--image", self.IMAGE, "--rescore", "every_step", "--prompt", "What is written?"
        )
        assert done.exit_code == 0, done.output
        assert "compact; rescore every_step.\n" in done.stdout
        assert "Ranking at every step drops nothing" in done.stdout

    def test_tau_by_itself_fits_the_width(self) -> None:
        from capa_probe.one_run import Wanted

        wanted = Wanted("capa", {"layers": (2,), "only_dumps": True, "tau": "auto"})
        with torch.device("meta"):
            wide = tiny.build("llava", hidden_size=512)
        for model, tau in ((wide, 20.0), (tiny.build("llava", hidden_size=256), "relative")):
            pruner, _ = wanted.pruner(cp.HookedLVLM(model))
            assert isinstance(pruner, CAPA)
            assert pruner.tau == tau

    def test_it_says_that_answers_differ(self) -> None:
        done = invoke(
            *self.ASKED,
            "--image",
            self.IMAGE,
            "--prompt",
            "What is written?",
            "--keep",
            "0",
            "--allow-none",
        )
        assert done.exit_code == 0, done.output
        answers = dict(
            line.split("  ", 1) for line in done.stdout.splitlines() if line[:8] in ("vanilla ", "pruned  ")
        )
        assert answers["vanilla"].strip() != answers["pruned"].strip()
        assert "The answers differ.\n" in done.stdout

    def test_without_an_image_it_says_so(self, tmp_path: Path) -> None:
        done = invoke(*self.ASKED, "--json", tmp_path / "run.json")
        assert done.exit_code == 0, done.output
        assert (
            "No image was given, so that there was nothing to prune; the model itself answered."
            in done.stdout
        )
        assert json.loads((tmp_path / "run.json").read_text())["pruned"] is None

    def test_help_has_an_example_and_names_every_method(self) -> None:
        from capa_probe.pruning.methods import METHODS

        text = " ".join(invoke("run", "--help").stdout.replace("│", " ").split())
        assert "Example: capa-probe run" in text
        *others, last = METHODS
        assert f"{', '.join(others)} or {last}." in text

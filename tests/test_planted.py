"""Probes and analyses give back what was planted, all of it and nothing else."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import capa_probe as cp
from capa_probe.analysis import measure_sink_dims
from capa_probe.measures import attention_contribution
from capa_probe.tables import LayerProfile
from tests import planted
from tests.planted import Planted, Sink
from tests.planted_weights import KINDS, SINKS
from tests.test_docs import blocks

ETA, TAU = 0.96, 20.0
PAGE = Path(__file__).parents[1] / "docs" / "planted.md"


class Findings(NamedTuple):
    """What the analyses say, or should say, of a model."""

    dims: set[tuple[int, int]]  # (layer, dimension)
    sinks: set[Sink]
    redundant: set[int]
    visual_only: set[int]


def true_findings(truth: Planted) -> Findings:
    dims = {(layer, dim) for layer, plan in enumerate(truth.plan) for dim in plan.dims.values()}
    return Findings(dims, truth.sinks, truth.redundant, truth.visual_only)


def findings(prof: LayerProfile) -> Findings:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "These dimensions exceed tau", UserWarning)  # tested below
        sinks = cp.classify_sinks(prof, tau=TAU, dims="measured")
    columns = ["sample", "layer", "image", "row", "col", "sink_dim", "role"]
    dims = measure_sink_dims(prof, tau=TAU)
    layers = cp.redundant_layers(prof, eta=ETA)
    return Findings(
        {(row.layer, row.dim) for row in dims[~dims["offset"]].itertuples()},
        {Sink(*row) for row in sinks[columns].itertuples(index=False)},
        set(layers.loc[layers["redundant"], "layer"]),
        set(layers.loc[layers["visual_only"], "layer"]),
    )


@cache
def profile(family: str, batch_size: int = 1) -> LayerProfile:
    truth = planted.plant(family)
    lvlm = cp.HookedLVLM(truth.model, truth.processor)
    return cp.profile(lvlm, truth.samples, batch_size=batch_size, progress=False)


@pytest.fixture(params=planted.FAMILIES)
def truth(request: pytest.FixtureRequest) -> Planted:
    return planted.plant(request.param)


@pytest.fixture
def tokens(truth: Planted) -> Any:
    """Visual token rows with the kind that was planted there."""
    table = profile(truth.family).tokens
    table = table[table["kind"] == "visual"].copy()
    places = table[["sample", "image", "row", "col"]].itertuples(index=False)
    table["planted"] = [truth.kinds[sample][place] for sample, *rest in places for place in [tuple(rest)]]
    return table


def test_exactly_what_was_planted_comes_back(truth: Planted) -> None:
    found, expected = findings(profile(truth.family)), true_findings(truth)
    # 6 sinks in each of 5 images and 5 layers.
    assert len(expected.sinks) == 150
    assert found == expected
    assert expected.redundant == {2, 3, 5}
    assert expected.visual_only == {2, 3}


def test_truth_is_rich_enough_to_get_wrong(truth: Planted) -> None:
    dims = {layer: set(plan.dims.values()) for layer, plan in enumerate(truth.plan) if plan.dims}
    assert sorted(dims) == [2, 3, 4, 5, 6]
    assert dims[2] == dims[4] != dims[5] == dims[6]
    assert min(len(of_layer) for of_layer in dims.values()) >= 2
    assert {plan.roles["switch"] for plan in truth.plan} == {"dump", "anchor"}
    # Every sample has its own pattern.
    patterns = {tuple(kinds.values()) for kinds in truth.kinds.values()}
    assert len(patterns) == len(truth.samples)
    others = {planted.plant(family).layout.sink for family in planted.FAMILIES}
    assert len(others) == len(planted.FAMILIES)


def test_left_padding_changes_no_finding(truth: Planted) -> None:
    lvlm = cp.HookedLVLM(truth.model, truth.processor)
    batch = lvlm.prepare([s.open_images() for s in truth.samples], [s.question for s in truth.samples])
    padding = lvlm.spans(batch).padding
    assert padding[:, 0].any()
    assert not padding[:, -1].any()
    assert findings(profile(truth.family, batch_size=4)) == true_findings(truth)


def test_offset_is_called_an_offset(truth: Planted) -> None:
    prof = profile(truth.family)
    dims = measure_sink_dims(prof, tau=TAU)
    offsets = dims[dims["offset"]]
    assert set(zip(offsets["layer"], offsets["dim"], strict=True)) == {
        (layer, truth.layout.offset) for layer in range(2, 8)
    }
    assert (offsets["share"] == 1).all()
    with pytest.warns(UserWarning, match=f"dimension {truth.layout.offset} at layers 2-7; they are offsets"):
        sinks = cp.classify_sinks(prof, tau=TAU)
    assert truth.layout.offset not in set(sinks["sink_dim"])
    # Each sink counts once, in its own dimension.
    for row in dims[~dims["offset"]].itertuples():
        expected = [s for s in truth.sinks if (s.layer, s.dim) == (row.layer, row.dim)]
        assert row.n_tokens == len(expected)


def test_shuffled_truths_do_not_match(truth: Planted) -> None:
    found = findings(profile(truth.family))
    for seed in range(20):
        false = true_findings(truth.shuffled(seed))
        for name, of_profile, of_shuffle in zip(Findings._fields, found, false, strict=True):
            assert of_profile != of_shuffle, (seed, name)
        assert len(found.sinks & false.sinks) < 0.2 * len(found.sinks)


def test_random_weights_have_nothing_of_it(truth: Planted) -> None:
    lvlm = cp.HookedLVLM(planted.unplanted(truth.family), truth.processor)
    found = findings(cp.profile(lvlm, truth.samples, progress=False))
    assert found == Findings(set(), set(), set(), set())


def attention_alone(attention: torch.Tensor, values: torch.Tensor, project: Any) -> torch.Tensor:
    return attention.mean(dim=1)


def value_norm_alone(attention: torch.Tensor, values: torch.Tensor, project: Any) -> torch.Tensor:
    return values.norm(dim=-1).mean(dim=1)


def means_over_heads_first(attention: torch.Tensor, values: torch.Tensor, project: Any) -> torch.Tensor:
    return attention.mean(dim=1) * values.norm(dim=-1).mean(dim=1)


def wrong_kv_heads(attention: torch.Tensor, values: torch.Tensor, project: Any) -> torch.Tensor:
    """KV heads in turn, instead of each serving a group of neighbouring heads."""
    tiled = values.repeat(1, attention.shape[1] // values.shape[1], 1, 1)
    return attention_contribution(attention, tiled, project)


@pytest.mark.parametrize(
    "formula", [attention_alone, value_norm_alone, means_over_heads_first, wrong_kv_heads]
)
def test_wrong_contributions_give_wrong_roles(formula: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capa_probe.probes.contribution.attention_contribution", formula)
    truth = planted.plant("qwen2_5_vl")
    found = findings(profile.__wrapped__("qwen2_5_vl"))
    expected = true_findings(truth)
    assert found.sinks != expected.sinks
    assert {sink[:-1] for sink in found.sinks} == {sink[:-1] for sink in expected.sinks}  # all but the role


def test_sinks_take_attention_and_anchors_alone_contribute(truth: Planted, tokens: Any) -> None:
    assert set(tokens["planted"]) == set(KINDS)
    for (_, layer), group in tokens.groupby(["sample", "layer"]):
        roles = truth.plan[layer].roles
        is_sink = group["planted"].isin(SINKS if truth.plan[layer].dims else ())
        if not is_sink.any():
            continue
        sinks, others = group[is_sink], group[~is_sink]
        plain = others[others["planted"] != "bright"]
        assert sinks["attention"].sum() > 0.5 * group["attention"].sum()
        assert sinks["attention_text"].sum() > 0.5 * group["attention_text"].sum()
        assert sinks["attention"].min() > 4 * plain["attention"].max()
        # Attended, of great value, and still no sink.
        bright = others[others["planted"] == "bright"]
        assert bright["attention"].min() > 4 * plain["attention"].max()
        anchor = sinks["planted"].map(roles) == "anchor"
        assert sinks.loc[anchor, "contribution"].min() > 5 * plain["contribution"].max()
        assert sinks.loc[~anchor, "contribution"].max() < 0.2 * plain["contribution"].min()
        # A large value that no head attends to is no contribution.
        unread = sinks["planted"] == "unread"
        assert sinks.loc[~anchor & ~unread, "value_norm"].max() < 0.01 * plain["value_norm"].min()
        assert sinks.loc[unread, "value_norm"].min() > plain["value_norm"].max()


def test_tall_tokens_stay_below_tau(tokens: Any) -> None:
    tall = tokens[(tokens["planted"] == "tall") & (tokens["layer"] >= 2)]
    assert tall["sink_strength_2"].between(16, TAU, inclusive="neither").all()
    assert tall["sink_dim_2"].nunique() == 1


def test_ffn_cosines(truth: Planted) -> None:
    layers = cp.redundant_layers(profile(truth.family), eta=ETA).set_index("layer")
    for layer, plan in enumerate(truth.plan):
        for kind, does in (("visual", plan.visual), ("text", plan.text)):
            cosine = layers.loc[layer, f"{kind}_cosine"]
            low, high = {"turn": (-1, 0.85), "same": (1 - 1e-6, 1 + 1e-6), "scale": (0.97, 0.99)}[does]
            assert low < cosine < high, (layer, kind)


def test_alphas(truth: Planted) -> None:
    lvlm = cp.HookedLVLM(truth.model, truth.processor)
    names = [f"blocks.{layer}.hook_resid_{at}" for layer in range(lvlm.n_layers) for at in ("mid", "post")]
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for sample in truth.samples:
        batch = lvlm.prepare(sample.open_images(), sample.question)
        visual = lvlm.spans(batch).visual
        _, cache = lvlm.run_with_cache(**batch, names_filter=lambda name: name in parts)
        for name, kept in parts.items():
            kept.append(cache[name][visual].double())
    for layer in range(lvlm.n_layers):
        x, y = (torch.cat(parts[f"blocks.{layer}.hook_resid_{at}"]) for at in ("mid", "post"))
        energy = x.square().sum(dim=0)
        live = energy > 1e-6
        alpha = torch.where(live, (x * y).sum(dim=0) / energy.clamp(min=1e-12), 1.0)
        error = (y - x * alpha).norm(dim=1) / y.norm(dim=1)
        if layer not in truth.redundant:
            assert error.mean() > 0.3, layer
            continue
        # What the tokens of one RMS see is exactly the planted factor, in every channel.
        rms = x.square().mean(dim=1).sqrt()
        assert rms.max() / rms.min() - 1 < 1e-4
        expected = truth.alpha(layer).double()
        assert (alpha - expected).abs().max() < 1e-3, layer
        assert error.max() < 1e-3, layer
        if layer == 2:
            assert (expected == 1).all()
            assert torch.equal(y, x)
        else:
            assert expected.std() > 0.2
            assert live.sum() > 990  # nearly every channel is tested
            assert error.max() < 0.01 * ((y - x).norm(dim=1) / y.norm(dim=1)).median()


@pytest.mark.parametrize(
    ("removed", "answers"), [((), True), (("dump", "unread"), True), (("anchor", "switch"), False)]
)
def test_the_answer_comes_from_the_anchors(truth: Planted, removed: tuple[str, ...], answers: bool) -> None:
    lvlm = cp.HookedLVLM(truth.model, truth.processor)
    samples = truth.samples
    batch = lvlm.prepare([s.open_images() for s in samples], [s.question for s in samples])
    gone = truth.mask(lvlm.spans(batch), samples, removed)

    def remove(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        kept = pattern.masked_fill(gone[:, None, None, :], 0.0)
        return kept / kept.sum(dim=-1, keepdim=True).clamp(min=1e-9)

    def everywhere(name: str) -> bool:
        return name.endswith("hook_pattern")

    out = lvlm.run_with_hooks(**batch, fwd_hooks=[(everywhere, remove)] if removed else [])
    said = truth.processor.tokenizer.convert_ids_to_tokens(out.logits[:, -1].argmax(dim=-1).tolist())
    expected = [truth.answers[s.id] if answers else truth.without_answer for s in samples]
    assert said == expected


def test_documented_code_runs() -> None:
    (block,) = blocks(PAGE, "python")
    namespace: dict[str, Any] = {}
    with pytest.warns(UserWarning, match="they are offsets"):
        exec(block, namespace)
    assert namespace["found"] == namespace["truth"].sinks
    assert set(namespace["layers"].query("visual_only")["layer"]) == namespace["truth"].visual_only


def test_documented_table_is_what_comes_back() -> None:
    truth, prof = planted.plant("llava"), profile("llava")
    found, layers = findings(prof), cp.redundant_layers(prof, eta=ETA).set_index("layer")
    expected = []
    for layer, plan in enumerate(truth.plan):
        counts = [
            ", ".join(
                str(sum((s.layer, s.role) == (layer, role) for s in sinks)) for role in ("dump", "anchor")
            )
            for sinks in (truth.sinks, found.sinks)
        ]
        row = layers.loc[layer]
        verdict = "visual only" if row["visual_only"] else "yes" if row["redundant"] else "no"
        cosines = [f"{row['visual_cosine']:.2f}", f"{row['text_cosine']:.2f}"]
        expected.append([str(layer), plan.visual, plan.text, *counts, *cosines, verdict])
    section = PAGE.read_text(encoding="utf-8").split("## What comes back")[1]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:3].strip("| ").isdigit()]
    assert table == expected


def test_the_model_is_the_librarys_own(truth: Planted) -> None:
    for module in truth.model.modules():
        assert type(module).__module__.split(".")[0] in ("transformers", "torch")
        assert "forward" not in vars(module)
    config = truth.model.config.get_text_config()
    grouped = config.num_key_value_heads < config.num_attention_heads
    biased = truth.model.model.language_model.layers[0].self_attn.q_proj.bias is not None
    assert (grouped, biased) == ((True, True) if truth.family == "qwen2_5_vl" else (False, False))

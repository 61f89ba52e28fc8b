"""After an exception, wherever it came from, no hook, backend or other state stays; a user's own hooks still fire."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import capa_probe as cp
from capa_probe.lvlm import attached, tap
from capa_probe.probes import PROBES
from tests import tiny
from tests.invariances.comparing import profiled

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


def state(lvlm: cp.HookedLVLM) -> list[Any]:
    """Everything that a profile touches, in the model, the wrapper and the library."""
    model, modules = lvlm.model, [*lvlm.model.modules()]
    return [
        [list(getattr(module, name).values()) for module in modules for name in HOOK_DICTS],
        [module.config._attn_implementation for module in modules if hasattr(module, "config")],
        [sorted(vars(module)) for module in modules],
        [module.training for module in modules],
        [parameter.requires_grad for parameter in model.parameters()],
        model.generation_config.to_dict(),
        [point.fwd_hooks + point.bwd_hooks for point in lvlm.hook_dict.values()],
        [point._detach for point in lvlm.hook_dict.values()],
        [dict(tap._SWITCHES), {m: list(who) for m, who in tap._LISTENERS.items() if who}],
        [model in attached._PRUNERS],
        [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()],
    ]


@pytest.fixture(params=tiny.FAMILY_NAMES)
def lvlm(request: pytest.FixtureRequest) -> Iterator[cp.HookedLVLM]:
    """A model of its own; whatever a test does to it must be gone in the end, and it must measure as before."""
    model = tiny.build(request.param)
    model.generation_config.eos_token_id = None
    inputs = tiny.inputs(request.param)
    with torch.no_grad():
        logits = model(**inputs).logits  # on its first forward transformers puts hooks of its own on it
    wrapper = cp.HookedLVLM(model)
    before, wanted = state(wrapper), profiled(wrapper, [inputs], steps=1)
    yield wrapper
    assert state(wrapper) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert profiled(wrapper, [inputs], steps=1).equals(wanted)


def fails_at(number: int, function: Callable[..., Any], error: type[BaseException]) -> Callable[..., Any]:
    """A function that raises at its n-th call."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error("broken")
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("probe", PROBES)
def test_an_exception_in_a_probe(lvlm: cp.HookedLVLM, probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tiny.inputs(lvlm.family.name)
    for number, error in (
        (1, ValueError),
        (3, Stop),
        (lvlm.n_layers + 2, ValueError),
    ):  # the last one while decoding
        with monkeypatch.context() as patched:
            patched.setattr(PROBES[probe], "measure", fails_at(number, PROBES[probe].measure, error))
            with pytest.raises(error, match="broken"):
                profiled(lvlm, [inputs], steps=1)


PLACES: dict[str, Callable[[PreTrainedModel], torch.nn.Module]] = {
    "the vision tower": lambda model: next(
        module
        for name, module in model.named_modules()
        if ("vis" in name and isinstance(module, torch.nn.LayerNorm)) or name.endswith("visual.merger")
    ),
    "an attention": lambda model: model.model.language_model.layers[2].self_attn,
    "a norm": lambda model: model.model.language_model.layers[1].post_attention_layernorm,
    "the head": lambda model: model.lm_head,
}


@pytest.mark.parametrize("place", PLACES)
def test_an_exception_in_a_user_s_module_hook(lvlm: cp.HookedLVLM, place: str) -> None:
    module = PLACES[place](lvlm.model)
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(fails_at(1, lambda *_: None, Stop))
        with pytest.raises(Stop):
            profiled(lvlm, [tiny.inputs(lvlm.family.name)], steps=1)
        handle.remove()


@pytest.mark.parametrize(
    "name",
    ["hook_embed", "blocks.1.attn.hook_rot_k", "blocks.2.attn.hook_pattern", "blocks.3.hook_resid_mid"],
)
def test_an_exception_in_a_hook_on_a_hook_point(lvlm: cp.HookedLVLM, name: str) -> None:
    inputs = tiny.inputs(lvlm.family.name)
    fails = fails_at(2, lambda x, hook: None, ZeroDivisionError)  # at the decode step
    with pytest.raises(ZeroDivisionError), lvlm.hooks([(name, fails)]):
        profiled(lvlm, [inputs], steps=1)
    with pytest.raises(ZeroDivisionError):
        lvlm.run_with_cache(**inputs, names_filter=fails_at(2, lambda name: True, ZeroDivisionError))


def test_an_exception_in_an_observer_of_attention_or_in_the_data(lvlm: cp.HookedLVLM) -> None:
    inputs = tiny.inputs(lvlm.family.name)
    with pytest.raises(Stop), lvlm.attention_calls(fails_at(3, lambda call: None, Stop)):
        lvlm.model(**inputs)

    def source() -> Iterator[dict[str, Tensor]]:
        yield inputs
        raise Stop

    with pytest.raises(Stop):
        profiled(lvlm, source())
    broken = dict(inputs, attention_mask=inputs["attention_mask"][:, :-1])
    with pytest.raises(Exception, match=r"\w"):
        profiled(lvlm, [inputs, broken], steps=1)


def test_an_exception_while_listening_begins(lvlm: cp.HookedLVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text_model, inputs = lvlm.family.text_model(lvlm.model), tiny.inputs(lvlm.family.name)
    point = "blocks.0.attn.hook_pattern"
    begins: list[Callable[[], Any]] = [
        lambda: profiled(lvlm, [inputs]),
        lambda: lvlm.add_hook(point, lambda x, hook: None),
        lambda: lvlm.run_with_cache(**inputs),
    ]
    for begin in begins:
        with monkeypatch.context() as patched:
            patched.setattr(text_model, "set_attn_implementation", fails_at(1, lambda name: None, Stop))
            with pytest.raises(Stop):
                begin()


@FAMILIES
def test_a_user_s_own_hooks_fire_as_often_as_without_a_profile(family: str) -> None:
    """Forward, pre-forward and global hooks on every module, and what they return counts."""
    model, inputs = tiny.build(family), tiny.inputs(family)
    model.generation_config.eos_token_id = None
    calls: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] = calls.get(name, 0) + 1

        return hook

    with torch.no_grad():
        model(**inputs)
    plain = profiled(cp.HookedLVLM(model), [inputs], steps=1)
    handles = [
        register(count(f"{kind} {name}"))
        for name, module in model.named_modules()
        for kind, register in (
            ("after", module.register_forward_hook),
            ("before", module.register_forward_pre_hook),
        )
    ]
    handles.append(torch.nn.modules.module.register_module_forward_hook(count("any")))
    try:
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        alone = dict(calls)
        calls.clear()
        assert profiled(cp.HookedLVLM(model), [inputs], steps=1).equals(plain)
        # TransformerLens's hook points are modules, too, which a global hook sees.
        assert calls.pop("any") >= alone.pop("any") > 0
        assert calls == alone
        assert calls["after lm_head"] == calls["before model.language_model.layers.3.self_attn.o_proj"] == 2
    finally:
        for handle in handles:
            handle.remove()
    layer = model.model.language_model.layers[1]
    handle = layer.mlp.register_forward_hook(lambda module, args, output: 3 * output)
    edited = profiled(cp.HookedLVLM(model), [inputs])
    handle.remove()
    at = (plain["layer"] == 1) & (plain["step"] == 0)
    own = plain.loc[at, "ffn_update_norm"].to_numpy()
    assert torch.allclose(
        torch.tensor(edited.loc[edited["layer"] == 1, "ffn_update_norm"].to_numpy()),
        torch.tensor(3 * own),
        rtol=1e-5,
    )

"""Sink strength, cosines, least squares, Hellinger and the threshold: naive twins on drawn inputs, and properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from capa_probe import measures
from capa_probe.errors import CapaProbeError
from tests import naive
from tests.test_measures import close, dtypes, seeds


@given(
    width=st.integers(1, 9),
    top=st.integers(1, 5),
    dtype=dtypes,
    scale=st.sampled_from((1e-3, 1.0, 1e3)),
    seed=seeds,
    data=st.data(),
)
def test_sink_strength(
    width: int, top: int, dtype: torch.dtype, scale: float, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Magnitudes spaced out by more than bf16 rounds, so that the order of dimensions is the same for both.
    magnitudes = 1.2 ** torch.rand(2, 3, width, generator=generator).argsort(-1).float()
    signs = torch.randint(0, 2, (2, 3, width), generator=generator) * 2 - 1
    x = (magnitudes * signs * scale).to(dtype)
    dims = data.draw(st.none() | st.lists(st.integers(0, width - 1), max_size=width))
    strength, index = measures.sink_strength(x, eps=1e-5, dims=dims, top=top)
    assert strength.shape == index.shape == (2, 3, top)
    looked_at = list(range(width)) if dims is None else sorted(set(dims))
    for b in range(2):
        for t in range(3):
            wanted = naive.sink_strength(x[b, t].tolist(), 1e-5, looked_at)[:top]
            wanted += [(math.nan, -1)] * (top - len(wanted))
            close(strength[b, t], [value for value, _ in wanted])
            assert index[b, t].tolist() == [d for _, d in wanted]


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=64))
@example([0.0, 0.0, 3e3, 0.0])
@example([0.0, 0.0])
def test_sink_strength_never_exceeds_the_root_of_the_width(x: list[float]) -> None:
    strength, _ = measures.sink_strength(torch.tensor(x))
    assert 0 <= strength.item() <= math.sqrt(len(x)) * (1 + 1e-6)


def test_sink_strength_reaches_its_bound_and_ignores_scale_and_order() -> None:
    x = torch.zeros(400)
    x[123] = -50.0
    strength, index = measures.sink_strength(x)
    assert (strength.item(), index.item()) == (pytest.approx(20, rel=1e-6), 123)
    noise = torch.randn(5, 32)
    order = torch.randperm(32)
    strength, index = measures.sink_strength(noise, top=3)
    shuffled, moved = measures.sink_strength(1000 * noise[:, order], top=3)
    close(shuffled, strength, rtol=1e-4)
    assert torch.equal(order[moved], index)


@given(st.integers(2, 8), dtypes, st.sampled_from((1e-3, 1.0, 1e3)), seeds)
def test_io_cosine(width: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, update = (torch.randn(2, width, generator=generator).to(dtype) for _ in range(2))
    found = measures.io_cosine(x * scale, update * scale)
    rows = zip((x * scale).tolist(), (update * scale).tolist(), strict=True)
    close(found, [naive.io_cosine(*row) for row in rows], atol=1e-5)
    assert (found.abs() <= 1 + 1e-6).all()
    order = torch.randperm(width, generator=generator)
    close(measures.io_cosine(x[:, order] * scale, update[:, order] * scale), found)


@pytest.mark.parametrize(("factor", "cosine"), [(0.0, 1.0), (5.0, 1.0), (-0.5, 1.0), (-2.0, -1.0)])
def test_io_cosine_sees_direction_and_not_length(factor: float, cosine: float) -> None:
    x = torch.randn(7, 16)
    close(measures.io_cosine(x, factor * x), torch.full((7,), cosine))


@given(st.integers(1, 8), st.integers(1, 4), dtypes, seeds)
def test_hadamard_alpha_is_least_squares(tokens: int, width: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    x = x.sign() * (0.1 + x.abs())  # away from zero, where the twin's search would have to look too far
    x, y = x.to(dtype), (x * torch.randn(width, generator=generator) + noise).to(dtype)
    found = measures.hadamard_alpha(x, y)
    wanted = [
        torch.linalg.lstsq(x[:, d : d + 1].double(), y[:, d : d + 1].double()).solution.item()
        for d in range(width)
    ]
    close(found, wanted)
    close(found, naive.hadamard_alpha(x.tolist(), y.tolist()), rtol=1e-5, atol=1e-5)
    order = torch.randperm(tokens, generator=generator)
    close(measures.hadamard_alpha(x[order], y[order]), found)
    close(measures.hadamard_alpha(x, x * 4), torch.full((width,), 4.0))


def test_hadamard_alpha_of_a_silent_channel_is_one_and_of_a_loud_one_exact() -> None:
    x, alpha = torch.randn(500, 3) * torch.tensor([1e4, 1.0, 0.0]), torch.tensor([0.75, -2.0, 1.0])
    close(measures.hadamard_alpha(x, x * alpha), alpha)
    close(measures.hadamard_alpha(x, x * alpha + torch.tensor([0.0, 0.0, 9.0])), alpha)


@given(st.integers(2, 8), dtypes, seeds)
def test_hellinger(outcomes: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = ((3 * torch.randn(2, 3, outcomes, generator=generator)).softmax(-1).to(dtype) for _ in range(2))
    found = measures.hellinger(p, q)
    rows = zip(p.flatten(0, 1).tolist(), q.flatten(0, 1).tolist(), strict=True)
    close(found.flatten(), [min(1.0, naive.hellinger(*row)) for row in rows])
    assert ((found >= 0) & (found <= 1)).all()
    assert torch.equal(found == 0, (p == q).all(-1))
    assert torch.equal(found, measures.hellinger(q, p))
    r = torch.full_like(p, 1 / outcomes)
    assert (found <= measures.hellinger(p, r) + measures.hellinger(r, q) + 1e-6).all()


def test_hellinger_of_equal_and_of_disjoint_distributions() -> None:
    p = torch.tensor([[0.3, 0.7, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    q = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 1.0, 0.0, 0.0]])
    close(measures.hellinger(p, p), torch.zeros(2), atol=0)
    close(measures.hellinger(p, q), torch.tensor([1.0, 0.0]))


@given(st.integers(2, 8), dtypes, seeds)
def test_kl_divergence(outcomes: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = ((3 * torch.randn(2, 3, outcomes, generator=generator)).to(dtype) for _ in range(2))
    found = measures.kl_divergence(p, q)
    rows = zip(p.flatten(0, 1).tolist(), q.flatten(0, 1).tolist(), strict=True)
    close(found.flatten(), [max(0.0, naive.kl_divergence(*row)) for row in rows])
    assert (found >= 0).all()
    close(
        measures.kl_divergence(p.float(), p.float() + 2), torch.zeros(2, 3), atol=1e-5
    )  # softmax knows no offset
    impossible = p.clone()
    impossible[..., 0] = -torch.inf
    close(
        measures.kl_divergence(impossible, q).flatten()[0],
        naive.kl_divergence(impossible.flatten(0, 1).tolist()[0], q.flatten(0, 1).tolist()[0]),
    )
    assert measures.kl_divergence(q, impossible).isposinf().all()


# -- the threshold


@given(st.integers(1, 10_000), st.floats(1e-3, 200))
def test_an_absolute_tau_is_taken_as_it_is_or_refused_as_out_of_reach(d_model: int, tau: float) -> None:
    assume(abs(tau - math.sqrt(d_model)) > 1e-6)
    if tau < math.sqrt(d_model):
        assert measures.resolve_tau(tau, d_model) == tau
        return
    with pytest.raises(CapaProbeError) as caught:
        measures.resolve_tau(tau, d_model)
    message = str(caught.value)
    for part in (f"width {d_model}", f"{math.sqrt(d_model):.4g}", 'tau="relative"'):
        assert part in message
    assert "\n" not in message


def test_the_relative_tau_is_twenty_at_the_width_of_the_paper_s_model() -> None:
    assert measures.resolve_tau("relative", 4096) == 20.0
    assert measures.resolve_tau("relative", 256) == pytest.approx(5.0)


@given(st.integers(1, 255))
def test_the_relative_tau_is_refused_on_narrow_models(d_model: int) -> None:
    with pytest.raises(CapaProbeError, match=rf"width {d_model}, but below width 256 .* absolute tau"):
        measures.resolve_tau("relative", d_model)


def test_narrow_is_where_gaussian_tokens_pass() -> None:
    """The limit of 256 is no opinion: the share of Gaussian tokens above the relative threshold."""
    generator = torch.Generator().manual_seed(0)
    for width, low, high in ((96, 0.14, 0.20), (128, 0.03, 0.05), (256, 0.0, 0.002)):
        strength, _ = measures.sink_strength(torch.randn(10_000, width, generator=generator))
        share = float((strength > 0.3125 * math.sqrt(width)).float().mean())
        assert low <= share <= high


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, "auto", "20"])
def test_a_senseless_tau_is_refused(tau: float | str) -> None:
    with pytest.raises(CapaProbeError, match=r'positive number or "relative"'):
        measures.resolve_tau(tau, 4096)

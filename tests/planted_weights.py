"""Decoder weights set by hand: sinks with known dimensions and roles, FFNs that do a known thing in each layer.

The residual stream is laid out in channels (:class:`Layout`). Every visual token has one ``kind`` flag among them,
and its content is +a or -a in each content channel, so that signed swaps and channel-wise factors keep all tokens at
one RMS: on them RMSNorm is linear, and ``silu(gate) * up`` is too wherever the gate reads flags only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D_MODEL, D_MLP, D_HEAD = 1024, 1536, 64
#: plain: none of it; bright: attended, not massive; tall: a large dimension that stays below tau; the rest are sinks.
KINDS = ("plain", "bright", "tall", "dump", "anchor", "switch", "unread")
SINKS = ("dump", "anchor", "switch", "unread")
N_ANSWERS = 8
FLAG, TALL, OFFSET, CONTENT = 2.0, 17.0, 21.5, 23.0  # lengths; equal RMS follows from TALL < CONTENT
GATE = 30.0  # silu(-30) = -3e-12: a closed gate adds nothing
TEXT_FLAG = math.sqrt(3) * FLAG  # as much as the three flags of a visual token
N_VOICE = 24  # content channels that values read; text has no content there
RESTING = 40.0  # logit gap that keeps visual queries on text keys, whose values are zero
TEXT_WEIGHT = 0.1  # attention of text queries to text keys, beside 1 for a plain visual token


@dataclass(frozen=True)
class Layout:
    """Which channel of the residual stream means what."""

    visual: int
    text: int
    offset: int
    tall: int
    sink: tuple[int, ...]
    kinds: dict[str, int]
    #: One per answer; the last says that a token bears none.
    payload: list[int]
    #: Where attention writes what it read.
    read: list[int]
    #: Content that sinks lack, the second group being the one that tall tokens lack too.
    content: tuple[Tensor, Tensor]

    @classmethod
    def random(cls, generator: torch.Generator) -> Layout:
        order = torch.randperm(D_MODEL, generator=generator)
        named = iter(order[:48].tolist())
        rest = order[48:]
        lacking = 2 * round(len(rest) * TALL**2 / CONTENT**2 / 2)
        return cls(
            visual=next(named),
            text=next(named),
            offset=next(named),
            tall=next(named),
            sink=tuple(next(named) for _ in range(3)),
            kinds={kind: next(named) for kind in KINDS},
            payload=[next(named) for _ in range(N_ANSWERS + 1)],
            read=[next(named) for _ in range(16)],
            content=(rest[lacking:], rest[:lacking]),
        )

    def of_kind(self) -> Tensor:
        """One token of each kind as it enters the decoder, all content positive: (kind, d_model), float64."""
        x = torch.zeros(len(KINDS), D_MODEL, dtype=torch.float64)
        x[:, self.visual], x[:, self.offset] = FLAG, OFFSET
        lengths = (math.sqrt(CONTENT**2 - TALL**2), TALL)
        for row, kind in enumerate(KINDS):
            x[row, self.kinds[kind]] = FLAG
            x[row, self.payload[0 if kind == "anchor" else -1]] = FLAG
            if kind in SINKS:
                continue
            for channels, length in zip(self.content, lengths, strict=True):
                x[row, channels] = length / math.sqrt(len(channels))
            if kind == "tall":
                x[row, self.content[1]] = 0.0
                x[row, self.tall] = TALL
        return x

    def of_text(self, signs: Tensor) -> Tensor:
        """Text embeddings of about the same RMS, with content of the given signs (token, d_model)."""
        plain = self.of_kind()[0]
        x = torch.zeros(len(signs), D_MODEL, dtype=torch.float64)
        x[:, self.text], x[:, self.offset] = TEXT_FLAG, OFFSET
        for channels in self.content:
            x[:, channels] = plain[channels] * signs[:, channels]
        x[:, self.content[0][:N_VOICE]] = 0.0
        return x


@dataclass(frozen=True)
class LayerPlan:
    """What one layer's FFN does to visual and to text tokens: "turn", "same" or "scale" (by ``alpha``)."""

    visual: str
    text: str
    #: Sink dimension that each kind of sink has when it *enters* this layer, and its role here.
    dims: dict[str, int]
    roles: dict[str, str]
    #: (d_model,), for "scale".
    alpha: Tensor | None = None


class FFNWriter:
    """Fills the units of one SwiGLU block, which starts out as zeros."""

    def __init__(self, mlp: nn.Module, layout: Layout, tokens: Tensor) -> None:
        self.mlp, self.layout, self.tokens, self.used = mlp, layout, tokens, 0

    def gate(self, visual: float, text: float, kind: str | None = None) -> Tensor:
        """A gate open (+1) or closed (-1) on visual and on text tokens; with a kind, open on that kind alone."""
        row = torch.zeros(D_MODEL, dtype=torch.float64)
        row[self.layout.visual] = visual * GATE / FLAG
        row[self.layout.text] = text * GATE / TEXT_FLAG
        if kind is not None:
            row[self.layout.kinds[kind]] = 2 * GATE / FLAG
        return row

    def linear(self, gate: Tensor, channels: Tensor, change: Tensor) -> None:
        """Where the gate is open, add ``change @ x[channels]``; exact on tokens of the plain token's RMS."""
        n, rms = len(channels), _rms(self.tokens[0])
        strength = F.silu(GATE / rms) / rms
        up = torch.zeros(n, D_MODEL, dtype=torch.float64)
        up[torch.arange(n), channels] = 1.0
        self._units(gate.expand(n, -1), up, change / strength)

    def constant(self, kind: str, change: Tensor) -> None:
        """Add the vector ``change`` to tokens of one kind."""
        token = self.tokens[KINDS.index(kind)]
        gate, up = self.gate(-1, -1, kind), torch.zeros(D_MODEL, dtype=torch.float64)
        up[self.layout.visual] = 1.0
        normed = token / _rms(token)
        strength = F.silu(gate @ normed) * normed[self.layout.visual]
        self._units(gate[None], up[None], (change / strength)[:, None])

    def result(self) -> Tensor:
        """The tokens of each kind after the block as it stands."""
        normed = self.tokens / _rms(self.tokens)
        gate, up, down = (
            getattr(self.mlp, name).weight.double() for name in ("gate_proj", "up_proj", "down_proj")
        )
        return self.tokens + (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T

    def _units(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        at = slice(self.used, self.used + len(gate))
        self.used = at.stop
        self.mlp.gate_proj.weight[at] = gate.float()
        self.mlp.up_proj.weight[at] = up.float()
        self.mlp.down_proj.weight[:, at] = down.float()


def random_alpha(
    layout: Layout, tokens: Tensor, massive: dict[int, float], generator: torch.Generator
) -> Tensor:
    """A factor for every content channel, the offset and the given dimensions; plain and tall tokens keep one RMS."""
    alpha = torch.ones(D_MODEL, dtype=torch.float64)
    for channels in layout.content:
        uneven = 0.5 + torch.rand(len(channels), generator=generator, dtype=torch.float64)
        energy = tokens[0, channels].square()
        alpha[channels] = uneven * (energy.sum() / (uneven.square() * energy).sum()).sqrt()
    alpha[layout.offset] = 0.98
    for dim, factor in massive.items():
        alpha[dim] = factor
    return alpha


def write_ffn(
    mlp: nn.Module, layout: Layout, plan: LayerPlan, next_dims: dict[str, int], tokens: Tensor
) -> Tensor:
    """Make an FFN do what the plan says, and move the massive dimensions to where the next layer has them.

    Returns:
        The tokens of each kind afterwards.
    """
    ffn = FFNWriter(mlp, layout, tokens)
    both = torch.cat(layout.content)
    if plan.visual == "scale":
        assert plan.alpha is not None
        scaled = (plan.alpha != 1).nonzero().flatten()
        change = torch.zeros(D_MODEL, len(scaled), dtype=torch.float64)
        change[scaled, torch.arange(len(scaled))] = plan.alpha[scaled] - 1
        ffn.linear(ffn.gate(1, 1 if plan.text == "scale" else -1), scaled, change)
    if plan.visual == "turn":
        ffn.linear(ffn.gate(1, 1 if plan.text == "turn" else -1), both, _turn(both))
    elif plan.text == "turn":
        ffn.linear(ffn.gate(-1, 1), layout.content[0], _turn(layout.content[0]))
    if next_dims != plan.dims:
        after = ffn.result()
        for kind in SINKS:
            token = after[KINDS.index(kind)]
            change = torch.zeros(D_MODEL, dtype=torch.float64)
            change[list(layout.sink)] = -token[list(layout.sink)]
            if kind in next_dims:  # as large as it must be for the RMS of a plain token
                left = (token + change).square().sum()
                change[next_dims[kind]] += (after[0].square().sum() - left).sqrt()
            ffn.constant(kind, change)
    return ffn.result()


def write_attention(attn: nn.Module, layout: Layout, plan: LayerPlan, tokens: Tensor, n_heads: int) -> None:
    """Text queries attend to what is massive (and to bright tokens) in most heads, visual queries rest on text.

    Scores live in the slowest rotary pairs, where tens of positions turn nothing. Values: plain tokens a middling one,
    anchors their answer, dumps almost none, text exactly none; those of unread tokens are large where no head looks.
    """
    rms, half, scaling = _rms(tokens[0]).item(), D_HEAD // 2, D_HEAD**-0.5
    n_kv = attn.k_proj.out_features // D_HEAD
    to_massive, to_text = half - 1, half - 2
    for head in range(n_heads):
        last_group = head // (n_heads // n_kv) == n_kv - 1
        weight = 0.001 if last_group else 16.0 * (1 + head % 3)  # the last group's heads look past them
        row = attn.q_proj.weight[head * D_HEAD :]
        _write_constant(attn.q_proj, head * D_HEAD + to_massive, math.log(weight) / scaling, layout, rms)
        row[to_text, layout.visual] = RESTING / scaling / FLAG * rms
        row[to_text, layout.text] = math.log(TEXT_WEIGHT) / scaling / TEXT_FLAG * rms
        # All heads of a KV group read what its values hold.
        for dim, channel in enumerate(layout.read):
            attn.o_proj.weight[channel, head * D_HEAD + dim] = 1.0 / n_heads

    loudness = {role: 0.01 if role == "dump" else 6.0 for role in ("dump", "anchor")}
    for group in range(n_kv):
        key, value = attn.k_proj.weight[group * D_HEAD :], attn.v_proj.weight[group * D_HEAD :]
        key[to_massive, list(layout.sink)] = rms / CONTENT
        key[to_massive, layout.kinds["bright"]] = rms / FLAG
        key[to_text, layout.text] = rms / TEXT_FLAG
        scale = (1 + 0.1 * group) * rms
        for answer in range(N_ANSWERS):
            value[answer, layout.payload[answer]] = loudness["anchor"] * scale / FLAG
        for dim in range(N_ANSWERS, N_ANSWERS + 4):  # 1 + a bit of content, on all but sinks
            value[dim, layout.visual] = scale / FLAG
            value[dim, [layout.kinds[kind] for kind in SINKS]] = -scale / FLAG
            value[dim, layout.content[0][group * 4 + dim]] = 0.5 * scale
        for kind, role in plan.roles.items():
            if kind == "unread":
                if group == n_kv - 1:
                    value[N_ANSWERS + 4, layout.kinds[kind]] = 20.0 * scale / FLAG
            elif kind != "anchor":
                value[N_ANSWERS + 4, layout.kinds[kind]] = loudness[role] * scale / FLAG


def write_linear_path(
    first: nn.Linear, second: nn.Linear, permutation: Tensor, weight: Tensor, bias: Tensor
) -> None:
    """Make ``second(GELU(first(z)))`` the map ``weight @ z[permutation] + bias``: GELU(z) - GELU(-z) is z.

    Args:
        first: from the vision tower.
        second: to the decoder.
        permutation: (bit,) place of each bit of a token's code in what the tower hands on.
        weight: (d_model, bit).
        bias: (d_model,).
    """
    bits = torch.arange(len(permutation))
    first.weight[bits, permutation] = 1.0
    first.weight[len(bits) + bits, permutation] = -1.0
    second.weight[:, bits] = weight.float()
    second.weight[:, len(bits) + bits] = -weight.float()
    second.bias.copy_(bias.float())


def write_head(lm_head: nn.Linear, layout: Layout, answers: Sequence[int], default: int) -> None:
    """The token ``answers[k]`` follows where answer k was read, ``default`` where none was."""
    for channel, token in zip(layout.read, answers, strict=False):
        lm_head.weight[token, channel] = 1.0
    lm_head.weight[default, layout.text] = 0.1


def clear(model: nn.Module) -> None:
    """Every weight zero, every norm the plain norm."""
    for name, parameter in model.named_parameters():
        is_norm = parameter.ndim == 1 and name.endswith("weight") and "embed" not in name
        parameter.fill_(1.0 if is_norm else 0.0)


def _write_constant(linear: nn.Linear, row: int, value: float, layout: Layout, rms: float) -> None:
    """The same output for every token: through the bias where there is one, else through the two flags."""
    if linear.bias is not None:
        linear.bias[row] = value
    else:
        linear.weight[row, layout.visual] = value / FLAG * rms
        linear.weight[row, layout.text] = value / TEXT_FLAG * rms


def _turn(channels: Tensor) -> Tensor:
    """What must be added to turn every pair of channels by 90 degrees: (d_model, channel)."""
    n = torch.arange(len(channels))
    change = torch.zeros(D_MODEL, len(channels), dtype=torch.float64)
    change[channels, n] = -1.0
    change[channels[n ^ 1], n] = torch.where(n % 2 == 0, 1.0, -1.0).double()
    return change


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=-1, keepdim=True).sqrt()

"""What ``capa-probe run`` prints."""

from __future__ import annotations

from dataclasses import fields
from statistics import median
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from capa_probe.benchmark.one_prompt import OnePrompt, Side, ranges
from capa_probe.measures import resolve_tau
from capa_probe.pruning.base import Pruner
from capa_probe.pruning.ffn import HadamardFFN
from capa_probe.pruning.visual_ffn import VisualFFN


def describe(name: str, pruner: Pruner, why: str, d_model: int, ffn_file: str | None = None) -> str:
    """The pruner in one line: what it keeps and where, and every other setting that is not the default.

    Args:
        name: of the method.
        pruner: the pruner.
        why: where its layers come from.
        d_model: width of the model, which tells what a relative tau is.
        ffn_file: of the factors of its FFN approximation.
    """
    default = {of.name: of.default for of in fields(pruner)}
    chosen = {key: getattr(pruner, key) for key in default if getattr(pruner, key) != default[key]}
    kept = [f"no tokens are dropped ({why})"]
    if pruner.layers:
        keeps = pruner.keep if isinstance(pruner.keep, tuple) else (pruner.keep,)
        layers = f"layer{'s' * (len(pruner.layers) > 1)} {', '.join(map(str, pruner.layers))}"
        kept = [f"keep {' and '.join(map(str, keeps))}", f"before {layers} ({why})", pruner.execution]
    parts = [", ".join(kept)]
    ffn = getattr(pruner, "ffn", None)
    if isinstance(ffn, VisualFFN):
        one, *others = ffn.layers
        how = f"x * alpha of {ffn_file}" if isinstance(ffn, HadamardFFN) else "skipped"
        parts.append(f"FFN of visual tokens {how} in layer{'s' * bool(others)} {_listed([one, *others])}")
    if pruner.layers:
        if pruner.budget == "image":
            parts.append("keep counts each image")
        parts += [f"{key} {chosen[key]}" for key in ("score", "rescore") if key in chosen]
        if chosen.get("score") == "random" or name == "random":
            parts.append(f"seed {getattr(pruner, 'seed', 0)}")
        roles = {"protect_anchors": "Structural Anchors stay", "only_dumps": "only Probability Dumps go"}
        parts += [words for key, words in roles.items() if key in chosen]
        if chosen.keys() & roles.keys():
            tau = getattr(pruner, "tau", "relative")
            parts.append(f"tau {resolve_tau(tau, d_model):g}" + " (relative)" * (tau == "relative"))
    return f"{name}: {'; '.join(parts)}."


def settings_as_json(name: str, pruner: Pruner, ffn_file: str | None = None) -> dict[str, Any]:
    """Every field of a pruner, defaults as well, as JSON values."""
    content: dict[str, Any] = {"method": name}
    for of in fields(pruner):
        value = getattr(pruner, of.name)
        if isinstance(value, VisualFFN):
            content[of.name] = _ffn_as_json(value, ffn_file)
        elif isinstance(value, tuple):
            content[of.name] = list(value)
        else:
            content[of.name] = (
                value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
            )
    return content


def _ffn_as_json(ffn: VisualFFN, file: str | None) -> dict[str, Any]:
    if not isinstance(ffn, HadamardFFN):
        return {"kind": "skip", "layers": list(ffn.layers)}
    fitted = {key: ffn.manifest.get(key) for key in ("model", "weights_hash", "data_fingerprint")}
    counts = {"n_samples": ffn.n_samples, "n_tokens": ffn.n_tokens}
    return {"kind": "hadamard", "layers": list(ffn.layers), "file": file, "x": ffn.x, **counts, **fitted}


def show(found: OnePrompt, header: str, pruner: Pruner, timed: int) -> None:
    """Print both answers and a table of what they took."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{found.n_visual:,} visual and {found.n_text:,} text tokens in the prompt.")
    if found.pruned is None:
        console.print("No image was given, so that there was nothing to prune; the model itself answered.\n")
        console.print(f"answer  {found.vanilla.answer}", markup=False)
        return
    console.print(f"{header}\n", markup=False)
    console.print(f"vanilla  {found.vanilla.answer}", markup=False)
    console.print(f"pruned   {found.pruned.answer}", markup=False)
    same = found.vanilla.answer == found.pruned.answer
    console.print("Both answers are the same.\n" if same else "The answers differ.\n")
    console.print(_table(found, found.pruned))
    for line in _remarks(found, pruner, timed):
        console.print(line, markup=False)


def _table(found: OnePrompt, pruned: Side) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("vanilla", "pruned", "saved"):
        table.add_column(heading, justify="right", no_wrap=True)
    vanilla = found.vanilla
    for layers, count in ranges(pruned.visual_tokens):
        _row(table, f"visual tokens, {_layers(layers)}", found.n_visual, count)
    for layers, count in ranges(found.kept_per_step):
        _row(table, f"  seen by a step, {_layers(layers)}", found.n_visual, count)
    _row(table, "KV cache, entries", sum(vanilla.kv_entries), sum(pruned.kv_entries))
    _row(table, "KV cache, bytes", vanilla.kv_bytes, pruned.kv_bytes, _amount)
    _row(table, "prefill, FLOPs", vanilla.prefill.total, pruned.prefill.total, _amount)
    _row(table, "  visual, as CAPA counts", vanilla.prefill_capa.total, pruned.prefill_capa.total, _amount)
    _row(table, "decode step, FLOPs", vanilla.step.total, pruned.step.total, _amount)
    timed: tuple[tuple[Literal["prefill", "step"], str], ...]
    timed = (("prefill", "prefill, time"), ("step", "per token, time"))
    for what, label in timed:
        ratios = found.speedups(what)
        if ratios:
            before, after = (median(getattr(side, f"{what}_seconds")) * 1e3 for side in (vanilla, pruned))
            spread = f"{median(ratios):.2f} x ({min(ratios):.2f}-{max(ratios):.2f})"
            table.add_row(label, f"{before:,.2f} ms", f"{after:,.2f} ms", spread)
    return table


def _layers(name: str) -> str:
    return f"layers {name}" if "-" in name else f"layer {name}"


def _row(table: Table, label: str, before: int, after: int, shown: Any = "{:,}".format) -> None:
    saved = "" if before == 0 else f"{1 - after / before:.1%}"
    table.add_row(escape(label), shown(before), shown(after), saved)


def _remarks(found: OnePrompt, pruner: Pruner, timed: int) -> list[str]:
    repeats = len(found.vanilla.prefill_seconds)
    lines = []
    if found.kl == found.kl:
        which = "first" if found.compared_token == 1 else "second"
        lines.append(
            f"Distribution of the {which} token: KL {found.kl:.4g} nats, Hellinger distance {found.hellinger:.4g}."
        )
    lines.append(
        "FLOPs: 2 per multiply-accumulate, vision tower to last logits, scoring included (convention forward); "
        "as CAPA counts: multiply-accumulates of visual tokens in the decoder."
    )
    if pruner.scored_by is None:
        lines.append("The FLOPs of this method's own scoring are not counted.")
    if repeats:
        lines.append(
            f"Time: median of {_count(repeats, 'repeat')} of a prefill and {_count(timed - 1, 'decode step')}, both in "
            "turn after one that was not timed; x is the median of their ratios (least to largest)."
        )
    if pruner.every_step:
        lines.append("Ranking at every step drops nothing: it saves no prefill and no memory.")
    elif pruner.execution == "masked":
        lines.append("Masked execution hides tokens and saves nothing.")
    return lines


def _amount(number: int) -> str:
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _listed(layers: list[int]) -> str:
    """``[2, 3, 4, 7]`` as ``2-4, 7``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

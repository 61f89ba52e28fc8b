"""The whole job of ``capa-probe run``: load, choose the pruner, answer with and without it, and show both."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from capa_probe.benchmark.one_prompt import OnePrompt, Side, ranges, run_one_prompt
from capa_probe.benchmark.schedule import is_paper_model, published, stage_layers
from capa_probe.console import quiet_transformers, status
from capa_probe.errors import CapaProbeError
from capa_probe.files import write_json
from capa_probe.jobs import device_map
from capa_probe.lvlm import HookedLVLM
from capa_probe.pruning.base import Pruner
from capa_probe.pruning.ffn import HadamardFFN, SkipFFN
from capa_probe.pruning.methods import build, method
from capa_probe.pruning.visual_ffn import VisualFFN, check_layers
from capa_probe.samples import Sample


@dataclass(frozen=True)
class Wanted:
    """The pruner that was asked for, before the model is known.

    Attributes:
        method: its name.
        settings: fields of its class. Without ``layers``, the method's own are taken, or those of the stage.
        stage: of the published schedule; None for "early" where the method has no layers of its own.
        ffn: file of a calibrated ``HadamardFFN``, "skip", or None.
        ffn_layers: in which layers; None for all of the file's.
    """

    method: str
    settings: Mapping[str, Any]
    stage: str | None = None
    ffn: str | None = None
    ffn_layers: tuple[int, ...] | None = None

    def check(self) -> None:
        """Refuse what is wrong on any model.

        Raises:
            CapaProbeError: it is.
        """
        given = {**self.settings, "ffn": None} if self.ffn is not None else self.settings
        build(self.method, **{"layers": (1,), **given})
        if self.settings.get("layers") == () and self.ffn is None:
            raise CapaProbeError(
                "--layers none was given without --ffn, which leaves nothing to do; give pruning layers, or --ffn."
            )

    def pruner(self, lvlm: HookedLVLM) -> tuple[Pruner, str]:
        """The pruner for a model, and where its layers come from.

        Raises:
            CapaProbeError: layers or factors that do not fit the model.
        """
        settings = dict(self.settings)
        ffn = self._ffn(lvlm)
        if ffn is not None:
            settings["ffn"] = ffn
        if "layers" in settings:
            return build(self.method, **settings), "as given"
        own = method(self.method)(keep=0.25).layers
        if own and self.stage is None:
            return build(self.method, **settings), "the method's own"
        stage, stages = self.stage or "early", stage_layers(lvlm)
        if stage not in stages:
            raise CapaProbeError(
                f"The {stage} stage was asked for, which a model of {lvlm.n_layers} layers does not have; give layers."
            )
        paper = f"{published(lvlm).model}, {stage}"
        why = f"published for {paper}" if is_paper_model(lvlm) else f"that of {paper}, scaled to this depth"
        return build(self.method, **settings, layers=(stages[stage],)), why

    def _ffn(self, lvlm: HookedLVLM) -> VisualFFN | None:
        if self.ffn is None:
            return None
        if self.ffn == "skip":
            return SkipFFN(check_layers(self.ffn_layers or (), lvlm.n_layers))
        fitted = HadamardFFN.load(self.ffn, lvlm)
        return fitted if self.ffn_layers is None else fitted.only(self.ffn_layers)


def answer_and_show(
    model: str,
    prompt: str,
    images: Sequence[Path],
    wanted: Wanted,
    *,
    max_new_tokens: int = 32,
    repeats: int = 5,
    json_file: Path | None = None,
    device: str = "auto",
    load: Mapping[str, Any] | None = None,
) -> None:
    """Answer one prompt with and without a pruner, print what that saves and changes, and write it as JSON.

    Args:
        model: name or folder.
        prompt: the question.
        images: files; with none, nothing can be pruned, which is said.
        wanted: the pruner.
        max_new_tokens: length of an answer, at most.
        repeats: how often both are timed.
        json_file: where all numbers go as well; None writes nothing.
        device: "auto", "cpu" or "cuda".
        load: options of ``HookedLVLM.from_pretrained``.

    Raises:
        CapaProbeError: anything given cannot be used.
        OSError: the file cannot be written.
    """
    wanted.check()  # loading a model takes longer
    if json_file is not None and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise CapaProbeError(
            f"--json {json_file} was given, which is no file in a folder that exists; give another."
        )
    opened = Sample("prompt", [*images], prompt).open_images()
    with status(f"loading {model}"), quiet_transformers():
        lvlm = HookedLVLM.from_pretrained(model, device_map=device_map(device), **load or {})
    pruner, why = wanted.pruner(lvlm)
    with status("running"), quiet_transformers(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        inputs = lvlm.prepare(opened, prompt)
        found = run_one_prompt(lvlm, inputs, pruner, max_new_tokens=max_new_tokens, repeats=repeats)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    for message in dict.fromkeys(said):
        Console(stderr=True, soft_wrap=True).print(f"warning: {message}", markup=False)
    show(found, wanted.method, pruner, why, timed=max_new_tokens)
    if json_file is not None:
        content = {"model": model, "prompt": prompt, "images": [str(file) for file in images]}
        write_json(json_file, {**content, "pruner": _described(pruner, wanted), **found.as_json()})


def show(found: OnePrompt, name: str, pruner: Pruner, why: str, timed: int) -> None:
    """Print both answers and a table of what they took."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{found.n_visual:,} visual and {found.n_text:,} text tokens in the prompt.")
    if found.pruned is None:
        console.print("No image was given, so that there was nothing to prune; the model itself answered.\n")
        console.print(f"answer  {found.vanilla.answer}", markup=False)
        return
    layers = ", ".join(map(str, pruner.layers)) or "none"
    console.print(f"{name}: keep {pruner.keep}, before layer {layers} ({why}), {pruner.execution}.\n")
    console.print(f"vanilla  {found.vanilla.answer}", markup=False)
    console.print(f"pruned   {found.pruned.answer}\n", markup=False)
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
            f"Time: median of {repeats} repeats of a prefill and {timed - 1} decode steps, both in turn after one "
            "that was not timed; x is the median of their ratios (least to largest)."
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


def _described(pruner: Pruner, wanted: Wanted) -> dict[str, Any]:
    keep = list(pruner.keep) if isinstance(pruner.keep, tuple) else pruner.keep
    settings = {**wanted.settings, "layers": list(pruner.layers), "keep": keep}
    layers = None if wanted.ffn_layers is None else list(wanted.ffn_layers)
    return {"method": wanted.method, **settings, "ffn": wanted.ffn, "ffn_layers": layers}

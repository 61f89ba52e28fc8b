"""The whole job of ``capa-probe run``: load, choose the pruner, answer with and without it, and show both."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from capa_probe.benchmark.one_prompt import run_one_prompt
from capa_probe.benchmark.schedule import is_paper_model, published, stage_layers
from capa_probe.console import quiet_transformers, status
from capa_probe.describing import weights_hash
from capa_probe.errors import BadImageError, CapaProbeError
from capa_probe.files import write_json
from capa_probe.jobs import device_map
from capa_probe.lvlm import HookedLVLM
from capa_probe.measures import choose_tau
from capa_probe.pruning.base import Pruner
from capa_probe.pruning.ffn import HadamardFFN, SkipFFN
from capa_probe.pruning.methods import build, method
from capa_probe.pruning.visual_ffn import VisualFFN, check_layers
from capa_probe.run_output import describe, settings_as_json, show
from capa_probe.samples import Fingerprint, Sample


@dataclass(frozen=True)
class Wanted:
    """The pruner that was asked for, before the model is known.

    Attributes:
        method: its name.
        settings: fields of its class. Without ``layers``, the method's own are taken, or those of the stage.
            A ``tau`` of "auto" is 20 where the width leaves room for it, and "relative" where not.
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
        try:
            build(self.method, **{"layers": (1,), **given})
        except CapaProbeError as error:
            raise CapaProbeError(
                re.sub(r"^\w+(?= was given, which the method)", _option, str(error))
            ) from None
        if self.ffn == "skip" and self.ffn_layers is None:
            raise CapaProbeError(
                "--ffn skip was given without --ffn-layers; say in which layers, such as 2-5."
            )
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
        if "tau" in settings:
            settings["tau"] = _tau(settings["tau"], lvlm.d_model)
        if "layers" in settings:
            return self._fitting(build(self.method, **settings), lvlm), "as given"
        own = method(self.method)(keep=0.25).layers
        if own and self.stage is None:
            return self._fitting(build(self.method, **settings), lvlm), "the method's own"
        stage, stages = self.stage or "early", stage_layers(lvlm)
        if stage not in stages:
            raise CapaProbeError(
                f"The {stage} stage was asked for, which a model of {lvlm.n_layers} layers does not have; give layers."
            )
        paper = f"{published(lvlm).model}, {stage}"
        why = f"published for {paper}" if is_paper_model(lvlm) else f"that of {paper}, scaled to this depth"
        return build(self.method, **settings, layers=(stages[stage],)), why

    def _fitting(self, pruner: Pruner, lvlm: HookedLVLM) -> Pruner:
        first, last = int(pruner.uses_attention), lvlm.n_layers - 1
        wrong = [layer for layer in pruner.layers if not first <= layer <= last]
        if wrong and pruner.score_at == "previous":
            given = f"--layers {','.join(map(str, pruner.layers))} was given for"
            if "layers" not in self.settings:
                given = f"The method {self.method} drops tokens before layer {wrong[0]}, which does not fit"
            takes = f"takes --layers from {first} to {last}" if first < last else f"takes --layers {first}"
            if first > last:
                takes = "needs a layer before the one that it prunes, so give a deeper model"
            depth = "1 layer" if lvlm.n_layers == 1 else f"{lvlm.n_layers} layers"
            raise CapaProbeError(f"{given} a model of {depth}; {self.method} {takes}.")
        return pruner

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
    if not prompt.strip():
        raise CapaProbeError(f"--prompt {prompt!r} was given; give a question that is not empty.")
    try:
        sample = Sample("prompt", [*images], prompt)
        opened = sample.open_images()
    except BadImageError as error:
        raise CapaProbeError(f"--image {error.image} {error.reason}.") from error
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
    file = None if wanted.ffn == "skip" else wanted.ffn
    show(found, describe(wanted.method, pruner, why, lvlm.d_model, file), pruner, timed=max_new_tokens)
    if json_file is not None:
        # What a report finds the same prompt of a profile by.
        same = {"weights_hash": weights_hash(lvlm.model), "images_key": Fingerprint().add(sample)}
        content = {"model": model, "prompt": prompt, "images": [str(image) for image in images], **same}
        settings = settings_as_json(wanted.method, pruner, file)
        write_json(json_file, {**content, "pruner": {**settings, "layers_from": why}, **found.as_json()})


def _tau(asked: float | str, d_model: int) -> float | str:
    try:
        return choose_tau(asked, d_model)
    except CapaProbeError as error:
        words = re.sub(r'\btau="?([\w.]+)"?', r"--tau \1", str(error))
        if asked == "auto":
            words = words.replace("--tau relative was given", "--tau auto is relative")
        raise CapaProbeError(words.replace("an absolute tau", "--tau NUMBER")) from None


def _option(name: re.Match[str]) -> str:
    return f"--{name[0].replace('_', '-')}"

"""The whole job of a command: load, profile, analyse, write, draw, and say what came out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from capa_probe.console import quiet_transformers, show, status
from capa_probe.errors import CapaProbeError, LeftOutWarning, OtherRunError
from capa_probe.examples import EXAMPLES, remove_examples, write_examples
from capa_probe.findings import FIGURES, FILES, Findings, can_analyse, find, remove, write
from capa_probe.lvlm import HookedLVLM
from capa_probe.measures import choose_tau
from capa_probe.probes import choose_probes
from capa_probe.profiling import profile
from capa_probe.report import REPORT_FILE, write_report
from capa_probe.run_folder import locked, made_with, remove_profile
from capa_probe.samples import Sample
from capa_probe.tables import LayerProfile, is_finished, is_unfinished
from capa_probe.writing import kept_samples

#: What :func:`capa_probe.profile` writes at the top of its folder.
_PROFILE = (
    "tokens",
    "layers",
    "layers.parquet",
    "samples.parquet",
    "manifest.json",
    "unfinished.json",
    ".lock",
)


def run(
    model: str,
    samples: Sequence[Sample],
    out: Path,
    tau: float | str = "auto",
    eta: float = 0.96,
    device: str = "auto",
    load: dict[str, Any] | None = None,
    overwrite: bool = False,
    own_model: Path | None = None,
    **settings: Any,
) -> None:
    """Profile, keep examples, analyse, write, draw, and print the summary; what both commands do.

    Args:
        model: name or folder.
        samples: what to profile it on.
        out: folder to write to.
        tau: threshold on sink strength.
        eta: threshold on the FFN cosine.
        device: "auto", "cpu" or "cuda".
        load: options of ``HookedLVLM.from_pretrained``.
        overwrite: start anew, whatever run lies in ``out``.
        own_model: a run of this model with other settings is replaced without being asked (the demo).
        **settings: options of ``profile``.

    Raises:
        CapaProbeError: anything given cannot be used. What was finished stays in any case.
        KeyboardInterrupt: with what became of the profile as its text.
    """
    analysable = can_analyse(probe.name for probe in choose_probes(settings.get("probes", "default")))
    with status(f"loading {model}"), quiet_transformers():
        lvlm = HookedLVLM.from_pretrained(model, device_map=device_map(device), **load or {})
    choose_tau(tau, lvlm.d_model)  # now, not after the long part
    if settings.get("sink_dims") == "published":
        settings["sink_dims"] = lvlm.family.sink_dims(lvlm.model)
        if settings["sink_dims"] is None:
            raise CapaProbeError(
                f"No sink dimensions are published for {model}; leave --sink-dims out to measure them."
            )
    prof, reused = None, is_finished(out) and not overwrite
    try:
        with locked(out), quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore", LeftOutWarning)  # the findings say it
            try:
                prof = profile(lvlm, samples, out=out, overwrite=overwrite, **settings)
            except OtherRunError:
                if own_model is None:
                    raise
                clear(out, own_model)
                reused = False
                prof = profile(lvlm, samples, out=out, **settings)
            with status("keeping examples"):
                write_examples(lvlm, samples, out, manifest=prof.manifest)
            findings, files = _analyse(prof, tau, eta, out) if analysable else (None, [])
    except KeyboardInterrupt:
        state = f"is not finished; {_goes_on(out, overwrite)}" if prof is None else "is finished"
        raise KeyboardInterrupt(f"the profile in {out} {state}") from None
    except (CapaProbeError, OSError) as error:
        if prof is None and isinstance(error, OSError):  # a full disk, say
            if not is_unfinished(out):
                raise
            reason = error.strerror or error
            raise CapaProbeError(
                f"The profile in {out} was stopped ({reason}); {_goes_on(out, overwrite)}."
            ) from error
        if prof is None:
            raise
        raise CapaProbeError(
            f"The profile is finished and lies in {out}, but what follows failed: {error}"
        ) from error
    show(prof, findings, files, out, reused)


def _analyse(prof: LayerProfile, tau: float | str, eta: float, out: Path) -> tuple[Findings, list[Path]]:
    with status("analysing"):
        findings = find(prof, tau=tau, eta=eta)
        remove(out)  # an earlier analysis may have written more
        files = write(prof, findings, out)
    with status("writing the report"):
        files.append(write_report(out, findings=findings))
    return findings, files


def _goes_on(out: Path, overwrite: bool) -> str:
    again = "the same command without --overwrite" if overwrite else "the same command"
    return f"{kept_samples(out):,} samples are kept, and {again} goes on from there"


def clear(out: Path, model: Path) -> None:
    """Remove an earlier run of a model from its folder: our own files, by their names.

    Raises:
        CapaProbeError: the folder holds a run of another model, or files that are not ours.
    """
    found = made_with(out).get("model")
    if found is not None and Path(str(found)).name != model.name:
        raise CapaProbeError(f"{out} holds a profile of {found}, not of {model.name}; give another --out.")
    names = {*_PROFILE, EXAMPLES, REPORT_FILE, *(Path(name).parts[0] for name in FILES)}
    others = [str(path.relative_to(out)) for path in out.iterdir() if path.name not in names]
    others += [
        str(path.relative_to(out))
        for path in (out / FIGURES).glob("*")
        if path.relative_to(out).as_posix() not in FILES
    ]
    if others:
        raise CapaProbeError(
            f"{out} holds {', '.join(sorted(others))} beside an earlier run, and that is not capa_probe's to remove; "
            "move it away or give another --out."
        )
    remove(out)
    remove_examples(out)
    (out / REPORT_FILE).unlink(missing_ok=True)
    remove_profile(out)


def device_map(device: str) -> str | None:
    """``--device`` in the words of transformers.

    Raises:
        CapaProbeError: "cuda" was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise CapaProbeError("--device cuda was given, but PyTorch sees no GPU; use --device cpu or auto.")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else None

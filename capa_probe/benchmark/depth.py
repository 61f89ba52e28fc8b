"""Depth: up to which layer does a model look at the image, and how many of its tokens can it spare?

A model may answer well and be hollow: where the first layer copies what matters into the text tokens, every way of
pruning looks perfect, and a comparison says nothing. So, before any comparison:

- all visual tokens vanish before layer l, for every l: when does the model stop looking?
- a random 50, 25, 10 or 5 % stays from layers 2, L/4 and L/2 on;
- the tokens of the regions that a question is about are removed, or they alone are kept, where the data say which they
  are (``regions``); beside each, as many others.

Tables, each with ``_tests`` (paired against the model itself) and ``_rows`` (per sample): ``depth_gone``,
``depth_kept``, ``depth_regions``; and ``depth``, the verdict per task (:mod:`capa_probe.benchmark.depth_verdict`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import pandas as pd

from capa_probe.benchmark import depth_cells as cells
from capa_probe.benchmark.cells import MEASURES, vanilla_rows
from capa_probe.benchmark.depth_verdict import verdict
from capa_probe.benchmark.sampling import drawn, stratified, usable
from capa_probe.benchmark.setup import Settings, Setup
from capa_probe.benchmark.store import Store
from capa_probe.benchmark.summary import compare, notes, over_draws, summarise
from capa_probe.describing import describe
from capa_probe.errors import CapaProbeError, LeftOutWarning
from capa_probe.lvlm import HookedLVLM
from capa_probe.pruning.capa import SCORES
from capa_probe.samples import Sample, data_fingerprint
from capa_probe.tables import describe_skipped

NAME = "depth"
KEEPS = (0.5, 0.25, 0.1, 0.05)
#: Of a data set larger than so many times the limit, so many samples are looked at.
POOL = 8
_GONE, _KEPT, _REGIONS = ("layer",), ("layer", "keep", "score"), ("layer", "tokens")
_PAIRS = (
    *((cells.WHOLE, tokens) for tokens in cells.TOKENS),
    ("others_removed", "region_removed"),
    ("region_kept", "others_kept"),
)


def measure_depth(
    lvlm: HookedLVLM,
    samples: Sequence[Sample],
    out: str | os.PathLike[str] | None = None,
    *,
    keeps: Sequence[float] = KEEPS,
    layers: Sequence[int] | None = None,
    scores: Sequence[str] = (),
    draws: int = 3,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    strict: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """Measure up to which layer a model looks at the image; see the module's docstring.

    Args:
        lvlm: the model, with its processor.
        samples: questions about images.
        out: folder for the tables, a manifest and finished parts; the same call goes on where it was stopped. None
            keeps everything in memory.
        keeps: shares of the visual tokens that are kept.
        layers: from which on; None for 2, L/4 and L/2, rounded up. Regions are looked at before layer 0 too.
        scores: what else chooses the tokens that are kept, beside chance: of "contribution", "attention",
            "value_norm" and "removal_effect".
        draws: how often a random choice is repeated.
        seed: of the draws.
        limit: only so many samples, drawn so that each task has as many; None takes all.
        batch_size: samples per forward.
        max_new_tokens: at which an answer is cut off.
        strict: raise at an image that cannot be used, rather than leave its sample out.
        overwrite: start anew, whatever run lies in ``out``.
        progress: show progress bars.

    Returns:
        The tables, by name.

    Raises:
        OtherRunError: ``out`` holds a run of another model, on other data, or with other settings.
        CapaProbeError: an argument cannot be used, or no sample can.
    """
    settings = Settings(batch_size, max_new_tokens, seed, draws, keeps=tuple(keeps))
    at = _check(lvlm, samples, settings, layers, scores, limit)
    pool = drawn(samples, None if limit is None else POOL * limit, seed)
    chosen, skipped = usable(stratified(pool, limit, seed), strict)
    if not chosen:
        raise CapaProbeError(
            f"None of the {len(skipped)} samples could be used; the first: {skipped[0]['reason']}"
        )
    if skipped:
        n = len(chosen) + len(skipped)
        warnings.warn(describe_skipped(skipped, n), LeftOutWarning, stacklevel=2)
    facts = {
        **describe(lvlm),
        "experiment": NAME,
        # Keeps, layers, scores and draws make parts of their own, which a later run may add.
        "settings": {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed},
        "n_samples": len(chosen),
        "data_fingerprint": data_fingerprint(chosen),
    }
    with Store.open(out, facts, overwrite) as store:
        setup = Setup(lvlm, chosen, store=store, settings=settings, progress=progress)
        tables = run(setup, at, scores)
        for name, table in tables.items():
            store.write(name, table)
        asked = {"keeps": list(keeps), "layers": list(at), "scores": list(scores), "draws": draws}
        store.finish(asked=asked, skipped=skipped)
    return tables


def run(setup: Setup, layers: Sequence[int], scores: Sequence[str] = ()) -> dict[str, pd.DataFrame]:
    """The experiment itself.

    Args:
        setup: of the run.
        layers: from which on some tokens stay.
        scores: beside chance.
    """
    seed, n_layers = setup.settings.seed, setup.lvlm.n_layers
    gone, remarks = cells.gone(setup), []
    own = vanilla_rows(setup)
    measure = "correct" if own["correct"].notna().any() else "agrees"
    if measure == "agrees":
        remarks.append("The data hold no answers, so that agreement with the model's own is measured.")
    together = pd.concat(
        [cells.whole(setup, gone, _GONE).assign(tokens=cells.WHOLE), gone], ignore_index=True
    )
    # Gone after the last layer is the model itself.
    curve = pd.concat([gone, own.assign(layer=n_layers)], ignore_index=True)
    tables = {
        cells.GONE: summarise(curve, _GONE, seed),
        f"{cells.GONE}_tests": compare(
            together, _GONE, "tokens", [(cells.WHOLE, cells.NONE)], MEASURES, seed
        ),
        f"{cells.GONE}_rows": gone.drop(columns="tokens"),
    }
    tables |= _kept(setup, layers, scores)
    found = cells.regions(setup, (0, *layers))
    if found.empty:
        remarks.append("The data do not say which regions the questions are about (regions).")
    else:
        tables |= _regions(setup, found)
    tables = {NAME: verdict(tables, n_layers, measure), **tables}
    return {**tables, f"{NAME}_notes": notes(*remarks)}


def _kept(setup: Setup, layers: Sequence[int], scores: Sequence[str]) -> dict[str, pd.DataFrame]:
    kept, seed = cells.kept(setup, layers, scores), setup.settings.seed
    mean = over_draws(kept, _KEPT)
    together = pd.concat(
        [cells.whole(setup, mean, _KEPT[:2]).assign(score=cells.WHOLE), mean], ignore_index=True
    )
    pairs = [(cells.WHOLE, score) for score in (cells.RANDOM, *scores)]
    pairs += [(score, cells.RANDOM) for score in scores]
    return {
        cells.KEPT: summarise(mean, _KEPT, seed),
        f"{cells.KEPT}_tests": compare(together, _KEPT[:2], "score", pairs, MEASURES, seed),
        f"{cells.KEPT}_rows": kept,
    }


def _regions(setup: Setup, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    seed, mean = setup.settings.seed, over_draws(rows, _REGIONS)
    own = cells.whole(setup, mean, _REGIONS[:1]).assign(tokens=cells.WHOLE)
    together = pd.concat([own, mean], ignore_index=True)
    return {
        cells.REGIONS: summarise(together, _REGIONS, seed),
        f"{cells.REGIONS}_tests": compare(together, _REGIONS[:1], "tokens", _PAIRS, MEASURES, seed),
        f"{cells.REGIONS}_rows": rows,
    }


def _check(
    lvlm: HookedLVLM,
    samples: Sequence[Sample],
    settings: Settings,
    layers: Sequence[int] | None,
    scores: Sequence[str],
    limit: int | None,
) -> tuple[int, ...]:
    """The layers from which on some tokens stay, if everything that was given can be used."""
    if lvlm.processor is None:
        raise CapaProbeError(
            "A HookedLVLM without a processor was given, which reads no questions; give HookedLVLM(model, processor)."
        )
    if not len(samples):
        raise CapaProbeError("No sample was given; give at least one.")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise CapaProbeError(f"limit={limit!r} was given; give a whole number of at least 1, or None.")
    if not settings.keeps or 1 in settings.keeps:
        raise CapaProbeError(f"keeps={settings.keeps} was given; give at least one share, all below 1.")
    known = tuple(score for score in SCORES if score != cells.RANDOM)
    for score in scores:
        if score not in known:
            raise CapaProbeError(f"score={score!r} was given; give some of {', '.join(known)}.")
    if layers is None:
        layers = cells.reading_layers(lvlm.n_layers)
    wrong = [layer for layer in layers if not 1 <= layer < lvlm.n_layers]
    if wrong or not layers:
        raise CapaProbeError(
            f"layers={tuple(layers)} was given for a model of {lvlm.n_layers} layers; give some from 1 to "
            f"{lvlm.n_layers - 1}."
        )
    return tuple(sorted(set(layers)))

"""Transition layers: where the distribution of contribution over the visual tokens changes most."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capa_probe.analysis.images import check_groups
from capa_probe.analysis.reading import fact, refuse_nan
from capa_probe.analysis.redundancy import check_seed
from capa_probe.errors import CapaProbeError
from capa_probe.tables import LayerProfile

#: Resamples of the interval and of the null.
N_RESAMPLES = 2000
#: Resampled counts held at once (8 bytes each).
_AT_ONCE = 2**22
#: Distances are of float32 values: a standard error below this is none.
_NO_SPREAD = 1e-7


def transition_layers(
    prof: LayerProfile,
    groups: Mapping[str, Hashable] | None = None,
    alpha: float = 0.05,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How much the distribution of contribution over a sample's visual tokens changes from each layer to the next.

    In each sample and layer, the contributions C of the visual tokens at prefill are divided by their sum. The change
    at layer l is the Hellinger distance ``|sqrt(p) - sqrt(q)| / sqrt(2)`` between that distribution at layers l - 1
    and l: 0 where the same tokens contribute in the same proportions, 1 where no token contributes in both. It is
    taken within samples, so that images of different size need no common grid, and then averaged over samples.

    The null is that all changes are as large as their mean over layers, and that a layer stands out by which samples
    were drawn. Images are drawn with replacement, and how far the largest of the resampled changes lies above the
    mean change, beyond what the sample itself has there, in standard errors, is what chance gives (a studentised
    max-T bootstrap; Romano and Wolf, *Stepwise multiple testing as formalized data snooping*, 2005, single step). So
    ``p`` holds for all layers at once. A **transition layer** is one that is above the null and that has no neighbour
    with a larger change; the many layers of a slow slope are no transitions. With many images the null narrows to the
    mean change, so that every peak above it is a transition: how large it is, ``distance`` says. With fewer than four
    images nothing reaches p = 0.05.

    The paper names one transition layer for each model, without saying how it was found (CAPA, arXiv 2602.00247);
    this definition is ours.

    Args:
        prof: a profile with its visual tokens and the probe "contribution".
        groups: sample id to a key of its images: samples that show the same ones are drawn together. By default as
            the profile's samples table has it.
        alpha: of the null, between 0 and 1.
        confidence: of the intervals, between 0 and 1.
        seed: of the resampling.

    Returns:
        One row per layer from 1 on, for the change from the layer before: ``layer``; ``distance`` (mean over
        samples) with its percentile interval ``low`` and ``high``; ``p``, the probability of such a change, or a
        larger one, at any layer under the null; ``null_high``, the distance above which it is significant at
        ``alpha``; ``share_largest``, in which share of the resamples the change is the largest of all;
        ``transition``; ``n_samples`` and ``n_images``. A sample with fewer than two visual tokens, or with a layer in
        which none contributes, has no such distances and does not count. With fewer than two images the interval, the
        null and ``share_largest`` are NaN and there is no transition layer; the same holds of null and p where there
        is only one change, which nothing can be compared with. No row for a model of one layer.

    Raises:
        CapaProbeError: an argument out of range; no visual token rows, no contribution, or none that can be compared.
    """
    _check(alpha, confidence, seed)
    distances = contribution_changes(prof)
    keys = _images(prof) if groups is None else check_groups(groups)
    image = pd.Series([(sample in keys, keys.get(sample, sample)) for sample in distances.index])
    number = pd.factorize(image)[0]
    values = distances.to_numpy(np.float64)
    result = pd.DataFrame(
        {"layer": distances.columns.to_numpy(np.int32), "distance": values.mean(axis=0)},
    )
    n_images = int(number.max()) + 1
    for name, column in _resampled(values, number, alpha, confidence, seed).items():
        result[name] = column
    significant = (result["p"] <= alpha).to_numpy(bool)
    result["transition"] = significant & _peaks(result["distance"].to_numpy(np.float64))
    return result.assign(n_samples=len(distances), n_images=n_images)


def contribution_changes(prof: LayerProfile) -> pd.DataFrame:
    """Hellinger distance of each sample's visual contribution distribution from one layer to the next.

    Args:
        prof: as for :func:`transition_layers`.

    Returns:
        Samples x layers from 1 on (no columns for a model of one layer); samples that cannot be compared are left
        out.

    Raises:
        CapaProbeError: as :func:`transition_layers`.
    """
    if prof.rows == "none":
        raise CapaProbeError(
            'This profile holds no token rows (it was made with rows="none"), and transitions are looked for in how '
            'single tokens contribute; profile again with rows="visual" or rows="all".'
        )
    n_layers = fact(prof, "n_layers")
    found: dict[str, NDArray[np.float64]] = {}
    n_visual = 0
    where = [("step", "==", 0), ("kind", "==", "visual")]
    for part in prof.read(["sample", "layer", "position", "contribution"], where):
        if part.empty:
            continue
        n_visual += len(part)
        refuse_nan(part, "contribution")
        for sample, layer, mass in _by_sample(part):
            changes = _changes(sample, layer, mass, n_layers)
            if changes is not None:
                found[sample] = changes
    if not found:
        why = (
            "no sample in which two visual tokens or more contribute at every layer"
            if n_visual
            else "no visual token"
        )
        raise CapaProbeError(
            f"transition_layers was given a profile with {why}; profile samples that have an image."
        )
    return pd.DataFrame.from_dict(found, orient="index", columns=list(range(1, n_layers)))


def _by_sample(part: pd.DataFrame) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.float64]]]:
    """Sample, layer (token,) and contribution (token,), by layer and position; samples are whole inside a part."""
    number, names = pd.factorize(part["sample"])
    layer = part["layer"].to_numpy(np.int64)
    order = np.lexsort((part["position"].to_numpy(), layer, number))
    layer, mass = layer[order], part["contribution"].to_numpy(np.float64)[order]
    ends = np.cumsum(np.bincount(number, minlength=len(names)))
    for name, begin, end in zip(names, [0, *ends[:-1]], ends, strict=True):
        yield str(name), layer[begin:end], mass[begin:end]


def _changes(
    sample: str, layer: NDArray[np.int64], mass: NDArray[np.float64], n_layers: int
) -> NDArray[np.float64] | None:
    """(layer - 1,) distances of one sample; None where it has no distribution at some layer."""
    n_tokens = len(layer) // n_layers
    if len(layer) % n_layers or (layer != np.repeat(np.arange(n_layers), n_tokens)).any():
        raise CapaProbeError(
            f"sample {sample!r} does not have as many visual tokens at each of the {n_layers} layers; profile again."
        )
    mass = mass.reshape(n_layers, n_tokens)
    total = mass.sum(axis=1, keepdims=True)
    if n_tokens < 2 or not (total > 0).all():
        return None
    root = np.sqrt(mass / total)
    # 1 - sum(sqrt(p q)) would lose half of the digits of a small distance.
    return np.minimum(np.linalg.norm(np.diff(root, axis=0), axis=1) / np.sqrt(2), 1.0)


def _resampled(
    distances: NDArray[np.float64], image: NDArray[np.intp], alpha: float, confidence: float, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Interval, null and p-value, and how often each change is the largest: (layer - 1,) each."""
    n_changes = distances.shape[1]
    unknown = np.full(n_changes, np.nan)
    found = dict.fromkeys(("low", "high", "p", "null_high", "share_largest"), unknown)
    n_images = int(image.max()) + 1
    if n_images < 2 or not n_changes:
        return found
    size = np.bincount(image).astype(np.float64)
    sums = np.stack([np.bincount(image, column) for column in distances.T], axis=1)  # (image, change)
    excess = sums - sums.mean(axis=1, keepdims=True)
    above, error = _ratio(np.ones((1, n_images)), excess, size)
    rng = np.random.default_rng(seed)
    means, largest = [], []
    at_once = max(1, _AT_ONCE // n_images)
    for begin in range(0, N_RESAMPLES, at_once):
        n = min(at_once, N_RESAMPLES - begin)
        counts = rng.multinomial(n_images, np.full(n_images, 1 / n_images), size=n).astype(np.float64)
        means.append(counts @ sums / (counts @ size)[:, None])
        here, spread = _ratio(counts, excess, size)
        # A resample without spread, such as of one image only, is as far out as can be: the null stays safe.
        far = np.divide(here - above, spread, out=np.full(here.shape, np.inf), where=spread > _NO_SPREAD)
        largest.append(far.max(axis=1))
    drawn, null = np.concatenate(means), np.concatenate(largest)
    tail = (1 - confidence) / 2
    found["low"], found["high"] = np.quantile(drawn, [tail, 1 - tail], axis=0)
    is_largest = drawn == drawn.max(axis=1, keepdims=True)
    found["share_largest"] = (is_largest / is_largest.sum(axis=1, keepdims=True)).mean(axis=0)
    if n_changes > 1:
        sure = error[0] > _NO_SPREAD
        observed = np.divide(above[0], error[0], out=np.where(above[0] > _NO_SPREAD, np.inf, 0.0), where=sure)
        reached = (null[:, None] >= observed).sum(axis=0)
        found["p"] = (1 + reached) / (1 + N_RESAMPLES)
        # The smallest value of the null with (1 + number at or above it) / (1 + resamples) at or below alpha.
        rank = int(np.floor(alpha * (1 + N_RESAMPLES))) - 1
        needed = np.sort(null)[::-1][rank] if rank >= 0 else np.inf
        middle = distances.mean()
        found["null_high"] = middle + needed * error[0]
    return found


def _ratio(
    counts: NDArray[np.float64], sums: NDArray[np.float64], size: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over samples and its standard error over images, for each row of how often an image was drawn.

    Args:
        counts: (resample, image).
        sums: (image, change), over the samples of an image.
        size: (image,) samples of an image.

    Returns:
        (resample, change) each.
    """
    total = (counts @ size)[:, None]
    mean = counts @ sums / total
    square = (
        counts @ sums**2
        - 2 * mean * (counts @ (sums * size[:, None]))
        + mean**2 * (counts @ size**2)[:, None]
    )
    return mean, np.sqrt(np.maximum(square, 0.0)) / total


def _peaks(distance: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether no neighbour is larger; neighbours that are exactly alike count as one."""
    if not len(distance):
        return np.zeros(0, dtype=np.bool_)
    run = np.concatenate([[0], np.cumsum(np.diff(distance) != 0)])
    height = np.concatenate([[-np.inf], distance[np.unique(run, return_index=True)[1]], [-np.inf]])
    return np.asarray(((height[1:-1] > height[:-2]) & (height[1:-1] > height[2:]))[run])


def _images(prof: LayerProfile) -> Mapping[str, Hashable]:
    table = prof.samples
    return {str(sample): key for sample, key in table[["sample", "images"]].to_numpy() if key}


def _check(alpha: object, confidence: object, seed: object) -> None:
    for name, value in (("alpha", alpha), ("confidence", confidence)):
        number = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
        if not (number and 0 < float(value) < 1):  # type: ignore[arg-type]
            raise CapaProbeError(f"{name}={value!r} was given; give a number between 0 and 1.")
    check_seed(seed)

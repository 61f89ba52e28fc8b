"""What every experiment is given: a model, samples, a place for results, and settings."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from tqdm.auto import tqdm

from capa_probe.benchmark.schedule import stage_layers
from capa_probe.benchmark.store import Store
from capa_probe.errors import CapaProbeError
from capa_probe.lvlm import HookedLVLM
from capa_probe.samples import Fingerprint, Sample

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """Of all experiments; what a table depends on is here, and goes into the manifest.

    Attributes:
        batch_size: samples per forward.
        max_new_tokens: at which an answer is cut off.
        seed: of whatever is drawn; the n-th of several draws takes ``seed + n``.
        draws: how often a random choice of tokens is repeated.
        keeps: shares of the visual tokens that stay, for accuracy against budget; 1.0 is the model itself.
        layers: pruning layers, for accuracy against budget and all together; None for the model's three stages
            (:func:`capa_probe.benchmark.schedule.stage_layers`).
        capa_keep: share that stays when all comes together, and over generation steps.
        tau: threshold on sink strength; "auto" is 20 where the width leaves room for it, and "relative" where not.
        eta: threshold on the FFN cosine.
        knockout_samples: samples whose visual tokens are knocked out one by one.
        knockout_layers: at which layers; None for the stages.
        step_samples: samples that are followed over generation steps.
        steps: generation steps that are followed.
    """

    batch_size: int = 16
    max_new_tokens: int = 16
    seed: int = 0
    draws: int = 3
    keeps: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05)
    layers: tuple[int, ...] | None = None
    capa_keep: float = 0.25
    tau: float | str = "auto"
    eta: float = 0.96
    knockout_samples: int = 32
    knockout_layers: tuple[int, ...] | None = None
    step_samples: int = 64
    steps: int = 16

    def __post_init__(self) -> None:
        whole = ("batch_size", "max_new_tokens", "draws", "knockout_samples", "step_samples", "steps")
        for name in whole:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CapaProbeError(f"{name}={value!r} was given; give a whole number of at least 1.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise CapaProbeError(f"seed={self.seed!r} was given; give a whole number of at least 0.")
        for name in ("keeps", "layers", "knockout_layers"):
            if getattr(self, name) == ():
                raise CapaProbeError(f"{name}=() was given; give at least one, or leave the default.")
        for keep in (*self.keeps, self.capa_keep):
            if not 0 < keep <= 1:
                raise CapaProbeError(f"keep={keep!r} was given; give shares of the visual tokens in (0, 1].")
        if not -1 < self.eta < 1:
            raise CapaProbeError(f"eta={self.eta!r} was given; give a cosine between -1 and 1, such as 0.96.")

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of the settings."""
        return tuple(of.name for of in fields(cls))


@dataclass(frozen=True)
class Setup:
    """What an experiment is given.

    Attributes:
        lvlm: the model.
        samples: to test on; their images open, and each has at least one.
        calibration: other samples, to measure and to fit on: none of their images is among those of ``samples``. May
            be empty, and then experiments that need it say so.
        store: keeps finished parts and takes tables.
        settings: of all experiments.
        progress: show progress bars.
    """

    lvlm: HookedLVLM
    samples: tuple[Sample, ...]
    calibration: tuple[Sample, ...] = ()
    store: Store = field(default_factory=lambda: Store(None, {}))
    settings: Settings = field(default_factory=Settings)
    progress: bool = False

    def stages(self) -> dict[str, int]:
        """Pruning layer of each stage, as set or by the model; layers that were set are named by their number."""
        if self.settings.layers is None:
            return stage_layers(self.lvlm)
        return {f"layer {layer}": layer for layer in self.settings.layers}

    def bar(self, items: Collection[T], what: str) -> Iterator[T]:
        """The items one by one, under a progress bar."""
        yield from tqdm(items, desc=what, disable=not self.progress)


def images_keys(samples: Sequence[Sample]) -> dict[str, str]:
    """Sample id to a key that samples with the same images share: what statistics take as a cluster."""
    fingerprint = Fingerprint()
    return {sample.id: fingerprint.add(sample) for sample in samples}


def chunks(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    """The samples in order, in batches."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def key_of(condition: Mapping[str, Any]) -> str:
    """A condition as the key of a part: ``score=attention,layer=3,keep=0.25``."""
    text = ",".join(f"{name}={value}" for name, value in condition.items())
    return text.replace(" ", "_") or "all"

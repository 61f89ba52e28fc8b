"""How far a calibration has come, in memory and on disk."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from capa_probe.errors import CapaProbeError
from capa_probe.pruning.ffn import HadamardFFN
from capa_probe.pruning.tensor_file import read_tensors, write_tensors
from capa_probe.run_folder import refuse_other

#: A run that is killed loses at most about this much work.
SECONDS_BETWEEN_STATES = 20.0
_HEADER = "capa_probe.calibration"


def check_output(file: Path) -> None:
    """Refuse a file that holds something else, whether or not it would be overwritten.

    Raises:
        CapaProbeError: it is a folder, or no calibration of capa_probe's.
    """
    if file.is_dir():
        raise CapaProbeError(f"{file} is a folder; give a file, such as {file / 'alpha.safetensors'}.")
    if file.exists():
        HadamardFFN.load(file)


@dataclass(frozen=True)
class CalibrationState:
    """How far a run has come; replaced as a whole, so that no interruption leaves half a batch in it.

    Attributes:
        sums: layer to float64 (4, d_model): sums of x², xy, y² and y.
        n_samples: samples with visual tokens so far.
        n_tokens: their visual tokens.
        progress: what ``Batches.resume`` needs; None before the first batch.
    """

    sums: Mapping[int, Tensor] = field(default_factory=dict)
    n_samples: int = 0
    n_tokens: int = 0
    progress: Mapping[str, Any] | None = None

    def plus(
        self, sums: Mapping[int, Tensor], visual: Tensor, progress: Mapping[str, Any]
    ) -> CalibrationState:
        """The state after one more batch, with visual tokens at bool (batch, position)."""
        return CalibrationState(
            {**self.sums, **{k: self.sums[k] + new if k in self.sums else new for k, new in sums.items()}},
            self.n_samples + int(visual.any(dim=1).sum()),
            self.n_tokens + int(visual.sum()),
            copy.deepcopy(progress),  # its lists grow with the next batch
        )


class CalibrationRun:
    """The state of a run, and the file beside its result that outlives the process.

    Args:
        out: where the result goes; None keeps the state in memory.
        facts: what the sums depend on, as JSON values.

    Attributes:
        file: where the state is written; None in memory.
        state: where the run is; at first, where an earlier one with these facts ended.

    Raises:
        OtherRunError: the earlier run had other facts.
        CapaProbeError: its file is damaged.
    """

    def __init__(self, out: Path | None, facts: Mapping[str, Any]) -> None:
        self.file = None if out is None else state_file(out)
        self._facts, self._written = facts, time.monotonic()
        self._kept = self.state = CalibrationState()
        if self.file is None or not self.file.exists():
            return
        header, tensors = read_tensors(self.file, _HEADER, "start anew with --overwrite (overwrite=True)")
        refuse_other(self.file, header["facts"], facts)
        sums = {int(layer): tensor for layer, tensor in tensors.items()}
        self._kept = self.state = CalibrationState(
            sums, header["n_samples"], header["n_tokens"], header["progress"]
        )

    def advance(self, state: CalibrationState) -> None:
        """Take the state after a batch, and write it if the last time was a while ago."""
        self.state = state
        if time.monotonic() - self._written >= SECONDS_BETWEEN_STATES:
            self.keep()

    def keep(self) -> None:
        """Write the state, if it is not written yet and there is a file for it."""
        state = self.state
        if self.file is None or state is self._kept:
            return
        header = {
            "facts": self._facts,
            "n_samples": state.n_samples,
            "n_tokens": state.n_tokens,
            "progress": state.progress,
        }
        tensors = {str(layer): sums for layer, sums in state.sums.items()}
        write_tensors(self.file, tensors, _HEADER, header)
        self._kept, self._written = state, time.monotonic()

    def finish(self, fitted: HadamardFFN, out: Path | None) -> None:
        """Write the result, and remove the state."""
        if out is None or self.file is None:
            return
        fitted.save(out)
        self._kept = self.state
        self.file.unlink(missing_ok=True)


def state_file(out: Path) -> Path:
    """Where the state of a run lies until its result is written to ``out``."""
    return out.with_name(f"{out.name}.unfinished")


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep other processes away from a file and its state until the block, or the process, ends.

    Raises:
        CapaProbeError: another process is writing to it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    at = file.with_name(f"{file.name}.lock").absolute()
    lock = FileLock(at)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise CapaProbeError(
            f"Another process is writing to {file}; wait until it has ended, or give another file."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            at.unlink(missing_ok=True)
        lock.release()

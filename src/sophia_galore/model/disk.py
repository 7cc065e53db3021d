"""Why something could not be written, in words: a full disk, a quota, a limit on files, a disk that is read-only."""

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

# No room, for whatever reason: what helps is room.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


def errno_of(error: BaseException | None) -> int | None:
    """Return the system's number of a failure to write; None: it was something else.

    Libraries in Rust wrap the system's errors in their own, and leave its number in the text alone.

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
    """Return whether there was no room left."""
    return errno_of(error) in _NO_ROOM


def reason(error: BaseException, place: Path, needed_bytes: int = 0) -> str:
    """Why something could not be written, in a clause.

    Args:
        error: What was raised.
        place: Where it was to be written; it need not exist.
        needed_bytes: About how much was to be written; 0: that is not known.
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
    """Inside the context, a failure to write becomes an error with its cause, what is missing, and a way to go on.

    Args:
        what: What is written, such as "checkpoint-20".
        place: Where.
        way_on: Says what is untouched and how to go on, in a sentence or two.
        needed_bytes: About how much is written; 0: that is not known.

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
    """Return the limit on the size of a file that the process has; None: none."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if soft == resource.RLIM_INFINITY else soft

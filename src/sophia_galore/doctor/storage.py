"""What a folder's file system can do, found out by doing it."""

from __future__ import annotations

import mmap
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

# FICLONE of <linux/fs.h>: share the blocks of another file until one of the two is written to.
_CLONE = 0x40049409
_BLOCK_BYTES = 4096
_CONTENT = bytes(range(256)) * (_BLOCK_BYTES // 256)


@dataclass(frozen=True)
class Storage:
    """A folder's file system.

    Args:
        kind: Its name, such as ext4; None: unknown.
        free_bytes: Room that is left for this user.
        hard_links: Whether a file can have two names.
        reflinks: Whether a copy can share its blocks with the original; None: this system has another way or none.
        direct: Whether files can be read past the system's cache (O_DIRECT); None: this system has another way or none.
    """

    kind: str | None
    free_bytes: int
    hard_links: bool
    reflinks: bool | None
    direct: bool | None


def find_storage(folder: Path) -> Storage:
    """Find out what a folder's file system can do, with files of a few kilobytes that are removed again.

    Args:
        folder: A folder that can be written to.

    Raises:
        OSError: It can't be written to.
    """
    file = folder / "storage.bin"
    file.write_bytes(_CONTENT)
    try:
        return Storage(
            kind=kind_of(folder),
            free_bytes=shutil.disk_usage(folder).free,
            hard_links=bool(_works(lambda: has_hard_links(file))),
            reflinks=_works(lambda: _has_reflinks(file)),
            direct=_works(lambda: _reads_directly(file)),
        )
    finally:
        file.unlink()


def kind_of(folder: Path) -> str | None:
    """Return the name of a folder's kind of file system; None: the system does not say."""
    place = folder.resolve()
    mounted = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    nearest = max(mounted, key=lambda part: len(part.mountpoint), default=None)
    return nearest.fstype or None if nearest else None


def has_hard_links(file: Path) -> bool:
    """Return whether a second name is made for the same file, and not a copy of it."""
    other = file.with_suffix(".link")
    try:
        os.link(file, other)
        with other.open("r+b") as opened:
            opened.write(b"changed")
        return file.read_bytes().startswith(b"changed") and file.stat().st_nlink == 2
    finally:
        other.unlink(missing_ok=True)


def _has_reflinks(file: Path) -> bool | None:
    if sys.platform != "linux":
        return None
    import fcntl

    other = file.with_suffix(".clone")
    try:
        with file.open("rb") as source, other.open("wb") as target:
            fcntl.ioctl(target.fileno(), _CLONE, source.fileno())
        return other.read_bytes() == file.read_bytes()
    finally:
        other.unlink(missing_ok=True)


def _reads_directly(file: Path) -> bool | None:
    if sys.platform != "linux":
        return None
    number = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        # Memory of the system's own pages, since the address has to be a multiple of the disk's blocks.
        with mmap.mmap(-1, _BLOCK_BYTES) as page:
            return os.preadv(number, [page], 0) == _BLOCK_BYTES and page[:] == file.read_bytes()
    finally:
        os.close(number)


def _works(attempt: Callable[[], bool | None]) -> bool | None:
    try:
        return attempt()
    except OSError:  # how file systems say that they can't
        return False

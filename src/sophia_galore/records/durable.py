"""What a power failure does not undo.

A file that was written is not on the disk yet, and neither is its name: both are only once the file, and the folder
that holds it, were flushed. What is relied on later is flushed before.
"""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file's content is on the disk.

    Args:
        path: The file.

    Raises:
        OSError: It can't be written there.
    """
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: what was made, renamed and removed there.

    Args:
        folder: The folder.

    Raises:
        OSError: It can't be written there.
    """
    if os.name == "nt":
        return  # Windows can't open folders; its renames are journaled
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_all(folder: Path) -> None:
    """Wait until a folder is on the disk with everything in it.

    Args:
        folder: The folder.

    Raises:
        OSError: It can't be written there.
    """
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            flush_folder(path)
        else:
            flush(path)


def make_folder(folder: Path) -> None:
    """Make a folder with all that are missing above it, and wait until they are on the disk.

    Args:
        folder: The folder; it may exist.

    Raises:
        OSError: It can't be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush_folder(path.parent)

"""The resident memory of a process at its peak."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from forked import run_forked

MIB = 2**20
_M_MMAP_THRESHOLD = -3  # of malloc.h


def peak_beside(prepare: Callable[[str], Callable[[], int]], folder: Path) -> int:
    """The resident memory at the peak of something, beside what was there before it and what it returns, in bytes.

    Args:
        prepare: Given "small" or "large", makes what is measured, which returns the bytes that it is allowed to keep.
        folder: Takes the result of the process in which it is measured.
    """

    def child() -> int:
        # What is freed is given back at once: else the C library keeps some blocks, now two and now five.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MIB)
        prepare("small")()  # what is read of libraries is not counted
        measured = prepare("large")
        Path("/proc/self/clear_refs").write_text("5")
        before = _in_status("VmRSS")
        kept = measured()
        (folder / "peak").write_text(str(_in_status("VmHWM") - before - kept))
        return 0

    assert run_forked(child, folder / "log") == 0, (folder / "log").read_text()
    return int((folder / "peak").read_text())


def _in_status(key: str) -> int:
    """Bytes of a line of this process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
